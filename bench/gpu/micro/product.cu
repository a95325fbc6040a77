// y[64,64] = A[64,128] B[64,128]^T by wgmma, both operands K-major in 128-byte swizzled tiles of 64 columns.
#include "device.cuh"

extern "C" __global__ void __launch_bounds__(128)
micro_product(const unsigned char *a, const unsigned char *b, float *y) {
    unsigned char *shared = dynamic_shared(), *tokens = shared + 16384;
    uint64_t *full = reinterpret_cast<uint64_t *>(shared + 32768);
    if (threadIdx.x == 0) {
        mbarrier_init(full, 1);
        fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(full, 32768);
        bulk_copy(shared, a, 16384, full);
        bulk_copy(tokens, b, 16384, full);
    }
    mbarrier_wait(full, 0);
    float d[32];
    wgmma_fence(d);
    for (int slab = 0; slab < 2; slab++)
        for (int k = 0; k < 4; k++)
            wgmma<64, bf16>(d, k_major_descriptor(shared + 8192 * slab, k), k_major_descriptor(tokens + 8192 * slab, k),
                            slab > 0 || k > 0);
    wgmma_commit();
    wgmma_wait<0>(d);
    const int g = lane_index() / 4, t = lane_index() % 4;
    for (int i = 0; i < 32; i++)
        y[64 * (16 * warp_index() + g + 8 * (i / 2 % 2)) + 8 * (i / 4) + 2 * t + i % 2] = d[i];
}
