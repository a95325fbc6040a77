// Clusters of two blocks that send each other rows of x, one after the other, by stores that the other's barrier counts.
//
//     y[block][128]  =  sum over 37 rows of  x[the other block][row]
//
// Rows take turns in two places. One is free when it is written again, two rows later: who sends has had the row between
// them, which the other sent after it had read the place (gemv_split.cuh).
#include "device.cuh"

constexpr int kRows = 37, kRow = 128, kRowBytes = 4 * kRow;

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(128) micro_exchange(const float *x, float *y) {
    float *inbox = reinterpret_cast<float *>(dynamic_shared());
    uint64_t *arrived = reinterpret_cast<uint64_t *>(dynamic_shared() + 2 * kRowBytes);
    const int other = cluster_rank() ^ 1, warp = warp_index();
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) mbarrier_init(arrived + i, 2);
        fence_mbarrier_init();
    }
    __syncwarp();
    cluster_arrive();
    cluster_wait();  // the other block's barriers are ready too
    float sum = 0;
    for (int row = 0; row < kRows; row++) {
        float *place = inbox + row % 2 * kRow;
        uint64_t *full = arrived + row % 2;
        if (threadIdx.x == 0) mbarrier_arrive_expect(full, kRowBytes);
        if (warp == row % 4) {
            const float4 four = reinterpret_cast<const float4 *>(x + kRow * (kRows * blockIdx.x + row))[lane_index()];
            store_in(place + 4 * lane_index(), four, full, other);
            if (lane_index() == 0) mbarrier_arrive_in(full, other);
        }
        mbarrier_wait(full, row / 2 % 2);
        sum += place[threadIdx.x];
        __syncthreads();  // all have read
    }
    y[kRow * blockIdx.x + threadIdx.x] = sum;
}
