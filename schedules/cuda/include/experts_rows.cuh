// The first and the last thing that happens to rows of sorted pairs (experts_table.cuh).
//
//     pack_pairs      row r of a tiled activation of kAllRows rows = x[token of r's pair], rounded to T
//     combine_pairs   y[m] = Σ_j share[m, j] · result[row of pair m k + j] [+ residual], j in order
//
// A thread takes 8 columns of a row, or of a token. Rows without a pair hold anything, and so do their results.
#pragma once

#include "experts_table.cuh"
#include "norm.cuh"

constexpr int kRowThreads = 256;

template <class Table, int kColumns, class T>
__device__ __forceinline__ void pack_pairs(const float *x, const int *table, T *packed) {
    constexpr int kChunks = round_up(kColumns, kTile) / 8;
    let_next_start();
    wait_for_previous();
    const int at = blockIdx.x * kRowThreads + threadIdx.x, row = at / kChunks, chunk = at % kChunks;
    if (row >= Table::kAllRows) return;
    const int pair = table[Table::kPairsAt + row];
    if (pair < 0) return;
    float v[8] = {};
    if (8 * chunk < kColumns) load_eight<kColumns>(v, x + int64_t(pair / Table::kChosen) * kColumns, 8 * chunk);
    store_16(packed + activation_index(round_up(Table::kAllRows, 8), row, 8 * chunk), round_eight<T>(v));
}

template <class Table, int kColumns>
__device__ __forceinline__ void combine_pairs(const float *share, const float *results, const int *table,
                                              const float *residual, float *y) {
    constexpr int kChunks = ceil_div(kColumns, 8);
    let_next_start();
    wait_for_previous();
    const int at = blockIdx.x * kRowThreads + threadIdx.x, token = at / kChunks, first = at % kChunks * 8;
    if (token >= Table::kTokens) return;
    float sums[8] = {}, added[8] = {};
    if (residual) load_eight<kColumns>(added, residual + int64_t(token) * kColumns, first);
#pragma unroll 2
    for (int j = 0; j < Table::kChosen; j++) {
        const int pair = token * Table::kChosen + j;
        float v[8] = {};
        load_eight<kColumns>(v, results + int64_t(table[Table::kRowsAt + pair]) * kColumns, first);
#pragma unroll
        for (int i = 0; i < 8; i++) sums[i] = fmaf(share[pair], v[i], sums[i]);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) sums[i] += added[i];
    store_eight<kColumns>(y + int64_t(token) * kColumns, first, sums);
}
