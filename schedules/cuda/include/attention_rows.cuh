// Rows of large steps (prefill): their queries, their keys and values in the pages, and what they see of them.
//
// attention_append: eight rows of one key head and its group a block.
//     turn q and k by their positions, write k and v into the pages, and q as a page's K would lie:
//     queries [ceil(M/64)][heads][D/8][64 rows][8]
//     Bytes: (4 + 2) (H + 2 KH) D a row.
#pragma once

#include "attention.cuh"

constexpr int kAppendRows = 8;
constexpr int kAppendThreads = 128;
constexpr int kTileRows = 64;

// Queries of tile `tile` and head `head` [D/8][64][8].
template <class Shape>
__device__ __forceinline__ typename Shape::T *query_tile(typename Shape::T *queries, int tile, int head) {
    return queries + (int64_t(tile) * Shape::heads + head) * (kTileRows * Shape::head_dim);
}

// A block for each (8 rows, key head).
template <class Shape>
__device__ __forceinline__ void attention_append(const float *qkv, const float *cos, const float *sin,
                                                 const int *positions, const int *page_table, typename Shape::Kv *kv,
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

// Which rows of a block a lane has.
__device__ __forceinline__ int own_row(int half) { return 16 * warp_index() + lane_index() / 4 + 8 * half; }

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

// The tile's rows of the result; at: positions of the lane's two rows, or less than 0; unit: what o counts.
template <class Shape>
__device__ __forceinline__ void write_rows(const Gathered<Shape> &state, const int (&at)[2], int first_row, int head,
                                           typename Shape::Out *out, float unit = 1.f) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = first_row + own_row(half);
        const float sum = row_sum(state.sum[half]);
        if (row >= Shape::rows) continue;
        const bool is_padding = at[half] < 0;
        const float scale = is_padding ? 0.f : unit / sum;
#pragma unroll
        for (int j = 0; j < Shape::head_dim / 8; j++) {
            const float x[2] = {is_padding ? 0.f : state.o[j][2 * half] * scale,
                                is_padding ? 0.f : state.o[j][2 * half + 1] * scale};
            write_result<Shape>(out, row, head * Shape::head_dim + 8 * j + 2 * (lane_index() % 4), x);
        }
    }
}
