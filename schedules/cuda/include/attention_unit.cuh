// What a block of attention_stream.cuh has to do: its rows and heads of a small step, its pages, and which of their tokens
// are there.
#pragma once

#include "attention.cuh"

constexpr int kStreamWarps = 4;
constexpr int kStreamThreads = 32 * kStreamWarps;
constexpr int kTokens = 16;  // of a page, for one warp at a time

// Where Shape says them: times 16 tokens that a warp takes at once, 1 or 2, and copies beyond the slots that are asked for
// early.
template <class Shape, class = void>
constexpr int kTogether = 1;
template <class Shape>
constexpr int kTogether<Shape, decltype(void(Shape::together))> = Shape::together;
template <class Shape, class = void>
constexpr int kAhead = 0;
template <class Shape>
constexpr int kAhead<Shape, decltype(void(Shape::ahead))> = Shape::ahead;

template <class Shape>
struct Stream {
    static constexpr int D = Shape::head_dim, group = kGroup<Shape>;
    static constexpr int team = Shape::team, threads = 32 * team;               // that share a unit
    static constexpr int teams = kStreamWarps / team;                           // of a block
    static constexpr int head_tiles = (group + 15) / 16;                        // of 16 query heads of a group
    static constexpr int tile_heads = head_tiles > 1 ? 16 : group;
    static constexpr int unit_rows = 16 / tile_heads < Shape::rows ? 16 / tile_heads : Shape::rows;  // at most
    static constexpr int units = Shape::rows * Shape::kv_heads * head_tiles;
    static constexpr int queries = unit_rows * tile_heads;                      // rows of the product, at most 16
    static constexpr int fresh_groups = (Shape::rows + 15) / 16;                // of 16 rows of the step
    static constexpr int per_lane = (Shape::rows + 31) / 32;                    // rows of the step
    static constexpr int block = kTokens * kTokenElements<Shape>;               // of Kv: K or V of 16 tokens

    // Shared memory: ring [warps][slots] of blocks, queries [teams][D/8][16][8], and [teams] new keys and values: a row's
    // own [K, V][D] in float32, or those of 16 rows [K, V] in blocks, which a warp that has a unit for itself puts into
    // its ring, behind the pages. A block is [D/8][16][8] of T, or [D/16][16][16] codes and [16] scales.
    // The ring then takes, of each warp, o [queries][D], and the queries' place (most, sum) [queries], in float32.
    static constexpr int ring = kStreamWarps * Shape::slots * block;
    static constexpr int own_bytes = 2 * 4 * D;
    static constexpr bool many_new = team > 1 && Shape::rows > 1;  // a row that is the step's only one has no neighbours
    static constexpr int new_bytes = many_new ? 2 * block * int(sizeof(typename Shape::Kv)) : own_bytes;
    static_assert(new_bytes >= own_bytes, "a row's own key and value find room");
    static_assert(ring * int(sizeof(typename Shape::Kv)) >= 4 * kStreamWarps * queries * D, "o finds room");
    static_assert(team > 1 || Shape::slots >= 2, "new keys and values find room");
};

// This thread's team in the block, its warp in the team, and its place among the team's threads; asked by whole warps.
template <class Shape>
__device__ __forceinline__ int team_index() {
    return Stream<Shape>::teams == 1 ? 0 : warp_index() / Stream<Shape>::team;
}
template <class Shape>
__device__ __forceinline__ int team_warp() {
    return Stream<Shape>::team == 1 ? 0 : warp_index() % Stream<Shape>::team;
}
template <class Shape>
__device__ __forceinline__ int team_thread() {
    return threadIdx.x % Stream<Shape>::threads;
}

// The team's threads meet; other teams of the block may have left.
template <class Shape>
__device__ __forceinline__ void team_barrier() {
    if constexpr (Stream<Shape>::team == 1) {
        __syncwarp();
    } else if constexpr (Stream<Shape>::teams == 1) {
        __syncthreads();
    } else {
        named_barrier(1 + team_index<Shape>(), Stream<Shape>::threads);
    }
}

// A unit as one team sees it.
struct Part {
    int unit;
    int row, count;        // its rows of the step
    int kv_head, head;     // its key head, its first query head
    int first, last;       // their positions
    int begin, n_chunks;   // first page of this split, and how many times 16 tokens to look at from there on
    int split, splits;     // of those that have work
};

// Its query heads.
template <class Shape>
__device__ __forceinline__ int heads_of(const Part &part) {
    using S = Stream<Shape>;
    return S::head_tiles == 1 ? S::tile_heads : min(S::tile_heads, (part.kv_head + 1) * S::group - part.head);
}

// The step's own rows that belong to the unit's sequence. Lane l knows of rows l and l + 32.
template <class Shape>
struct Fresh {
    int at[Stream<Shape>::per_lane];  // position, or -1: not of this sequence, or beyond its last row
    int least, n;
    uint32_t groups;  // bit g: some of rows 16 g … 16 g + 15 of the step
};

template <class Shape>
__device__ __forceinline__ Fresh<Shape> fresh_rows(const int *positions, const int *page_table, const Part &part) {
    Fresh<Shape> fresh;
    if constexpr (Shape::rows == 1) return {{lane_index() ? -1 : part.last}, part.last, 1, 1};
    fresh.least = part.last, fresh.n = 0, fresh.groups = 0;
#pragma unroll
    for (int j = 0; j < Stream<Shape>::per_lane; j++) {
        const int row = 32 * j + lane_index();
        fresh.at[j] = -1;
        if (row < Shape::rows) {
            const int at = positions[row];
            if (at >= 0 && at <= part.last && same_sequence<Shape>(page_table, row, part.row + part.count - 1, at))
                fresh.at[j] = at;
        }
        const uint32_t here = __ballot_sync(kAllLanes, fresh.at[j] >= 0);
        fresh.n += __popc(here), fresh.groups |= (bool(here & 0xffff) | bool(here >> 16) << 1) << 2 * j;
        int least = fresh.at[j] >= 0 ? fresh.at[j] : part.last;
        for (int offset = 16; offset > 0; offset /= 2) least = min(least, __shfl_xor_sync(kAllLanes, least, offset));
        fresh.least = min(fresh.least, least);
    }
    return fresh;
}

// Bit t: the pages hold token first + t, t < 16, and some row of the unit may look at it.
template <class Shape>
__device__ __forceinline__ uint32_t cached_tokens(const Fresh<Shape> &fresh, int last, int first) {
    if (first + kTokens <= fresh.least) return 0xffff;
    if constexpr (Shape::rows == 1) return (1u << max(last - first, 0)) - 1;  // all but its own
    uint32_t mine = 0;
#pragma unroll
    for (int j = 0; j < Stream<Shape>::per_lane; j++) {
        const int t = fresh.at[j] - first;
        if (fresh.at[j] >= 0 && t >= 0 && t < kTokens) mine |= 1u << t;
    }
    for (int offset = 16; offset > 0; offset /= 2) mine |= __shfl_xor_sync(kAllLanes, mine, offset);
    const int n = min(max(last + 1 - first, 0), kTokens);
    return ((1u << n) - 1) & ~mine;
}

// Of each of the step's rows, up to 32, its first page, in a lane: asked for while positions come. What is looked up behind
// those, one after the other, is in the same lines of the page tables, and then in L1. It must decide something together
// with a position, or the compiler would not ask for it, or later: is_no_page() does, which is of none. Whole warps call.
template <class Shape>
__device__ __forceinline__ int first_pages(const int *page_table) {
    return page_table[min(lane_index(), Shape::rows - 1) * Shape::pages];
}
__device__ __forceinline__ bool is_no_page(int page) { return __all_sync(kAllLanes, page == -0x7fffffff); }

// Which part of which unit this team has; false: none.
template <class Shape>
__device__ __forceinline__ bool find_unit(const int *positions, const int *page_table, Part &part) {
    using S = Stream<Shape>;
    constexpr int blocks = (S::units + S::teams - 1) / S::teams;  // for each split
    part.unit = blockIdx.x % blocks * S::teams + team_index<Shape>();
    if (S::units % S::teams && part.unit >= S::units) return false;
    part.split = blockIdx.x / blocks;  // first splits first: those that leave at once come last
    part.row = part.unit / (Shape::kv_heads * S::head_tiles);
    part.kv_head = part.unit / S::head_tiles % Shape::kv_heads;
    part.head = part.kv_head * S::group + part.unit % S::head_tiles * S::tile_heads;
    part.count = 1;
    if constexpr (S::unit_rows > 1) {
        const uint64_t joined = continued<Shape>(positions, page_table, 0, Shape::rows);
        if (ones_down(joined, part.row) % S::unit_rows) return false;  // an earlier row's unit has it
        part.count = min(1 + ones_up(joined, part.row + 1), S::unit_rows);
    }
    part.first = positions[part.row];
    part.last = part.first + part.count - 1;
    return true;
}

// Shares the pages out; false: nothing is left for this team.
template <class Shape>
__device__ __forceinline__ bool share_pages(const Fresh<Shape> &fresh, Part &part) {
    const int cached = fresh.least + fresh.n == part.last + 1 ? fresh.least : part.last + 1;
    const int begin = Shape::window ? max(part.first - sight<Shape>(part.first) + 1, 0) / kPageTokens : 0;
    const int n = max((cached + kPageTokens - 1) / kPageTokens - begin, 0);
    part.splits = max(min(n / Shape::least, Shape::splits), 1);
    if (part.split >= part.splits) return false;
    part.begin = begin + n * part.split / part.splits;
    const int end = begin + n * (part.split + 1) / part.splits;
    part.n_chunks = max((min(end * kPageTokens, cached) + kTokens - 1) / kTokens - part.begin * (kPageTokens / kTokens), 0);
    return true;
}
