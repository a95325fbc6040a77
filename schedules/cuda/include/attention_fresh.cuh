// What small steps (attention_stream.cuh) form of the step's own rows: queries, and new keys and values.
//
// A row that is alone in its sequence, as in decode, needs no product for its own key: a dot product for each query, whose
// result is one more part to merge, with the value as it is. Other rows take their sequence's new keys 16 rows of the
// step at a time, in the form in which pages hold them.
#pragma once

#include "attention_codes.cuh"
#include "attention_unit.cuh"

__device__ __forceinline__ void put_eight(float *to, const Eight &x) {
    reinterpret_cast<float4 *>(to)[0] = make_float4(x.at[0], x.at[1], x.at[2], x.at[3]);
    reinterpret_cast<float4 *>(to)[1] = make_float4(x.at[4], x.at[5], x.at[6], x.at[7]);
}

// Zeros for all 16 queries [D/8][16][8], most of which a unit of a few leaves so.
template <class Shape>
__device__ __forceinline__ void clear_queries(typename Shape::T *q) {
    for (int i = team_thread<Shape>(); i < 16 * Shape::head_dim / 8; i += Stream<Shape>::threads)
        put_chunk(q + 8 * i, make_uint4(0, 0, 0, 0));
}

// Where in its page a row's own key lies; its value follows. Null where another unit, of the same key head, writes both.
// Page tables are no kernel's: it is known before the wait, behind which nothing should come but what must.
template <class Shape>
__device__ __forceinline__ typename Shape::Kv *own_page(typename Shape::Kv *kv, const int *page_table, const Part &part) {
    using S = Stream<Shape>;
    if (S::head_tiles > 1 && part.head != part.kv_head * S::group) return nullptr;
    return page_head<Shape>(kv, page_table[part.row * Shape::pages + part.first / kPageTokens], part.kv_head);
}

// A row's own key and value: into its page if `page` is not null, and as they will be read back to own [D].
template <class Shape>
__device__ __forceinline__ void put_own(float *own, typename Shape::Kv *page, int token, int chunk, const Eight &x,
                                        const Codes &codes) {
    Eight kept;
    if constexpr (kCoded<Shape>) {
        if (page) put_codes<Shape, kPageTokens>(page, token, chunk, codes);
        const uint32_t words[2] = {codes.at.x, codes.at.y};
#pragma unroll
        for (int e = 0; e < 8; e++)
            kept.at[e] = float(int(words[e / 4] >> 8 * (e % 4) & 255) - 128) * codes.scale;
    } else {
        const uint4 packed = pack_eight<typename Shape::T>(x);
        if (page) store_16(page + 8 * (chunk * kPageTokens + token), packed);
        kept = unpack_eight<typename Shape::T>(packed);
    }
    put_eight(own + 8 * chunk, kept);
}

// The unit's queries, into zeros; and where `own` [K, V][D] is not null, the row's own key and value, there and into its
// page, if that is not null. A vector by as many lanes of one warp as codes want.
template <class Shape>
__device__ __forceinline__ void form_vectors(HeadRows<Shape> qkv, const float *cos, const float *sin, const Part &part,
                                             typename Shape::T *q, float *own, typename Shape::Kv *page) {
    using S = Stream<Shape>;
    constexpr int lanes = kVectorLanes<Shape>, at_once = S::threads / lanes;
    const int heads = heads_of<Shape>(part), n_queries = part.count * heads, n = n_queries + (own ? 2 : 0);
    const int chunk = threadIdx.x % lanes;
    for (int base = 0; base < n; base += at_once) {
        const int v = base + team_thread<Shape>() / lanes, is_value = v - n_queries;
        const bool is_query = v < n_queries, is_here = v < n && chunk < S::D / 8;
        Eight x = {};
        if constexpr (kNormed<Shape>) {
            const int head = is_query ? part.head + v % heads : Shape::heads + is_value * Shape::kv_heads + part.kv_head;
            x = normed_eight<Shape>(qkv, cos, sin, is_query ? part.row + v / heads : part.row, head, chunk, is_here);
        } else if (is_here) {
            const int head = is_query ? part.head + v % heads : Shape::heads + is_value * Shape::kv_heads + part.kv_head;
            x = head_eight<Shape>(qkv, cos, sin, is_query ? part.row + v / heads : part.row, head, chunk);
        }
        Codes codes;
        if constexpr (kCoded<Shape>) codes = quantise<lanes>(x);
        if (!is_here) continue;
        if (!is_query) {
            typename Shape::Kv *place = page ? page + is_value * kHeadElements<Shape> : nullptr;
            put_own<Shape>(own + is_value * S::D, place, part.first % kPageTokens, chunk, x, codes);
        } else if constexpr (kCoded<Shape>) {
            put_query<Shape>(q, v, chunk, pack_query(x));
        } else {
            put_chunk(q + 8 * (chunk * 16 + v), pack_eight<typename Shape::T>(x));
        }
    }
}

// scores [queries of a row] of its own key. The last warps begin: where pages are few, the first ones have more of them.
template <class Shape>
__device__ __forceinline__ void score_own(const typename Shape::T *q, const float *own, const Part &part, float *scores) {
    using S = Stream<Shape>;
    constexpr int lanes = kVectorLanes<Shape>, at_once = S::threads / lanes;
    const int n = heads_of<Shape>(part), chunk = threadIdx.x % lanes;
    for (int base = 0; base < n; base += at_once) {
        const int query = base + at_once - 1 - team_thread<Shape>() / lanes;
        if (!__any_sync(kAllLanes, query < n)) continue;
        float sum = 0.f;
        if (query < n && chunk < S::D / 8) {
            uint4 x;
            if constexpr (kCoded<Shape>) {
                x = get_query<Shape>(q, query, chunk);
            } else {
                x = load_16(q + 8 * (chunk * 16 + query));
            }
            const Eight key = load_eight(own + 8 * chunk);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 pair = unpack_pair<typename Shape::T>(x, i);
                sum = fmaf(pair.x, key.at[2 * i], fmaf(pair.y, key.at[2 * i + 1], sum));
            }
        }
#pragma unroll
        for (int offset = lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
        if constexpr (Shape::softcap > 0.f) sum = Shape::softcap * tanhf(sum * (Shape::scale / Shape::softcap));
        if (query < n && chunk == 0) scores[query] = sum;
    }
}

// K and V of 16 rows of the step, from `first` on: zeros for those of other sequences; and the unit's own into the
// pages. `at` [rows]: the positions, -1 for the others. The last warps begin: the first ones are still forming queries.
template <class Shape>
__device__ __forceinline__ void form_keys(HeadRows<Shape> qkv, const float *cos, const float *sin, const int *page_table,
                                          const Part &part, int first, const int *at, typename Shape::T *fresh,
                                          typename Shape::T *kv) {
    using S = Stream<Shape>;
    constexpr int chunks = S::D / 8;
    const bool writes = part.head == part.kv_head * S::group;
    for (int i = S::threads - 1 - team_thread<Shape>(); i < 2 * chunks * 16; i += S::threads) {
        const int chunk = i % chunks, is_value = i / chunks % 2, row = first + i / (2 * chunks);
        uint4 x = make_uint4(0, 0, 0, 0);
        if (at[row] >= 0) {
            const int head = Shape::heads + is_value * Shape::kv_heads + part.kv_head;
            x = head_chunk<Shape>(qkv, cos, sin, row, head, chunk);
            if (writes && row >= part.row && row < part.row + part.count) {
                const int page = page_table[row * Shape::pages + at[row] / kPageTokens];
                store_16(page_head<Shape>(kv, page, part.kv_head) + is_value * kHeadElements<Shape> +
                             8 * (chunk * kPageTokens + at[row] % kPageTokens),
                         x);
            }
        }
        put_chunk(fresh + is_value * S::block + 8 * (chunk * 16 + row % 16), x);
    }
}

// The same where a vector is known as a whole only, as a code and a norm want it: each by lanes of one warp.
template <class Shape>
__device__ __forceinline__ void form_key_vectors(HeadRows<Shape> qkv, const float *cos, const float *sin,
                                                 const int *page_table, const Part &part, int first, const int *at,
                                                 typename Shape::Kv *fresh, typename Shape::Kv *kv) {
    using S = Stream<Shape>;
    constexpr int lanes = kVectorLanes<Shape>;
    const bool writes = part.head == part.kv_head * S::group;
    const int chunk = threadIdx.x % lanes;
    for (int i = (S::threads - 1 - team_thread<Shape>()) / lanes; i < 2 * 16; i += S::threads / lanes) {
        const int is_value = i % 2, row = first + i / 2;
        const bool is_here = at[row] >= 0, has_chunk = chunk < S::D / 8;
        Eight x = {};
        if constexpr (kNormed<Shape>) {
            const int head = Shape::heads + is_value * Shape::kv_heads + part.kv_head;
            x = normed_eight<Shape>(qkv, cos, sin, row, head, chunk, is_here && has_chunk);
        } else if (is_here && has_chunk) {
            const int head = Shape::heads + is_value * Shape::kv_heads + part.kv_head;
            x = head_eight<Shape>(qkv, cos, sin, row, head, chunk);
        }
        const auto kept = kept_eight<Shape>(x);
        if (!has_chunk) continue;
        if (is_here && writes && row >= part.row && row < part.row + part.count) {
            const int page = page_table[row * Shape::pages + at[row] / kPageTokens];
            put_kept<Shape, kPageTokens>(page_head<Shape>(kv, page, part.kv_head) + is_value * kHeadElements<Shape>,
                                         at[row] % kPageTokens, chunk, kept);
        }
        put_kept<Shape, 16>(fresh + is_value * S::block, row % 16, chunk, kept);
    }
}

// The new keys and values of 16 rows, in either form.
template <class Shape>
__device__ __forceinline__ void form_fresh(HeadRows<Shape> qkv, const float *cos, const float *sin, const int *page_table,
                                           const Part &part, int first, const int *at, typename Shape::Kv *fresh,
                                           typename Shape::Kv *kv) {
    if constexpr (kCoded<Shape> || kNormed<Shape>)
        form_key_vectors<Shape>(qkv, cos, sin, page_table, part, first, at, fresh, kv);
    else
        form_keys<Shape>(qkv, cos, sin, page_table, part, first, at, fresh, kv);
}
