// D[16,8] = A[16,16] B[8,16]^T by mma.sync: fragments by plain loads, and by ldmatrix.
#include "device.cuh"

__device__ void put(float *y, const float (&d)[4]) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    for (int i = 0; i < 4; i++) y[8 * (g + 8 * (i / 2)) + 2 * t + i % 2] = d[i];
}

extern "C" __global__ void __launch_bounds__(32)
micro_fragments(const uint32_t *a, const uint32_t *b, float *y, float *z) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    const uint32_t fa[4] = {a[8 * g + t], a[8 * (g + 8) + t], a[8 * g + t + 4], a[8 * (g + 8) + t + 4]};
    const uint32_t fb[2] = {b[8 * g + t], b[8 * g + t + 4]};
    float d[4] = {};
    mma_16816<bf16>(d, fa, fb);
    put(y, d);

    unsigned char *shared = dynamic_shared();
    const int row = lane_index() % 8, matrix = lane_index() / 8;
    store_16(shared + 16 * lane_index(), load_16(a + 4 * lane_index()));
    if (lane_index() < 16) store_16(shared + 512 + 16 * lane_index(), load_16(b + 4 * lane_index()));
    __syncwarp();
    uint32_t la[4], lb[2];
    ldmatrix_x4(la, shared + 32 * (row + 8 * (matrix % 2)) + 16 * (matrix / 2));
    ldmatrix_x2(lb, shared + 512 + 32 * row + 16 * (matrix % 2));
    float e[4] = {};
    mma_16816<bf16>(e, la, lb);
    put(z, e);
}
