// One vector of a text out of those of its tokens, which are one behind the other: of the first, or the mean of all.
//
//   pool_first     y[r] = x[row - position]                                 a thread an element
//   pool_mean      y[r] = sum of x[row - position .. row] / count           a block for each (r, 32 columns)
//
// of row = rows[r] at position = positions[row]. A block's warps take every kPoolWarps-th token, a lane has a column;
// their sums are added in the order of warps, so a text's mean has the same bits wherever it lies in a step.
//
// Bytes: 4 K a token of the text, or of r, and 4 K written.
#pragma once

#include "device.cuh"

constexpr int kPoolWarps = 16, kPoolThreads = 32 * kPoolWarps;

// `P` says kRows, kColumns. x [M, kColumns], positions [M], rows [kRows], y [kRows, kColumns].
template <class P>
__device__ __forceinline__ void pool_first(const float *x, const int *positions, const int *rows, float *y) {
    const int i = blockIdx.x * kPoolThreads + threadIdx.x;
    wait_for_previous();
    let_next_start();
    if (i >= P::kRows * P::kColumns) return;
    const int row = rows[i / P::kColumns];
    y[i] = x[int64_t(row - max(positions[row], 0)) * P::kColumns + i % P::kColumns];
}

template <class P>
__device__ __forceinline__ void pool_mean(const float *x, const int *positions, const int *rows, float *y) {
    constexpr int blocks = (P::kColumns + 31) / 32;
    __shared__ float sums[kPoolWarps][32];
    const int r = blockIdx.x / blocks, column = blockIdx.x % blocks * 32 + lane_index();
    const int row = rows[r], n = positions[row] + 1;  // 0 where the row pads the step
    const float *from = x + int64_t(row + 1 - n) * P::kColumns + column;
    const bool is_there = column < P::kColumns;
    wait_for_previous();
    let_next_start();
    float sum = 0.f;
#pragma unroll 8
    for (int i = warp_index(); i < n; i += kPoolWarps) sum += is_there ? from[int64_t(i) * P::kColumns] : 0.f;
    sums[warp_index()][lane_index()] = sum;
    __syncthreads();
    if (warp_index() > 0 || !is_there) return;
    for (int warp = 1; warp < kPoolWarps; warp++) sum += sums[warp][lane_index()];
    y[int64_t(r) * P::kColumns + column] = sum / float(max(n, 1));
}
