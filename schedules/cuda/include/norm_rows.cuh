// Rows normalised on their own: a block a row, each of its warps a part. (norm.cuh says what a norm is.)
//
// Bytes: 4 a row's element read and 4 (f32) or 2 (tiled T) written; with an addition 8 read and 4 more written.
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
