// y[128] = the sum of 37 rows of x, brought by bulk copies into a ring of three: parities turn more than a dozen times.
#include "device.cuh"

constexpr int kRows = 37, kStages = 3, kBytes = 512;

extern "C" __global__ void __launch_bounds__(160) micro_pipeline(const float *x, float *y) {
    unsigned char *ring = dynamic_shared();
    uint64_t *full = reinterpret_cast<uint64_t *>(ring + kStages * kBytes), *empty = full + kStages;
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; i++) {
            mbarrier_init(full + i, 1);
            mbarrier_init(empty + i, 128);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    if (warp_index() == 4) {
        if (lane_index() == 0) {
            for (int row = 0; row < kRows; row++) {
                const int stage = row % kStages, parity = row / kStages % 2;
                mbarrier_wait(empty + stage, parity ^ 1);
                mbarrier_arrive_expect(full + stage, kBytes);
                bulk_copy(ring + kBytes * stage, x + 128 * row, kBytes, full + stage);
            }
        }
        return;
    }
    float sum = 0;
    for (int row = 0; row < kRows; row++) {
        const int stage = row % kStages, parity = row / kStages % 2;
        mbarrier_wait(full + stage, parity);
        sum += reinterpret_cast<const float *>(ring + kBytes * stage)[threadIdx.x];
        mbarrier_arrive(empty + stage);
    }
    y[threadIdx.x] = sum;
}
