// What a block of attention_wgmma.cuh does one after the other, and what its threads tell each other by shared memory:
// a ring of pages between those that fetch and those that multiply, and which rows belong to one sequence.
#pragma once

#include "attention_rows.cuh"

#ifdef LLMC_HAS_BULK_COPY

template <class Shape>
struct Warpgroups {
    static constexpr int fetching = kCoded<Shape> ? 128 : 32;  // threads
    // Where registers change hands, they do from a whole warpgroup.
    static constexpr bool lends = Shape::groups > 1;
    static constexpr int threads = 128 * Shape::groups + (lends ? 128 : fetching), rows = kTileRows * Shape::groups;
    static constexpr int fetching_registers = Shape::groups > 2 ? 32 : kCoded<Shape> ? 88 : 40;
    static constexpr int registers = Shape::groups > 2 ? 160 : kCoded<Shape> ? 208 : 232;  // of those that multiply
    static constexpr int row_blocks = (Shape::rows + rows - 1) / rows;
    static constexpr int items = row_blocks * Shape::heads;
    // In shared memory: tokens from chunk to chunk of V, elements of K and of V, then of codes their scales.
    static constexpr int pitch = kPageTokens + Shape::pad;
    static constexpr int keys = kPageTokens * Shape::head_dim, values = pitch * Shape::head_dim;
    static constexpr int stage = keys + values + (kCoded<Shape> ? 4 * kPageTokens : 0);
    static constexpr int token_bytes = Shape::head_dim * int(sizeof(typename Shape::T));
};

// Rows of one query head. A block takes every so many-th, longest first, there and back again (0 1 2, 5 4 3, 6 7 8 …):
// so blocks have about as much to do each.
template <class Shape>
struct Item {
    int round = 0, head = 0, row_block = 0;

    // The first one, or the next; false: there is none.
    __device__ __forceinline__ bool next() {
        using W = Warpgroups<Shape>;
        const int blocks = gridDim.x, block = blockIdx.x;
        const int item = round * blocks + (round % 2 ? blocks - 1 - block : block);
        round++;
        head = item % Shape::heads, row_block = W::row_blocks - 1 - item / Shape::heads;
        return item < W::items;
    }
    __device__ __forceinline__ int first_row() const { return row_block * Warpgroups<Shape>::rows; }
    __device__ __forceinline__ int n_rows() const { return min(Shape::rows - first_row(), Warpgroups<Shape>::rows); }
};

// Of a text that is read whole and goes on behind an item's rows: how many rows there are of it.
template <class Shape, bool kWhole = kBothWays<Shape>>
struct TextBehind {};
template <class Shape>
struct TextBehind<Shape, true> {
    int behind;
};

// What is known of an item's rows: their positions, and which continue the row before (attention.cuh: continued).
template <class Shape>
struct Rows : TextBehind<Shape> {
    uint64_t joined[Shape::groups];
    int at[Warpgroups<Shape>::rows];
};

// For each page of the ring: its K, its V have come; all warps are done with it. For each of two items: its rows are
// known; all warps are done with them.
template <class Shape>
struct Ring {
    uint64_t keys[Shape::stages], values[Shape::stages], done[Shape::stages];
    uint64_t known[2], over[2];
    Rows<Shape> rows[2];
};

// Where a warp is in the ring.
template <class Shape>
struct Place {
    int stage = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void next() {
        stage++;
        if (stage == Shape::stages) stage = 0, parity ^= 1;
    }
};

// K and V of stage `stage`, and of codes their scales.
template <class Shape>
__device__ __forceinline__ typename Shape::T *stage_of(int stage) {
    return reinterpret_cast<typename Shape::T *>(dynamic_shared()) + stage * Warpgroups<Shape>::stage;
}

template <class Shape>
__device__ __forceinline__ float *stage_scales(int stage) {
    using W = Warpgroups<Shape>;
    return reinterpret_cast<float *>(stage_of<Shape>(stage) + W::keys + W::values);
}

// The ring's barriers; V in it as zeros, where whole tokens are left out.
template <class Shape>
__device__ __forceinline__ void prepare(Ring<Shape> &ring) {
    using W = Warpgroups<Shape>;
    for (int i = threadIdx.x; !kCoded<Shape> && i < Shape::stages * W::values / 8; i += W::threads) {
        const int stage = i / (W::values / 8), chunk = i % (W::values / 8);
        put_chunk(stage_of<Shape>(stage) + W::keys + 8 * chunk, make_uint4(0, 0, 0, 0));
    }
    fence_async_shared();
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < Shape::stages; stage++) {
            mbarrier_init(&ring.keys[stage], kCoded<Shape> ? W::fetching : 1);
            mbarrier_init(&ring.values[stage], kCoded<Shape> ? W::fetching : 1);
            mbarrier_init(&ring.done[stage], 4 * Shape::groups);
        }
        for (int i = 0; i < 2; i++) mbarrier_init(&ring.known[i], 32), mbarrier_init(&ring.over[i], 4 * Shape::groups + W::fetching / 32);
        fence_mbarrier_init();
    }
    __syncthreads();
}

// Looks at the rows of the round-th item, for all warps; by one warp, which first waits until they are done with those of
// two items ago. All positions are asked for at once, and then all pages.
template <class Shape>
__device__ __forceinline__ void look_at_rows(const int *positions, const int *page_table, const Item<Shape> &item,
                                             int round, Ring<Shape> &ring) {
    constexpr int n = 2 * Shape::groups;
    Rows<Shape> &rows = ring.rows[round % 2];
    int before[n], at[n];
    bool joined[n];
#pragma unroll
    for (int i = 0; i < n; i++) {
        const int row = item.first_row() + 32 * i + lane_index();
        at[i] = row < Shape::rows ? positions[row] : -1;
        before[i] = row > 0 && row < Shape::rows ? positions[row - 1] : -1;
    }
#pragma unroll
    for (int i = 0; i < n; i++) {
        const int row = item.first_row() + 32 * i + lane_index();
        joined[i] = before[i] >= 0 && at[i] == before[i] + 1 && same_sequence<Shape>(page_table, row, row - 1, before[i]);
    }
    int behind = 0;
    if constexpr (kBothWays<Shape>) {
        const int last_row = item.first_row() + item.n_rows() - 1, last = positions[last_row];
        if (last >= 0) behind = rows_behind<Shape>(positions, last_row, last);
    }
    mbarrier_wait(&ring.over[round % 2], round / 2 % 2 ^ 1);
    if constexpr (kBothWays<Shape>)
        if (lane_index() == 0) rows.behind = behind;
#pragma unroll
    for (int i = 0; i < n; i++) {
        const uint64_t bits = __ballot_sync(kAllLanes, joined[i]);
        rows.at[32 * i + lane_index()] = at[i];
        if (lane_index() == 0) reinterpret_cast<uint32_t *>(rows.joined)[i] = uint32_t(bits);
    }
    mbarrier_arrive(&ring.known[round % 2]);
}

// Calls visit(stretch) for each stretch of sequences' rows among the first n, in order.
template <class Shape, class Visit>
__device__ __forceinline__ void for_each_stretch(const Rows<Shape> &rows, int n, Visit visit) {
    for (Stretch stretch = {0, 0, 0, 0}; stretch.begin < n; stretch.begin = stretch.end) {
        stretch.end = stretch.begin + 1;
        for (int run = 1; run > 0 && stretch.end < n; stretch.end += run)
            run = ones_up(rows.joined[stretch.end / 64], stretch.end % 64);
        stretch.first = rows.at[stretch.begin];
        stretch.last = stretch.first + stretch.end - 1 - stretch.begin;
        if constexpr (kBothWays<Shape>)
            if (stretch.end == n) stretch.last += rows.behind;
        if (stretch.first >= 0) visit(stretch);
    }
}

#endif  // LLMC_HAS_BULK_COPY
