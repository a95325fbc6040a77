// x[2][blocks][128]: one half = 3 times the other + step, a block further on; each launch turns the halves' roles.
// Launched many times in a row, each allowed to begin early: one that does not wait shows, and so does a number left in
// L1 from two launches before, where another multiprocessor has written since. step[128] is read before the wait: all
// that was copied there before the first launch must be seen.
#include "device.cuh"

extern "C" __global__ void __launch_bounds__(128) micro_order(const uint32_t *step, uint32_t *x, uint32_t *turn,
                                                                  uint32_t *counter) {
    let_next_start();
    const uint32_t mine = step[threadIdx.x];
    wait_for_previous();
    const uint32_t now = *turn, half = 128 * gridDim.x;
    const uint32_t from = 128 * ((blockIdx.x + 1) % gridDim.x) + threadIdx.x, to = 128 * blockIdx.x + threadIdx.x;
    x[(now + 1) % 2 * half + to] = 3 * x[now % 2 * half + from] + mine;
    __syncthreads();
    if (threadIdx.x == 0 && count_up(counter) == gridDim.x - 1) *turn = now + 1, *counter = 0;
}
