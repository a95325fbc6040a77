// A norm between two products (deferred_norm.py): the one in front prepares it, the one behind applies it to its sums.
//
//     in front    (mean, squares) of each 64 outputs of a token: one tile row's, so that one warpgroup has them all; of
//                 each 16 where a GEMV is in front (gemv_norm.cuh)
//     behind      the parts of a token merged, always in the same order: its mean and 1/d, in shared memory, while the
//                 ring fills; then       sum / d            RMS
//                                        (sum - mean · (W g)[n]) / d + (W b + bias)[n]      layer
//
// Of few tokens a block merges all before its first tile ends. Of more, those of each tile while it is multiplied: the
// next tile's, too, for there are two places, which tiles take in turns (TileNorms).
#pragma once

#include "gemm_tile.cuh"
#include "norm.cuh"

constexpr int kFewTokensNormed = 64;  // as tiles of them all are, and no end of theirs is worth fewer exchanges

// Columns of a part whose moments a layer takes: it says so where they are a GEMV's.
template <class L, class = void>
constexpr int kPartOf = kTile;
template <class L>
constexpr int kPartOf<L, typename Void<char[L::kTakenPart]>::Type> = L::kTakenPart;

// Whether norms are merged tile by tile.
template <class Tiling>
constexpr bool kTileNorms = Tiling::L::kNorm != Norm::none && Tiling::L::kM > kFewTokensNormed;

// Tokens whose norms a block keeps: those of two tiles, or all of them, to the end of the last tile.
template <class Tiling>
constexpr int kNormedTokens = Tiling::L::kNorm == Norm::none ? 1
                              : kTileNorms<Tiling>           ? 2 * Tiling::kTokens
                                                             : Tiling::n_token_tiles * Tiling::kTokens;

// Of a tile's norms that are there: where those of its first token are.
template <class Tiling>
__device__ __forceinline__ const float2 *norms_at(const float2 *norms, int first_token) {
    return kTileNorms<Tiling> ? norms : norms + first_token;
}

constexpr int kNormBarrier = 3;  // behind those of warpgroups that multiply

// norms[token] = (mean, 1/d) from parts [K/kPart][M], by kThreads threads: each merges every kShares-th part of a token,
// then one merges those. scratch: 12 bytes a thread.
template <class Tiling, int kThreads>
__device__ __forceinline__ void merge_norms(float2 *norms, const float2 *parts, float *scratch, int thread) {
    using L = typename Tiling::L;
    using RowMoments = Moments<L::kNorm == Norm::layer>;
    constexpr int kPart = kPartOf<L>, kParts = L::kK / kPart;
    constexpr int kColumns = round_up(L::kM, 16), kShares = kThreads / kColumns;
    static_assert(L::kK % kTile == 0 && kShares > 0, "whole parts, and a thread for each token");
    auto *shares = reinterpret_cast<RowMoments *>(scratch);  // [kShares][kColumns]
    const int share = thread / kColumns, token = thread % kColumns;
    if (share < kShares && token < L::kM) {
        RowMoments mine;
#pragma unroll(kPart == kTile ? 4 : 16)
        for (int part = share; part < kParts; part += kShares) {
            mine.merge(moments_of<L::kNorm == Norm::layer>(parts[part * L::kM + token], kPart));
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

// Whether moments of many tokens are made, four at a time: an end of as many is a tenth of the time.
template <class L>
constexpr bool kMomentsOfFour = L::kMoments && L::kM > kFewTokensNormed;

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

// One sum over 16 threads side by side of each of four numbers; in threads 4 i … 4 i + 3 that of the i-th. Halves change
// places until each thread has one: five exchanges, where four sums would be sixteen.
__device__ __forceinline__ float four_sums_of_16(const float (&x)[4]) {
    const bool second = lane_index() & 8, odd = lane_index() & 4;
    float kept[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        kept[i] = second ? x[2 + i] : x[i];
        kept[i] += __shfl_xor_sync(0xffffffffu, second ? x[i] : x[2 + i], 8);
    }
    float sum = odd ? kept[1] : kept[0];
    sum += __shfl_xor_sync(0xffffffffu, odd ? kept[0] : kept[1], 4);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    return sum + __shfl_xor_sync(0xffffffffu, sum, 1);
}

// The moments of four tokens' 64 outputs, of which 16 threads side by side hold 4 a token each; in threads 4 i … 4 i + 3
// those of the i-th token. Squares are summed as they are: what that loses beside a mean of c deviations, c² of float32's
// roundings, is less than what rounding y ∘ g costs, c of bfloat16's, for any c below 2^15.
__device__ __forceinline__ float2 moments_of_four(const float (&v)[4][4]) {
    float sums[4], squares[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        sums[i] = v[i][0] + v[i][1] + v[i][2] + v[i][3];
        squares[i] = v[i][0] * v[i][0] + v[i][1] * v[i][1] + v[i][2] * v[i][2] + v[i][3] * v[i][3];
    }
    const float sum = four_sums_of_16(sums), mean = sum / kTile;
    const float left = four_sums_of_16(squares) - sum * mean;
    return make_float2(mean, left < 0 ? 0 : left);
}

// Of one token, what its parts come to: their means are summed, and squared, as differences from that of the first, so
// that no mean however large makes them inexact; of RMSNorm from 0.
template <class L>
struct SumOfParts {
    static constexpr bool kCentred = L::kNorm == Norm::layer;
    static constexpr int kParts = L::kK / kTile;
    float first, means = 0, means_squared = 0, squares = 0;

    __device__ void add(float2 part) {
        const float d = kCentred ? part.x - first : part.x;
        means += d, means_squared += d * d, squares += part.y;
    }

    // Its mean and 1/d.
    __device__ float2 norm() const {
        const float between = kCentred ? means_squared - means * means / kParts : means_squared;
        const float variance = (squares + kTile * between) / L::kK;
        return make_float2(kCentred ? first + means / kParts : 0, rsqrtf(variance + L::kEpsilon));
    }
};

// norms[i] of a tile's kTokens tokens from `first` on, by kThreads threads: two tokens a thread, from parts [K/64][M].
template <class Tiling, int kThreads>
__device__ __forceinline__ void merge_tile_norms(float2 *norms, const float2 *parts, int first, int thread) {
    using L = typename Tiling::L;
    using Sum = SumOfParts<L>;
    constexpr int kTogether = L::kM % 2 == 0 ? 2 : 1;  // that one load brings
    static_assert(L::kK % kTile == 0 && Tiling::kTokens % 2 == 0, "whole parts, and pairs of tokens");
#pragma unroll 1
    for (int i = kTogether * thread; i < Tiling::kTokens; i += kTogether * kThreads) {
        const bool there = L::kM % Tiling::kTokens == 0 || first + i < L::kM;
        const float2 *from = parts + first + i;
        Sum sums[kTogether];
        for (int j = 0; j < kTogether; j++) sums[j].first = Sum::kCentred && there ? from[j].x : 0;
#pragma unroll 4
        for (int part = 0; there && part < Sum::kParts; part++) {
            if constexpr (kTogether == 2) {
                const float4 both = *reinterpret_cast<const float4 *>(from + part * L::kM);
                sums[0].add(make_float2(both.x, both.y)), sums[kTogether - 1].add(make_float2(both.z, both.w));
            } else {
                sums[0].add(from[part * L::kM]);
            }
        }
        for (int j = 0; j < kTogether; j++) norms[i + j] = there ? sums[j].norm() : make_float2(0, 0);
    }
}

// Two places for the norms of a tile, which a block's stretches take in turns: filled by one side, given back by the other.
template <class Tiling>
struct TileNorms {
    float2 *norms;       // [2][kTokens]
    uint64_t *barriers;  // filled, filled, given back, given back

    __device__ float2 *place(int stretch) const { return norms + stretch % 2 * Tiling::kTokens; }

    // Of those who merge: until the stretch's place is free; that it is filled.
    __device__ void wait_for_place(int stretch) const {
        if (stretch > 1) mbarrier_wait(&barriers[2 + stretch % 2], (stretch / 2 - 1) % 2);
    }
    __device__ void fill(int stretch) const { mbarrier_arrive(&barriers[stretch % 2]); }

    // Of those who multiply: the stretch's norms; that a warp needs them no more, whose threads have met since they read.
    __device__ const float2 *wait(int stretch) const {
        mbarrier_wait(&barriers[stretch % 2], stretch / 2 % 2);
        return place(stretch);
    }
    __device__ void give_back(const float2 *place) const {
        if (lane_index() == 0) mbarrier_arrive(&barriers[place == norms ? 2 : 3]);
    }
};
