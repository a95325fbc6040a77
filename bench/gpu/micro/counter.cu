// y[128] = the sum of all blocks' rows, added up by whichever block comes last; the counter is left zero. As GEMMs and
// attention hand parts over: all threads of a block write, one of them counts, all of the last block read.
#include "device.cuh"

extern "C" __global__ void __launch_bounds__(128)
micro_counter(const float *x, float *partial, uint32_t *counter, float *y) {
    __shared__ bool last;
    const int own = 128 * blockIdx.x + threadIdx.x;
    partial[own] = 2.0f * x[own];
    named_barrier(1, 128);
    if (threadIdx.x == 0) last = count_up(counter) == gridDim.x - 1;
    named_barrier(1, 128);
    if (!last) return;
    float total = 0;
    for (int i = 0; i < gridDim.x; i++) total += partial[128 * i + threadIdx.x];
    y[threadIdx.x] = total;
    if (threadIdx.x == 0) *counter = 0;
}
