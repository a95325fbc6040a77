// attention_append where a vector has to be known as a whole before any element of it is: for codes, which are multiples
// of its largest element, and for a norm.
#pragma once

#include "attention_codes.cuh"
#include "attention_rows.cuh"

// A block for each (8 rows, key head): vectors of a row and head, each by lanes of one warp; neighbours are rows.
template <class Shape>
__device__ __forceinline__ void append_vectors(HeadRows<Shape> qkv, const float *cos, const float *sin,
                                               const int *positions, const int *page_table, typename Shape::Kv *kv,
                                               typename Shape::T *queries) {
    constexpr int lanes = kVectorLanes<Shape>, group = kGroup<Shape>;
    const int kv_head = blockIdx.x % Shape::kv_heads, first = blockIdx.x / Shape::kv_heads * kAppendRows;
    const int chunk = threadIdx.x % lanes;
    prefetch_norms<Shape>(qkv);
    wait_for_previous();
    let_next_start();
    for (int base = 0; base < kAppendRows * (group + 2); base += kAppendThreads / lanes) {
        const int i = base + threadIdx.x / lanes, row = first + i % kAppendRows, part = i / kAppendRows;
        const bool is_query = part < group, is_value = part > group;
        const int at = part < group + 2 && row < Shape::rows ? positions[row] : -1;
        const bool has_chunk = at >= 0 && chunk < Shape::head_dim / 8;
        const int head = is_query ? kv_head * group + part : Shape::heads + is_value * Shape::kv_heads + kv_head;
        Eight x = {};
        if constexpr (kNormed<Shape>)
            x = normed_eight<Shape>(qkv, cos, sin, row, head, chunk, has_chunk);
        else if (has_chunk)
            x = head_eight<Shape>(qkv, cos, sin, row, head, chunk);
        const auto kept = kept_eight<Shape>(x);
        if (!has_chunk) continue;
        if (is_query) {
            uint4 query;
            if constexpr (kCoded<Shape>)
                query = pack_query(x);
            else
                query = kept;
            store_16(query_tile<Shape>(queries, row / kTileRows, head) + 8 * (chunk * kTileRows + row % kTileRows),
                     query);
        } else {
            const int page = page_table[row * Shape::pages + at / kPageTokens];
            put_kept<Shape, kPageTokens>(page_head<Shape>(kv, page, kv_head) + is_value * kHeadElements<Shape>,
                                         at % kPageTokens, chunk, kept);
        }
    }
}
