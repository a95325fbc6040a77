// Rows of large steps (prefill): their queries, their keys and values in the pages, and what they see of them.
//
// attention_append: eight rows of up to 16 heads a block; a thread has 16 elements of several heads of one row, that
// are turned by the same angles, which it reads once.
//     turn q and k by their positions, write k and v into the pages, and q as a page's K would lie:
//     queries [ceil(M/64)][heads][D/8][64 rows][8]
//     Bytes: (4 or 2 + 2) (H + 2 KH) D a row.
//
// qkv is float32, or rounded to T already and tiled (tiles.cuh). What is not turned is the same numbers then; what is
// has been rounded twice, which the compiler does not ask for (compiler/bind.py: attended_values).
//
// Beside what attention.cuh lists, Shape has:
//     Qkv     element of qkv: float, or T
#pragma once

#include "attention_sinks.cuh"
#include "attention_texts.cuh"
#include "attention_turn.cuh"
#include "tiles.cuh"

constexpr int kAppendRows = 8;
constexpr int kAppendThreads = 128;
constexpr int kAppendHeads = 16;
constexpr int kAppendAhead = 4;  // heads of a thread that are asked for together

// A row of qkv.
template <class Q>
struct QkvRow;

template <>
struct QkvRow<float> {
    struct Chunk {
        uint4 low, high;
    };
    const float *from;

    __device__ __forceinline__ QkvRow(const float *qkv, int row, int, int columns)
        : from(qkv + int64_t(row) * columns) {}
    // Eight elements from a column on that is a multiple of 8: as they lie, and as numbers.
    __device__ __forceinline__ Chunk load(int column) const { return {load_16(from + column), load_16(from + column + 4)}; }
    __device__ static __forceinline__ Eight numbers(const Chunk &chunk) {
        Eight x;
        *reinterpret_cast<uint4 *>(x.at) = chunk.low;
        *reinterpret_cast<uint4 *>(x.at + 4) = chunk.high;
        return x;
    }
    __device__ __forceinline__ float operator[](int column) const { return from[column]; }
};

template <class Q>
struct QkvRow {
    using Chunk = uint4;
    const Q *from;
    int row, m_padded;

    __device__ __forceinline__ QkvRow(const Q *qkv, int row, int m, int)
        : from(qkv), row(row), m_padded(round_up(m, 8)) {}
    __device__ __forceinline__ Chunk load(int column) const {
        return load_16(from + activation_index(m_padded, row, column));
    }
    __device__ static __forceinline__ Eight numbers(const Chunk &chunk) { return unpack_eight<Q>(chunk); }
    __device__ __forceinline__ float operator[](int column) const {
        return to_float(from[activation_index(m_padded, row, column)]);
    }
};

// A block for each (8 rows, 16 heads of qkv).
template <class Shape>
__device__ __forceinline__ void attention_append(const typename Shape::Qkv *qkv, const float *cos, const float *sin,
                                                 const int *positions, const int *page_table, typename Shape::Kv *kv,
                                                 typename Shape::T *queries) {
    using T = typename Shape::T;
    using Row = QkvRow<typename Shape::Qkv>;
    constexpr int D = Shape::head_dim, units = D / 16, at_once = kAppendThreads / kAppendRows / units;
    constexpr int n_heads = Shape::heads + 2 * Shape::kv_heads, parts = ceil_div(n_heads, kAppendHeads);
    const int lane = threadIdx.x / kAppendRows, row = blockIdx.x / parts * kAppendRows + threadIdx.x % kAppendRows;
    const int first = blockIdx.x % parts * kAppendHeads, end = min(first + kAppendHeads, n_heads);
    const int at = row < Shape::rows && lane < at_once * units ? positions[row] : -1;
    const int page = at >= 0 ? page_table[row * Shape::pages + at / kPageTokens] : 0;
    wait_for_previous();
    let_next_start();
    if (at < 0) return;
    const Turn<Shape> turn(cos, sin, row, lane % units);
    const Row from(qkv, row, Shape::rows, kRowColumns<Shape>);
    for (int base = first + lane / units; base < end; base += at_once * kAppendAhead) {
        typename Row::Chunk raw[kAppendAhead][2];
#pragma unroll
        for (int i = 0; i < kAppendAhead; i++)
#pragma unroll
            for (int j = 0; j < 2; j++)
                if (base + i * at_once < end) raw[i][j] = from.load((base + i * at_once) * D + 8 * turn.chunk[j]);
#pragma unroll
        for (int i = 0; i < kAppendAhead; i++) {
            const int head = base + i * at_once, kv_head = head - Shape::heads;
            if (head >= end) break;
            Eight x[2] = {Row::numbers(raw[i][0]), Row::numbers(raw[i][1])};
            if (kv_head < Shape::kv_heads) turn.apply(x, [&](int d) { return from[head * D + d]; });
            T *to;
            if (kv_head < 0)
                to = query_tile<Shape>(queries, row / kTileRows, head) + 8 * (row % kTileRows);
            else
                to = page_head<Shape>(kv, page, kv_head % Shape::kv_heads) + 8 * (at % kPageTokens) +
                     kv_head / Shape::kv_heads * kHeadElements<Shape>;
#pragma unroll
            for (int j = 0; j < 2; j++) store_16(to + 8 * kPageTokens * turn.chunk[j], pack_eight<T>(x[j]));
        }
    }
}

// Which rows of a block a lane has.
__device__ __forceinline__ int own_row(int half) { return 16 * warp_index() + lane_index() / 4 + 8 * half; }

// Rows [begin, end) of a tile: one sequence at positions first … last; of a text that is read whole `last` is its end.
struct Stretch {
    int begin, end, first, last;
};

// Its rows among [from, from + n).
template <class Shape>
__device__ __forceinline__ Stretch part_of(const Stretch &stretch, int from, int n) {
    const int begin = max(stretch.begin, from), end = min(stretch.end, from + n);
    if constexpr (kBothWays<Shape>) return {begin, end, stretch.first + begin - stretch.begin, stretch.last};
    else return {begin, end, stretch.first + begin - stretch.begin, stretch.first + end - 1 - stretch.begin};
}

// The position of its last row; the last one that any of its rows sees, and the first page.
template <class Shape>
__device__ __forceinline__ int last_position(const Stretch &rows) {
    return kBothWays<Shape> ? rows.first + rows.end - 1 - rows.begin : rows.last;
}
template <class Shape>
__device__ __forceinline__ int last_seen(const Stretch &rows) {
    return last_in_sight<Shape>(last_position<Shape>(rows), rows.last);
}
template <class Shape>
__device__ __forceinline__ int first_page(const Stretch &rows) {
    return Shape::window ? max(rows.first - sight<Shape>(rows.first) + 1, 0) / kPageTokens : 0;
}

// Whether some row sees some token of the page; whether each of `n` rows sees all of them.
template <class Shape>
__device__ __forceinline__ bool sees_some(const Stretch &rows, int page) {
    return rows.begin < rows.end && page * kPageTokens <= last_seen<Shape>(rows) && page >= first_page<Shape>(rows);
}
template <class Shape>
__device__ __forceinline__ bool sees_all(const Stretch &rows, int page, int n) {
    const int token = page * kPageTokens;
    if constexpr (kBothWays<Shape>)
        return rows.end - rows.begin == n && token + kPageTokens - 1 <= last_in_sight<Shape>(rows.first, rows.last) &&
               (!Shape::window || token > last_position<Shape>(rows) - Shape::window);
    else
        return rows.end - rows.begin == n && token + kPageTokens - 1 <= rows.first &&
               (!Shape::window || token > rows.last - sight<Shape>(rows.last));
}
template <class Shape>
__device__ __forceinline__ bool sees(const Stretch &rows, int row, int token) {
    const int at = rows.first + row - rows.begin;
    if constexpr (kBothWays<Shape>)
        return row >= rows.begin && row < rows.end && token <= last_in_sight<Shape>(at, rows.last) &&
               (!Shape::window || token > at - Shape::window);
    else
        return row >= rows.begin && row < rows.end && token <= at && (!Shape::window || token > at - sight<Shape>(at));
}

// What is added to the scores of a page, for the lane's rows `row` and row + 8 of the block.
template <class Shape>
__device__ __forceinline__ typename BiasOfKeys<Shape>::type page_bias(const typename HeadSlopes<Shape>::OfRows &slopes,
                                                                      const Stretch &rows, int row, int page) {
    const int at = rows.first + row - rows.begin;
    return {slopes, page * kPageTokens, at, at + 8};
}

// Word i of lane t goes to word t of lane i, for each four lanes of a warp.
__device__ __forceinline__ void turn_words(uint32_t (&words)[4]) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
        const bool high = lane_index() & bit;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & bit) continue;
            const uint32_t other = __shfl_xor_sync(kAllLanes, high ? words[i] : words[i + bit], bit);
            words[i] = high ? other : words[i], words[i + bit] = high ? words[i + bit] : other;
        }
    }
}

// The tile's rows of the result; at: positions of the lane's two rows, or less than 0; unit: what o counts.
// A tiled result leaves in chunks of 16 bytes, of which each of four lanes has two elements.
template <class Shape>
__device__ __forceinline__ void write_rows(const Gathered<Shape> &state, const int (&at)[2], int first_row, int head,
                                           typename Shape::Out *out, float unit, const float *sinks) {
    constexpr int D = Shape::head_dim, whole = Shape::tiled ? D / 32 * 4 : 0;  // chunks that leave so
    const int t = lane_index() % 4, column = head * D;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = first_row + own_row(half);
        const float sum = row_sum(state.sum[half]);
        const bool is_padding = at[half] < 0, is_there = row < Shape::rows;
        const float scale = is_padding ? 0.f : inverse_sum<Shape>(state.most[half], sum, sinks, head, unit);
        const auto value = [&](int j, int i) { return is_padding ? 0.f : state.o[j][2 * half + i] * scale; };
        if constexpr (whole > 0) {
#pragma unroll
            for (int j = 0; j < whole; j += 4) {
                uint32_t words[4];
#pragma unroll
                for (int i = 0; i < 4; i++) words[i] = pack2<typename Shape::Out>(value(j + i, 0), value(j + i, 1));
                turn_words(words);
                if (is_there)
                    store_16(tiled_place<Shape>(out, row, column + 8 * (j + t)),
                             make_uint4(words[0], words[1], words[2], words[3]));
            }
        }
#pragma unroll
        for (int j = whole; j < D / 8; j++) {
            const float x[2] = {value(j, 0), value(j, 1)};
            if (is_there) write_result<Shape>(out, row, column + 8 * j + 2 * t, x);
        }
    }
}
