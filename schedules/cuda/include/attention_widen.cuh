// A KV cache of int8 in large steps: a block makes a page's codes (attention_codes.cuh) numbers in f16 once, in the order
// that a page of f16 has, for all its rows.
//
// With loads and stores that is 2 1/2 instructions for 64 codes: 5 D for a page of one head, beside the 4 D products of a
// tile of 64 rows. Scales stay out of it, as in small steps.
#pragma once

#include "attention_vectors.cuh"

constexpr int kTileThreads = 128;

// Eight bytes of a token as codes in f16.
__device__ __forceinline__ uint4 widened(uint32_t first, uint32_t second) {
    return make_uint4(two_codes<false>(first), two_codes<true>(first), two_codes<false>(second), two_codes<true>(second));
}

// K or V of a page, from shared memory to shared memory, by n threads of which this is `thread`.
template <class Shape>
__device__ __forceinline__ void widen(f16 *to, const uint8_t *codes, int thread, int n) {
#pragma unroll 4
    for (int i = thread; i < kPageTokens * Shape::head_dim / 16; i += n) {
        const int c = i / kPageTokens, token = i % kPageTokens;
        const uint4 bytes = load_16(codes + chunk_place<kPageTokens>(token / 8 * 8, token % 8, c));
        put_chunk(to + 8 * (2 * c * kPageTokens + token), widened(bytes.x, bytes.y));
        put_chunk(to + 8 * ((2 * c + 1) * kPageTokens + token), widened(bytes.z, bytes.w));
    }
}

// attention_append in int8.
template <class Shape>
__device__ __forceinline__ void attention_append_codes(HeadRows<Shape> qkv, const float *cos, const float *sin,
                                                       const int *positions, const int *page_table, uint8_t *kv,
                                                       typename Shape::T *queries) {
    append_vectors<Shape>(qkv, cos, sin, positions, page_table, kv, queries);
}

// Asks for K and V of a page. Codes are numbers whatever they are; scales of tokens after the last, which may never have
// been written, come as zeros.
template <class Shape>
__device__ __forceinline__ void ask_codes(uint8_t *stage, const uint8_t *from, int tokens) {
    static_assert(kTileThreads == 2 * kPageTokens, "a thread for each scale");
    const int is_value = threadIdx.x / kPageTokens, token = threadIdx.x % kPageTokens;
    stage += is_value * kHeadElements<Shape>, from += is_value * kHeadElements<Shape>;
#pragma unroll 4
    for (int c = 0; c < Shape::head_dim / 16; c++) {
        const int at = 16 * (c * kPageTokens + token);
        cp_async_16(stage + at, from + at);
    }
    cp_async_4(scales_of<Shape, kPageTokens>(stage) + token, scales_of<Shape, kPageTokens>(from) + token,
               token < tokens);
}

// One page in shared memory and this warp's 16 rows of a stretch; by all warps, whether they see it or not. `wide` is
// room for K or V in f16.
template <class Shape>
__device__ __forceinline__ void attend_codes(Gathered<Shape> &state, const Queries<Shape, kTileRows> &queries,
                                             const Stretch &stretch, int page, const uint8_t *keys, f16 *wide) {
    const uint8_t *values = keys + kHeadElements<Shape>;
    const int row = 16 * warp_index();
    const Stretch rows = part_of<Shape>(stretch, row, 16);
    const bool used = sees_some<Shape>(rows, page);
    float s[kPageTokens / 8][4];
    widen<Shape>(wide, keys, threadIdx.x, kTileThreads);
    __syncthreads();
    if (used) {
        score<Shape, kPageTokens, kPageTokens>(s, queries, static_cast<const f16 *>(wide));
        scale_scores<kPageTokens>(s, scales_of<Shape, kPageTokens>(keys));
        weigh<Shape, kPageTokens>(
            state, s, !sees_all<Shape>(rows, page, 16),
            [&](int half, int i) { return sees<Shape>(rows, row + lane_index() / 4 + 8 * half, page * kPageTokens + i); },
            page_bias<Shape>(state, rows, row + lane_index() / 4, page));
        scale_weights<Shape, kPageTokens>(state, s, scales_of<Shape, kPageTokens>(values));
    }
    __syncthreads();
    widen<Shape>(wide, values, threadIdx.x, kTileThreads);
    __syncthreads();
    if (used) add_values<Shape, kPageTokens, kPageTokens>(state, s, static_cast<const f16 *>(wide));
}
