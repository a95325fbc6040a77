// Attention of large steps (prefill), two launches.
//
// attention_append: eight rows of one key head and its group a block.
//     turn q and k by their positions, write k and v into the pages, and q as a page's K would lie:
//     queries [ceil(M/64)][heads][D/8][64 rows][8]
//     Bytes: (4 + 2) (H + 2 KH) D a row.
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

#include "attention.cuh"

constexpr int kAppendRows = 8;
constexpr int kAppendThreads = 128;
constexpr int kTileThreads = 128;
constexpr int kTileRows = 64;

// Queries of tile `tile` and head `head` [D/8][64][8].
template <class Shape>
__device__ __forceinline__ typename Shape::T *query_tile(typename Shape::T *queries, int tile, int head) {
    return queries + (int64_t(tile) * Shape::heads + head) * kHeadElements<Shape>;
}

// A block for each (8 rows, key head).
template <class Shape>
__device__ __forceinline__ void attention_append(const float *qkv, const float *cos, const float *sin,
                                                 const int *positions, const int *page_table, typename Shape::T *kv,
                                                 typename Shape::T *queries) {
    constexpr int chunks = Shape::head_dim / 8, group = kGroup<Shape>;
    const int kv_head = blockIdx.x % Shape::kv_heads;
    const int row = blockIdx.x / Shape::kv_heads * kAppendRows + threadIdx.x % kAppendRows;
    wait_for_previous();
    let_next_start();
    const int at = row < Shape::rows ? positions[row] : -1;
    if (at < 0) return;
    const int page = page_table[row * Shape::pages + at / kPageTokens];
    for (int i = threadIdx.x / kAppendRows; i < (group + 2) * chunks; i += kAppendThreads / kAppendRows) {
        const int part = i / chunks, chunk = i % chunks;  // the group's query heads, then K, then V
        const bool is_query = part < group, is_value = part > group;
        const int head = is_query ? kv_head * group + part : Shape::heads + is_value * Shape::kv_heads + kv_head;
        const uint4 x = head_chunk<Shape>(qkv, cos, sin, row, head, chunk);
        typename Shape::T *to = page_head<Shape>(kv, page, kv_head) + is_value * kHeadElements<Shape>;
        int token = at % kPageTokens;
        if (is_query) to = query_tile<Shape>(queries, row / kTileRows, head), token = row % kTileRows;
        store_16(to + 8 * (chunk * kPageTokens + token), x);
    }
}

template <class Shape>
struct Tile {
    static constexpr int D = Shape::head_dim;
    static constexpr int tiles = (Shape::rows + kTileRows - 1) / kTileRows;
    static constexpr bool keeps_queries = Queries<Shape, kTileRows>::in_registers;
    static constexpr int stage = 2 * kHeadElements<Shape>;   // K and V of a page
    // Shared memory: stages, then the queries; where they are kept, they come by way of the last stage.
    static constexpr int queries_at = keeps_queries ? (Shape::stages - 1) * stage : Shape::stages * stage;
};

// Rows [begin, end) of a tile: one sequence at positions first … last.
struct Stretch {
    int begin, end, first, last;
};

// Its rows among [from, from + n).
__device__ __forceinline__ Stretch part_of(const Stretch &stretch, int from, int n) {
    const int begin = max(stretch.begin, from), end = min(stretch.end, from + n);
    return {begin, end, stretch.first + begin - stretch.begin, stretch.first + end - 1 - stretch.begin};
}

// The first page that any of its rows sees; the last is that of its last position.
template <class Shape>
__device__ __forceinline__ int first_page(const Stretch &rows) {
    return Shape::window ? max(rows.first - Shape::window + 1, 0) / kPageTokens : 0;
}

// Whether some row sees some token of the page; whether each of `n` rows sees all of them.
template <class Shape>
__device__ __forceinline__ bool sees_some(const Stretch &rows, int page) {
    return rows.begin < rows.end && page * kPageTokens <= rows.last && page >= first_page<Shape>(rows);
}
template <class Shape>
__device__ __forceinline__ bool sees_all(const Stretch &rows, int page, int n) {
    const int token = page * kPageTokens;
    return rows.end - rows.begin == n && token + kPageTokens - 1 <= rows.first &&
           (!Shape::window || token > rows.last - Shape::window);
}
template <class Shape>
__device__ __forceinline__ bool sees(const Stretch &rows, int row, int token) {
    const int at = rows.first + row - rows.begin;
    return row >= rows.begin && row < rows.end && token <= at && (!Shape::window || token > at - Shape::window);
}

// Asks for K and V of a page; zeros for tokens after the last, which may never have been written.
template <class Shape>
__device__ __forceinline__ void ask_page(typename Shape::T *stage, const typename Shape::T *from, int tokens) {
#pragma unroll 4
    for (int i = threadIdx.x; i < 2 * kHeadElements<Shape> / 8; i += kTileThreads)
        cp_async_16(stage + 8 * i, from + 8 * i, i % kPageTokens < tokens);
}

// One page in shared memory and this warp's 16 rows of a stretch.
template <class Shape>
__device__ __forceinline__ void attend_page(Gathered<Shape> &state, const Queries<Shape, kTileRows> &queries,
                                            const Stretch &stretch, int page, const typename Shape::T *keys) {
    const int row = 16 * warp_index();
    const Stretch rows = part_of(stretch, row, 16);
    if (!sees_some<Shape>(rows, page)) return;
    float s[kPageTokens / 8][4];
    score<Shape, kPageTokens, kPageTokens>(s, queries, keys);
    weigh<Shape, kPageTokens>(state, s, !sees_all<Shape>(rows, page, 16), [&](int half, int i) {
        return sees<Shape>(rows, row + lane_index() / 4 + 8 * half, page * kPageTokens + i);
    });
    add_values<Shape, kPageTokens, kPageTokens>(state, s, keys + kHeadElements<Shape>);
}

template <class Shape>
__device__ __forceinline__ void attend_stretch(Gathered<Shape> &state, const Queries<Shape, kTileRows> &queries,
                                               const Stretch &stretch, const int *pages,
                                               const typename Shape::T *kv, int kv_head, typename Shape::T *stages) {
    using S = Tile<Shape>;
    const auto ask = [&](int page) {
        if (page * kPageTokens <= stretch.last)
            ask_page<Shape>(stages + page % Shape::stages * S::stage,
                            page_head<Shape>(const_cast<typename Shape::T *>(kv), pages[page], kv_head),
                            stretch.last + 1 - page * kPageTokens);
        cp_async_commit();
    };
    const int begin = first_page<Shape>(stretch);
    if (Shape::stages > 1) ask(begin);
    for (int page = begin; page * kPageTokens <= stretch.last; page++) {
        ask(page + Shape::stages - 1);
        cp_async_wait<Shape::stages - 1>();
        __syncthreads();
        attend_page<Shape>(state, queries, stretch, page, stages + page % Shape::stages * S::stage);
        __syncthreads();
    }
}

template <class Shape>
__device__ __forceinline__ void write_rows(const Gathered<Shape> &state, const int *positions, int first_row, int head,
                                           typename Shape::Out *out) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = first_row + 16 * warp_index() + lane_index() / 4 + 8 * half;
        const float sum = row_sum(state.sum[half]);
        if (row >= Shape::rows) continue;
        const bool is_padding = positions[row] < 0;
        const float scale = is_padding ? 0.f : 1.f / sum;
#pragma unroll
        for (int j = 0; j < Shape::head_dim / 8; j++) {
            const float x[2] = {is_padding ? 0.f : state.o[j][2 * half] * scale,
                                is_padding ? 0.f : state.o[j][2 * half + 1] * scale};
            write_result<Shape>(out, row, head * Shape::head_dim + 8 * j + 2 * (lane_index() % 4), x);
        }
    }
}

// A block for each (tile, head), the last tiles first.
template <class Shape>
__device__ __forceinline__ void attention_tile(const typename Shape::T *queries, const int *positions,
                                               const int *page_table, const typename Shape::T *kv,
                                               typename Shape::Out *out) {
    using S = Tile<Shape>;
    using T = typename Shape::T;
    const int head = blockIdx.x % Shape::heads, tile = S::tiles - 1 - blockIdx.x / Shape::heads;
    const int first_row = tile * kTileRows, n = min(Shape::rows - first_row, kTileRows);
    T *stages = reinterpret_cast<T *>(dynamic_shared()), *q = stages + S::queries_at;
    const uint64_t joined = continued<Shape>(positions, page_table, first_row, n);
    wait_for_previous();
    let_next_start();

    const T *from = query_tile<Shape>(const_cast<T *>(queries), tile, head);
    for (int i = threadIdx.x; i < kHeadElements<Shape> / 8; i += kTileThreads) cp_async_16(q + 8 * i, from + 8 * i);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    Queries<Shape, kTileRows> rows;
    rows.load(q + 8 * 16 * warp_index());
    __syncthreads();

    Gathered<Shape> state;
    clear(state);
    for (Stretch stretch = {0, 0, 0, 0}; stretch.begin < n; stretch.begin = stretch.end) {
        stretch.first = positions[first_row + stretch.begin];
        stretch.end = stretch.begin + 1 + ones_up(joined, stretch.begin + 1);
        stretch.last = stretch.first + stretch.end - 1 - stretch.begin;
        if (stretch.first < 0) continue;
        attend_stretch<Shape>(state, rows, stretch, page_table + (first_row + stretch.end - 1) * Shape::pages, kv,
                              head / kGroup<Shape>, stages);
    }
    write_rows<Shape>(state, positions, first_row, head, out);
    if (head == Shape::heads - 1)
        for (int row = first_row; row < first_row + n; row++)
            write_zeros<Shape>(out, row, kColumns<Shape>, kPaddedColumns<Shape>, threadIdx.x, kTileThreads);
}
