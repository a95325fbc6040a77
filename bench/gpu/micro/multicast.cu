// Clusters of two blocks that share rows of x: each brings half of a row to both, and a row of w to itself.
//
//     y[block][128]  =  sum over 37 rows of  w[block][row] * (x[row][0..127] - x[row][128..255])
//
// A stage is full when three copies have landed, one of them asked for by the other block, and is filled again when the
// readers of both have given it back. Each does so for itself: one that spoke for its warp, as in gemm_wgmma.cuh, would be
// a dependency through two barriers, which racecheck did not follow from block to block before Compute Sanitizer 2026.1.
#include "device.cuh"

constexpr int kRows = 37, kStages = 3, kHalf = 512, kStage = 3 * kHalf, kReaders = 128, kBlocks = 2;

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(256)
    micro_multicast(const float *w, const float *x, float *y) {
    unsigned char *ring = dynamic_shared();
    uint64_t *full = reinterpret_cast<uint64_t *>(ring + kStages * kStage), *empty = full + kStages;
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; i++) {
            mbarrier_init(full + i, 1);
            mbarrier_init(empty + i, kBlocks * kReaders);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    cluster_arrive();
    cluster_wait();  // the other block's barriers are ready too
    if (warp_index() == kReaders / 32 && lane_index() == 0) {
        const int rank = cluster_rank();
        for (int row = 0; row < kRows; row++) {
            const int stage = row % kStages, parity = row / kStages % 2;
            unsigned char *to = ring + kStage * stage;
            mbarrier_wait(empty + stage, parity ^ 1);
            mbarrier_arrive_expect(full + stage, kStage);
            bulk_copy(to, w + 128 * (kRows * blockIdx.x + row), kHalf, full + stage);
            bulk_copy_multicast(to + kHalf + kHalf * rank, x + 256 * row + 128 * rank, kHalf, full + stage, 3);
        }
        for (int row = kRows; row < kRows + kStages; row++) {  // stay until the other block has given back all stages
            mbarrier_wait(empty + row % kStages, row / kStages % 2 ^ 1);
        }
    }
    if (warp_index() < kReaders / 32) {
        float sum = 0;
        for (int row = 0; row < kRows; row++) {
            const int stage = row % kStages, parity = row / kStages % 2;
            mbarrier_wait(full + stage, parity);
            const float *from = reinterpret_cast<const float *>(ring + kStage * stage) + threadIdx.x;
            sum += from[0] * (from[128] - from[256]);
            for (int block = 0; block < kBlocks; block++) mbarrier_arrive_in(empty + stage, block);
        }
        y[128 * blockIdx.x + threadIdx.x] = sum;
    }
}
