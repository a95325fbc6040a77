// A norm between two products (deferred_norm.py): the one in front prepares it, the one behind applies it to its sums.
//
//     in front    (mean, squares) of each 64 outputs of a token: one tile row's, so that one warpgroup has them all
//     behind      the parts of a token merged, always in the same order: its mean and 1/d, in shared memory, while the
//                 ring fills; then       sum / d            RMS
//                                        (sum - mean · (W g)[n]) / d + (W b + bias)[n]      layer
#pragma once

#include "gemm_tile.cuh"
#include "norm.cuh"

// Tokens whose norms a block keeps: all of them, to the end of the last tile.
template <class Tiling>
constexpr int kNormedTokens = Tiling::L::kNorm == Norm::none ? 1 : Tiling::n_token_tiles * Tiling::kTokens;

constexpr int kNormBarrier = 3;  // behind those of warpgroups that multiply

// norms[token] = (mean, 1/d) from parts [K/64][M], by kThreads threads: each merges every kShares-th part of a token,
// then one merges those. scratch: 12 bytes a thread.
template <class Tiling, int kThreads>
__device__ __forceinline__ void merge_norms(float2 *norms, const float2 *parts, float *scratch, int thread) {
    using L = typename Tiling::L;
    using RowMoments = Moments<L::kNorm == Norm::layer>;
    constexpr int kParts = L::kK / kTile, kColumns = round_up(L::kM, 16), kShares = kThreads / kColumns;
    static_assert(L::kK % kTile == 0 && kShares > 0, "whole parts, and a thread for each token");
    auto *shares = reinterpret_cast<RowMoments *>(scratch);  // [kShares][kColumns]
    const int share = thread / kColumns, token = thread % kColumns;
    if (share < kShares && token < L::kM) {
        RowMoments mine;
#pragma unroll 4
        for (int part = share; part < kParts; part += kShares) {
            mine.merge(moments_of<L::kNorm == Norm::layer>(parts[part * L::kM + token], kTile));
        }
        shares[share * kColumns + token] = mine;
    }
    named_barrier(kNormBarrier, kThreads);
    for (int i = thread; i < kNormedTokens<Tiling>; i += kThreads) {
        RowMoments all;
        for (int j = 0; j < kShares && i < L::kM; j++) all.merge(shares[j * kColumns + i]);
        norms[i] = i < L::kM ? make_float2(all.mean, all.factor(L::kEpsilon)) : make_float2(0, 0);
    }
}

// The sum over 16 threads side by side.
__device__ __forceinline__ float sum_of_16(float x) {
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// The moments of a token's 64 outputs, which 16 threads side by side hold, 4 each; in all of them.
__device__ __forceinline__ float2 moments_of_tile(const float (&v)[4]) {
    const float mean = sum_of_16(v[0] + v[1] + v[2] + v[3]) / kTile;
    float squares = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) squares += (v[j] - mean) * (v[j] - mean);
    return make_float2(mean, sum_of_16(squares));
}
