// y[M,N] = act(x Wᵀ + bias) + residual in float32 on the ordinary units, for weights kept in float32.
//
// A block of 256 threads owns 64 tokens by 64 outputs, a thread 4 by 4 of them (both rows of a gated pair); 16 of K at
// a time come through shared memory, transposed. Bytes: W once for each 64 tokens, x once for each 64 outputs.
// Operations: 2 M N K, bound by them.
#pragma once

#include "epilogue.cuh"
#include "tiles.cuh"

constexpr int kFmaTile = 64, kFmaSteps = 16, kFmaThreads = 256;

// 64 rows by 16 of K of a row-major matrix [n_rows, k], transposed; zeros past its edges.
template <int kRows, int kColumns>
__device__ __forceinline__ void load_transposed(float (&to)[kFmaSteps][kFmaTile + 4], const float *from, int first_row,
                                                int first_k) {
    const int row = threadIdx.x / 4, k = threadIdx.x % 4 * 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const bool is_there = first_row + row < kRows && first_k + k + i < kColumns;
        to[k + i][row] = is_there ? from[int64_t(first_row + row) * kColumns + first_k + k + i] : 0;
    }
}

// x [M,K], weight [N,K] (gated: [2N,K]), bias, residual and y, all f32 row-major.
template <class L>
__device__ __forceinline__ void gemm_fma(const float *x, const float *weight, const Epilogue<L> &epilogue) {
    constexpr int kParts = L::kGated ? 2 : 1;
    alignas(16) __shared__ float tokens[kFmaSteps][kFmaTile + 4], rows[kParts][kFmaSteps][kFmaTile + 4];
    constexpr int n_output_tiles = ceil_div(L::kN, kFmaTile);
    const int first_output = blockIdx.x % n_output_tiles * kFmaTile;
    const int first_token = blockIdx.x / n_output_tiles * kFmaTile;
    const int my_outputs = threadIdx.x % 16 * 4, my_tokens = threadIdx.x / 16 * 4;
    let_next_start();
    wait_for_previous();

    float sums[kParts][4][4] = {};
    for (int k = 0; k < L::kK; k += kFmaSteps) {
        __syncthreads();
        load_transposed<L::kM, L::kK>(tokens, x, first_token, k);
        for (int part = 0; part < kParts; part++) {
            load_transposed<L::kN, L::kK>(rows[part], weight + int64_t(part) * L::kN * L::kK, first_output, k);
        }
        __syncthreads();
#pragma unroll
        for (int step = 0; step < kFmaSteps; step++) {
#pragma unroll
            for (int part = 0; part < kParts; part++) {
#pragma unroll
                for (int i = 0; i < 16; i++) {
                    sums[part][i / 4][i % 4] += tokens[step][my_tokens + i / 4] * rows[part][step][my_outputs + i % 4];
                }
            }
        }
    }
    for (int i = 0; i < 16; i++) {
        const int token = first_token + my_tokens + i / 4, n = first_output + my_outputs + i % 4;
        if (token >= L::kM || n >= L::kN) continue;
        float value = sums[0][i / 4][i % 4];
        if constexpr (L::kBias) value += epilogue.bias[n];
        value = activate<L::kActivation>(value);
        if constexpr (L::kGated) {
            float up = sums[kParts - 1][i / 4][i % 4];
            if constexpr (L::kBias) up += epilogue.bias[L::kN + n];
            value *= up;
        }
        if constexpr (L::kResidual) value += epilogue.residual[int64_t(token) * L::kN + n];
        epilogue.y[int64_t(token) * L::kN + n] = value;
    }
}
