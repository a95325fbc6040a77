// A[64,64] from registers times V[64,64] as it lies, N-major: once swizzled and once in plain 8x8 matrices; and times V^T
// from the same plain matrices, K-major. Dynamic shared memory begins behind a fixed-size variable; offset: how far it is
// from a multiple of 1024.
#include "device.cuh"

__device__ void fragments_of(const float *a, int k, uint32_t (&fragment)[4]) {
    const int g = 16 * warp_index() + lane_index() / 4, t = lane_index() % 4;
    for (int i = 0; i < 4; i++) {
        const float *from = a + 64 * (g + 8 * (i % 2)) + 16 * k + 8 * (i / 2) + 2 * t;
        fragment[i] = pack2<bf16>(from[0], from[1]);
    }
}

__device__ void put(const float (&d)[32], float *y) {
    const int g = 16 * warp_index() + lane_index() / 4, t = lane_index() % 4;
    for (int i = 0; i < 32; i++) y[64 * (g + 8 * (i / 2 % 2)) + 8 * (i / 4) + 2 * t + i % 2] = d[i];
}

extern "C" __global__ void __launch_bounds__(128)
micro_turned(const float *a, const bf16 *v, float *swizzled, float *plain, float *k_major, uint32_t *offset) {
    __shared__ uint32_t before[3];
    if (threadIdx.x == 0) before[1] = shared_address(dynamic_shared()) % 1024;
    unsigned char *rows = dynamic_shared(), *matrices = rows + 8192;
    for (int i = threadIdx.x; i < 64 * 8; i += 128) {
        const int row = i / 8, chunk = i % 8;
        const uint4 piece = load_16(v + 64 * row + 8 * chunk);
        store_16(rows + 128 * row + 16 * (chunk ^ (row & 7)), piece);
        store_16(matrices + 1024 * chunk + 16 * row, piece);  // [n / 8][64 k][8 n], as V lies in the KV cache
    }
    fence_async_shared();
    __syncthreads();
    uint32_t fragment[4][4];
    for (int k = 0; k < 4; k++) fragments_of(a, k, fragment[k]);
    if (threadIdx.x == 0) *offset = before[1];
    float d[32], e[32], f[32];
    wgmma_fence(d, e, f);
    for (int k = 0; k < 4; k++) wgmma<64, bf16, true>(d, fragment[k], n_major_descriptor(rows, 8192, k), k > 0);
    for (int k = 0; k < 4; k++)
        wgmma<64, bf16, true>(e, fragment[k], plain_descriptor(matrices + 256 * k, 128, 1024), k > 0);
    for (int k = 0; k < 4; k++)
        wgmma<64, bf16>(f, fragment[k], plain_descriptor(matrices + 2048 * k, 1024, 128), k > 0);
    wgmma_commit();
    wgmma_wait<0>(d, e, f);
    put(d, swizzled);
    put(e, plain);
    put(f, k_major);
}
