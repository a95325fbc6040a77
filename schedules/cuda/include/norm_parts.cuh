// Two parts of a row normalised, each whole, and the rest as it is: queries and keys beside values. A block a row.
//
// Bytes: 8 an element. (norm.cuh says what a norm is.)
#pragma once

#include "norm.cuh"

// What NormInput asks for, of a part of kColumns elements.
template <class R, int kColumns>
struct NormPart {
    static constexpr int kK = kColumns;
    static constexpr Norm kNorm = Norm::rms;
    static constexpr bool kNormBias = false;
    static constexpr float kEpsilon = R::kEpsilon;
};

// `R` says kColumns, kQueries, kKeys: of a row, and of its parts, multiples of 8; kWarps, kEpsilon.
// qkv, out [rows, kColumns], query_norm [kQueries], key_norm [kKeys].
template <class R>
__device__ __forceinline__ void norm_parts(const float *qkv, const float *query_norm, const float *key_norm, float *out) {
    using Queries = NormInput<NormPart<R, R::kQueries>>;
    using Keys = NormInput<NormPart<R, R::kKeys>>;
    __shared__ Moments<false> of_queries[R::kWarps], of_keys[R::kWarps];
    constexpr int kThreads = 32 * R::kWarps, kNormed = R::kQueries + R::kKeys;
    const int64_t row = int64_t(blockIdx.x) * R::kColumns;
    const Queries queries = {qkv + row, query_norm, nullptr};
    const Keys keys = {qkv + row + R::kQueries, key_norm, nullptr};
    let_next_start();
    queries.prefetch(), keys.prefetch();
    wait_for_previous();

    const int warp = warp_index();
    const auto some_queries = queries.template moments<kThreads>(0, warp * 32);
    const auto some_keys = keys.template moments<kThreads>(0, warp * 32);
    if (lane_index() == 0) of_queries[warp] = some_queries, of_keys[warp] = some_keys;
    for (int d = kNormed + 8 * threadIdx.x; d < R::kColumns; d += 8 * kThreads) {
        float v[8];
        load_eight<8>(v, qkv + row, d);
        store_eight<8>(out + row, d, v);
    }
    __syncthreads();
    Moments<false> all_queries, all_keys;
    for (int i = 0; i < R::kWarps; i++) all_queries.merge(of_queries[i]), all_keys.merge(of_keys[i]);
    queries.template each<kThreads, Queries::kChunks>(0, threadIdx.x, all_queries, [&](int chunk, const float(&v)[8]) {
        store_eight<8>(out + row, 8 * chunk, v);
    });
    keys.template each<kThreads, Keys::kChunks>(0, threadIdx.x, all_keys, [&](int chunk, const float(&v)[8]) {
        store_eight<8>(out + row + R::kQueries, 8 * chunk, v);
    });
}
