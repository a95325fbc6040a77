// x[i] = 3 x[i] + 1, launched many times in a row, each allowed to begin early: a launch that does not wait shows.
#include "device.cuh"

extern "C" __global__ void __launch_bounds__(128) micro_order(uint32_t *x) {
    let_next_start();
    wait_for_previous();
    uint32_t *mine = x + 128 * ((blockIdx.x + 1) % gridDim.x) + threadIdx.x;  // another block wrote it
    *mine = 3 * *mine + 1;
}
