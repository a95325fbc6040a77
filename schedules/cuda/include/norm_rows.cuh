// Rows normalised on their own: a block a row, or several, each of its warps a part. (norm.cuh says what a norm is.)
//
// Bytes: 4 a row's element read and 4 (f32) or 2 (tiled T) written; with an addition 8 read and 4 more written. A block of
// several rows reads weight and bias once for them.
#pragma once

#include "norm.cuh"

// `N` says what NormInput asks for, and: kRows, kAdds (normalise x + residual, and give that sum too), kWarps, and Y:
// float for y [kRows, kK], T for a tiled activation.
template <class N>
__device__ __forceinline__ void norm_rows(const float *x, const float *residual, const float *weight, const float *bias,
                                          float *sum, typename N::Y *y) {
    using Input = NormInput<N>;
    __shared__ typename Input::RowMoments parts[N::kWarps];
    constexpr int kThreads = 32 * N::kWarps;
    constexpr bool kTiled = sizeof(typename N::Y) == 2;
    constexpr int kChunks = kTiled ? round_up(Input::kChunks, 8) : Input::kChunks;
    const int row = blockIdx.x;
    let_next_start();
    Input{nullptr, weight, bias}.prefetch();
    wait_for_previous();

    if constexpr (N::kAdds) {
        for (int chunk = threadIdx.x; chunk < Input::kChunks; chunk += kThreads) {
            float v[8], more[8];
            load_eight<N::kK>(v, x + int64_t(row) * N::kK, 8 * chunk);
            load_eight<N::kK>(more, residual + int64_t(row) * N::kK, 8 * chunk);
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] += more[i];
            store_eight<N::kK>(sum + int64_t(row) * N::kK, 8 * chunk, v);
        }
    }
    const Input rows = {N::kAdds ? sum : x, weight, bias};  // a thread comes back to the chunks it has written
    typename Input::RowMoments all;
    if constexpr (N::kNorm != Norm::none) {
        const int warp = warp_index();
        const auto part = rows.template moments<kThreads>(row, warp * 32);
        if (lane_index() == 0) parts[warp] = part;
        __syncthreads();
        for (int i = 0; i < N::kWarps; i++) all.merge(parts[i]);
    }
    rows.template each<kThreads, kChunks>(row, threadIdx.x, all, [&](int chunk, const float(&v)[8]) {
        if constexpr (kTiled) {
            store_16(y + activation_index(round_up(N::kRows, 8), row, 8 * chunk), round_eight<typename N::Y>(v));
        } else {
            store_eight<N::kK>(y + int64_t(row) * N::kK, 8 * chunk, v);
        }
    });
}

// Several rows of a prompt in a block, one after the other: weight and bias stay in registers, and so does a row between
// its moments and its norm; the next one is on its way meanwhile. `N` as for norm_rows, without kAdds, and: kEach, rows of
// a block. A row is at most two chunks of each thread.
template <class N>
struct ManyRows {
    using Input = NormInput<N>;
    using RowMoments = typename Input::RowMoments;
    static constexpr int kThreads = 32 * N::kWarps, kMine = 2;
    static constexpr bool kTiled = sizeof(typename N::Y) == 2;
    static constexpr int kEnd = kTiled ? round_up(Input::kChunks, 8) : Input::kChunks;  // of what is written
    static_assert(kEnd <= kMine * kThreads && N::kK % 8 == 0 && N::kNorm != Norm::none, "a row in registers");
    using Eights = float[kMine][8];

    const float *x, *weight, *bias;
    typename N::Y *y;

    static __device__ __forceinline__ int chunk(int i) { return threadIdx.x + i * kThreads; }

    static __device__ __forceinline__ void load(Eights &eights, const float *from) {
#pragma unroll
        for (int i = 0; i < kMine; i++) {
            if (chunk(i) < Input::kChunks) load_eight<N::kK>(eights[i], from, 8 * chunk(i));
        }
    }

    static __device__ __forceinline__ RowMoments moments(const Eights &row, RowMoments *parts) {
        RowMoments mine, all;
#pragma unroll
        for (int i = 0; i < kMine; i++) {
            if (chunk(i) < Input::kChunks) mine.add(row[i], 8);
        }
        const int warp = warp_index();
        const auto part = mine.over_lanes();
        if (lane_index() == 0) parts[warp] = part;
        __syncthreads();
        for (int i = 0; i < N::kWarps; i++) all.merge(parts[i]);
        return all;
    }

    __device__ __forceinline__ void store(int at, const Eights &row, const Eights &scale, const Eights &shift,
                                          const RowMoments &all) const {
        const float factor = all.factor(N::kEpsilon);
#pragma unroll
        for (int i = 0; i < kMine; i++) {
            if (chunk(i) >= kEnd) continue;
            float v[8] = {};
            if (chunk(i) < Input::kChunks) {
#pragma unroll
                for (int j = 0; j < 8; j++)
                    v[j] = (row[i][j] - all.mean) * factor * scale[i][j] + (N::kNormBias ? shift[i][j] : 0.0f);
            }
            if constexpr (kTiled) {
                store_16(y + activation_index(round_up(N::kRows, 8), at, 8 * chunk(i)),
                         round_eight<typename N::Y>(v));
            } else {
                store_eight<N::kK>(y + int64_t(at) * N::kK, 8 * chunk(i), v);
            }
        }
    }

    // parts [2][kWarps]: rows take turns, so that one barrier a row is enough.
    __device__ __forceinline__ void run(RowMoments *parts) const {
        Eights scale, shift, row, next;
        int at = blockIdx.x * N::kEach;
        const int end = min(at + N::kEach, N::kRows);
        let_next_start();
        Input{nullptr, weight, bias}.prefetch();
        wait_for_previous();
        load(row, x + int64_t(at) * N::kK);
        load(scale, weight);
        if constexpr (N::kNormBias) load(shift, bias);
#pragma unroll 1
        for (; at < end; at++) {
            if (at + 1 < end) load(next, x + int64_t(at + 1) * N::kK);
            store(at, row, scale, shift, moments(row, parts + at % 2 * N::kWarps));
#pragma unroll
            for (int i = 0; i < kMine; i++) {
#pragma unroll
                for (int j = 0; j < 8; j++) row[i][j] = next[i][j];
            }
        }
    }
};

template <class N>
__device__ __forceinline__ void norm_many_rows(const float *x, const float *weight, const float *bias,
                                               typename N::Y *y) {
    __shared__ typename ManyRows<N>::RowMoments parts[2 * N::kWarps];
    ManyRows<N>{x, weight, bias, y}.run(parts);
}
