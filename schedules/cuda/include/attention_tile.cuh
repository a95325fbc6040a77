// Attention of large steps (prefill), after attention_append (attention_rows.cuh).
//
// attention_tile: 64 rows of one query head a block, 16 a warp; the pages go by, two at a time in shared memory.
//
//     for each run of rows that continue one sequence (as a rule the tile is one):
//         for page of the run:  s[64,64] = q k^T;   o[64,D] = o * keep + 2^(s - most) v
//
//     A warp skips a page that none of its rows sees. Blocks of the last rows, which see most, start first.
//     Operations: 4 D a token seen and query head. Arithmetic is the limit.
//
// Beside what attention.cuh lists, Shape has:
//     stages      pages in shared memory, 1 or 2
#pragma once

#include "attention_widen.cuh"

template <class Shape>
struct Tile {
    static constexpr int D = Shape::head_dim;
    static constexpr int tiles = (Shape::rows + kTileRows - 1) / kTileRows;
    static constexpr bool keeps_queries = Queries<Shape, kTileRows>::in_registers;
    static constexpr int stage = 2 * kHeadElements<Shape>;   // of Kv: K and V of a page
    // Shared memory: stages; room for K or V as T, where the cache holds codes; the queries. Where these are kept, they
    // come by way of the last stage, or of that room. Places are counted in Kv.
    static constexpr int wide_at = Shape::stages * stage;
    static constexpr int wide = kCoded<Shape> ? kPageTokens * D * int(sizeof(typename Shape::T)) : 0;
    static constexpr int queries_at = !keeps_queries ? wide_at + wide : wide_at - (kCoded<Shape> ? 0 : stage);
};

// Asks for K and V of a page; zeros for tokens after the last, which may never have been written.
template <class Shape>
__device__ __forceinline__ void ask_page(typename Shape::Kv *stage, const typename Shape::Kv *from, int tokens) {
#pragma unroll 4
    for (int i = threadIdx.x; i < 2 * kHeadElements<Shape> / 8; i += kTileThreads)
        cp_async_16(stage + 8 * i, from + 8 * i, i % kPageTokens < tokens);
}

// One page in shared memory and this warp's 16 rows of a stretch.
template <class Shape>
__device__ __forceinline__ void attend_page(Gathered<Shape> &state, const Queries<Shape, kTileRows> &queries,
                                            const Stretch &stretch, int page, const typename Shape::T *keys) {
    const int row = 16 * warp_index();
    const Stretch rows = part_of<Shape>(stretch, row, 16);
    if (!sees_some<Shape>(rows, page)) return;
    float s[kPageTokens / 8][4];
    score<Shape, kPageTokens, kPageTokens>(s, queries, keys);
    weigh<Shape, kPageTokens>(
        state, s, !sees_all<Shape>(rows, page, 16),
        [&](int half, int i) { return sees<Shape>(rows, row + lane_index() / 4 + 8 * half, page * kPageTokens + i); },
        page_bias<Shape>(state, rows, row + lane_index() / 4, page));
    add_values<Shape, kPageTokens, kPageTokens>(state, s, keys + kHeadElements<Shape>);
}

template <class Shape>
__device__ __forceinline__ void attend_stretch(Gathered<Shape> &state, const Queries<Shape, kTileRows> &queries,
                                               const Stretch &stretch, const int *pages,
                                               const typename Shape::Kv *kv, int kv_head, typename Shape::Kv *stages) {
    using S = Tile<Shape>;
    using Kv = typename Shape::Kv;
    const auto ask = [&](int page) {
        if (page * kPageTokens <= last_seen<Shape>(stretch)) {
            Kv *stage = stages + page % Shape::stages * S::stage;
            const Kv *from = page_head<Shape>(const_cast<Kv *>(kv), pages[page], kv_head);
            if constexpr (kCoded<Shape>)
                ask_codes<Shape>(stage, from, last_seen<Shape>(stretch) + 1 - page * kPageTokens);
            else
                ask_page<Shape>(stage, from, last_seen<Shape>(stretch) + 1 - page * kPageTokens);
        }
        cp_async_commit();
    };
    const int begin = first_page<Shape>(stretch);
    if (Shape::stages > 1) ask(begin);
    for (int page = begin; page * kPageTokens <= last_seen<Shape>(stretch); page++) {
        ask(page + Shape::stages - 1);
        cp_async_wait<Shape::stages - 1>();
        __syncthreads();
        if constexpr (kCoded<Shape>)
            attend_codes<Shape>(state, queries, stretch, page, stages + page % Shape::stages * S::stage,
                                reinterpret_cast<typename Shape::T *>(stages + S::wide_at));
        else
            attend_page<Shape>(state, queries, stretch, page, stages + page % Shape::stages * S::stage);
        __syncthreads();
    }
}

// A block for each (tile, head), the last tiles first.
template <class Shape>
__device__ __forceinline__ void attention_tile(const typename Shape::T *queries, const int *positions,
                                               const int *page_table, const typename Shape::Kv *kv,
                                               typename Shape::Out *out, const float *sinks = nullptr,
                                               const float *slopes = nullptr) {
    using S = Tile<Shape>;
    using T = typename Shape::T;
    const int head = blockIdx.x % Shape::heads, tile = S::tiles - 1 - blockIdx.x / Shape::heads;
    const int first_row = tile * kTileRows, n = min(Shape::rows - first_row, kTileRows);
    auto *stages = reinterpret_cast<typename Shape::Kv *>(dynamic_shared());
    T *q = reinterpret_cast<T *>(stages + S::queries_at);
    const uint64_t joined = continued<Shape>(positions, page_table, first_row, n);
    int behind = 0;  // rows, of a text that goes on there
    if constexpr (kBothWays<Shape>) {
        const int last_row = first_row + n - 1, last = positions[last_row];
        if (last >= 0) behind = rows_behind<Shape>(positions, last_row, last);
    }
    wait_for_previous();
    let_next_start();

    const T *from = query_tile<Shape>(const_cast<T *>(queries), tile, head);
    for (int i = threadIdx.x; i < kTileRows * S::D / 8; i += kTileThreads) cp_async_16(q + 8 * i, from + 8 * i);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    Queries<Shape, kTileRows> rows;
    rows.load(q + 8 * 16 * warp_index());
    __syncthreads();

    Gathered<Shape> state;
    clear(state);
    read_slopes<Shape>(state, slopes, head, head);
    if constexpr (kCoded<Shape>) clear_unit(state);
    for (Stretch stretch = {0, 0, 0, 0}; stretch.begin < n; stretch.begin = stretch.end) {
        stretch.first = positions[first_row + stretch.begin];
        stretch.end = stretch.begin + 1 + ones_up(joined, stretch.begin + 1);
        stretch.last = stretch.first + stretch.end - 1 - stretch.begin;
        if constexpr (kBothWays<Shape>)
            if (stretch.end == n) stretch.last += behind;
        if (stretch.first < 0) continue;
        attend_stretch<Shape>(state, rows, stretch, page_table + (first_row + stretch.end - 1) * Shape::pages, kv,
                              head / kGroup<Shape>, stages);
    }
    int at[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = own_row(half);
        at[half] = row < n ? positions[first_row + row] : -1;
    }
    write_rows<Shape>(state, at, first_row, head, out, value_unit(state), sinks);
    if (head == Shape::heads - 1)
        for (int row = first_row; row < first_row + n; row++)
            write_zeros<Shape>(out, row, kColumns<Shape>, kPaddedColumns<Shape>, threadIdx.x, kTileThreads);
}
