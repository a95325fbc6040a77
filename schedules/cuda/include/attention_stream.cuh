// Attention of small steps (decode) in one launch: rotary, append, attention over the pages, merge of its splits.
//
// A unit is one key head and up to 16 rows of the product: the queries of its group, for as many rows of the step as
// continue one sequence (one, when every row is another sequence's). A unit's pages are shared out among at most
// `splits` blocks, `least` pages or more each, by its length as it is now; blocks beyond that leave at once. In a block
// each of four warps takes 16 of a page's 64 tokens, which it streams through its own part of shared memory, K and V by
// turns, with `slots - 1` copies ahead of the product; nothing but the end needs the block's barrier.
//
//     warp w:  for page of my split:   s[16,16] = q k^T      k: tokens 16w .. 16w+15 of the page      D * 32 bytes
//                                      o[16,D] = o * keep + 2^(s - most) v                            D * 32 bytes
//     four warps, then the unit's splits -> out: merged in order, by the last block to finish.
//
// The keys of the step itself are not yet in the pages: the last split forms them from qkv, attends them as one more
// page, token i being row i of the step, and writes its own rows' into the pages. Whatever a page holds at their places
// is never read: copies put zeros there instead.
//
// Bytes: 4 D a token of context and key head in 2-byte T; operations: 4 D a token and query head. Memory is the limit.
//
// Beside what attention.cuh lists, Shape has:
//     splits      blocks that may share a unit
//     least       pages of each of them, where there are several
//     slots       copies of K or V (each 16 tokens a warp) that a block's shared memory holds
// `partial` and `counters` are read and written only where splits > 1; counters are zero before and after.
#pragma once

#include "attention.cuh"

constexpr int kStreamWarps = 4;
constexpr int kStreamThreads = 32 * kStreamWarps;
constexpr int kTokens = kPageTokens / kStreamWarps;  // of a page, for one warp

template <class Shape>
struct Stream {
    static constexpr int D = Shape::head_dim, group = kGroup<Shape>;
    static constexpr int head_tiles = (group + 15) / 16;                        // of 16 query heads of a group
    static constexpr int tile_heads = head_tiles > 1 ? 16 : group;
    static constexpr int unit_rows = 16 / tile_heads < Shape::rows ? 16 / tile_heads : Shape::rows;  // at most
    static constexpr int units = Shape::rows * Shape::kv_heads * head_tiles;
    static constexpr int queries = unit_rows * tile_heads;                      // rows of the product, at most 16
    static constexpr int fresh_rows = (Shape::rows + 15) / 16 * 16;
    static constexpr int per_lane = (Shape::rows + 31) / 32;                    // rows of the step
    static constexpr int block = kTokens * D;                                   // elements of K or V of 16 tokens

    // Shared memory: ring [warps][slots][D/8][16][8], queries [D/8][16][8], new keys [rows/16][K, V][D/8][16][8].
    // The ring then takes, of each warp, o [queries][D] and (most, sum) [queries], in float32.
    static constexpr int ring = kStreamWarps * Shape::slots * block;
};

// A unit as one block sees it.
struct Part {
    int row, count;        // its rows of the step
    int kv_head, head;     // its key head, its first query head
    int first, last;       // their positions
    int begin, end;        // pages of this split
    int split, splits;     // of those that have work
};

// The step's own rows that belong to the unit's sequence. Lane l knows of rows l and l + 32.
template <class Shape>
struct Fresh {
    int at[Stream<Shape>::per_lane];  // position, or -1: not of this sequence, or beyond its last row
    int least, n;
};

template <class Shape>
__device__ __forceinline__ Fresh<Shape> fresh_rows(const int *positions, const int *page_table, const Part &part) {
    Fresh<Shape> fresh;
    fresh.least = part.last, fresh.n = 0;
#pragma unroll
    for (int j = 0; j < Stream<Shape>::per_lane; j++) {
        const int row = 32 * j + lane_index();
        fresh.at[j] = -1;
        if (row < Shape::rows) {
            const int at = positions[row];
            if (at >= 0 && at <= part.last && same_sequence<Shape>(page_table, row, part.row + part.count - 1, at))
                fresh.at[j] = at;
        }
        fresh.n += __popc(__ballot_sync(kAllLanes, fresh.at[j] >= 0));
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

// The copies of one warp's tokens: entry 2i is K of page begin + i, entry 2i + 1 its V.
template <class Shape>
struct Copies {
    using T = typename Shape::T;
    T *slots;
    const T *kv;
    const int *pages;
    int next, n, slot;  // the entry to ask for, how many there are, where it goes

    __device__ __forceinline__ void ask(const Part &part, const Fresh<Shape> &fresh) {
        if (next < n) {
            const int page = part.begin + next / 2, token = lane_index() % kTokens;
            const int first = page * kPageTokens + kTokens * warp_index();
            const bool valid = cached_tokens<Shape>(fresh, part.last, first) >> token & 1;
            const T *from = page_head<Shape>(const_cast<T *>(kv), pages[page], part.kv_head) +
                            next % 2 * kHeadElements<Shape> + 8 * (kTokens * warp_index() + token);
            T *to = slots + slot * Stream<Shape>::block + 8 * token;
#pragma unroll
            for (int i = 0; i < Shape::head_dim / 16; i++) {
                const int chunk = 2 * i + lane_index() / kTokens;
                cp_async_16(to + chunk * kTokens * 8, from + chunk * kPageTokens * 8, valid);
            }
            next++;
            slot = slot + 1 == Shape::slots ? 0 : slot + 1;
        }
        cp_async_commit();
    }
};

// Which part of which unit this block has; false: none.
template <class Shape>
__device__ __forceinline__ bool find_unit(const int *positions, const int *page_table, Part &part) {
    using S = Stream<Shape>;
    const int unit = blockIdx.x % S::units;
    part.split = blockIdx.x / S::units;  // first splits first: those that leave at once come last
    part.row = unit / (Shape::kv_heads * S::head_tiles);
    part.kv_head = unit / S::head_tiles % Shape::kv_heads;
    part.head = part.kv_head * S::group + unit % S::head_tiles * S::tile_heads;
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

// Shares the pages out; false: nothing is left for this block.
template <class Shape>
__device__ __forceinline__ bool share_pages(const Fresh<Shape> &fresh, Part &part) {
    const int cached = fresh.least + fresh.n == part.last + 1 ? fresh.least : part.last + 1;
    const int begin = Shape::window ? max(part.first - Shape::window + 1, 0) / kPageTokens : 0;
    const int n = max((cached + kPageTokens - 1) / kPageTokens - begin, 0);
    part.splits = max(min(n / Shape::least, Shape::splits), 1);
    if (part.split >= part.splits) return false;
    part.begin = begin + n * part.split / part.splits;
    part.end = begin + n * (part.split + 1) / part.splits;
    return true;
}

// The unit's queries [D/8][16][8], zeros below them.
template <class Shape>
__device__ __forceinline__ void form_queries(const float *qkv, const float *cos, const float *sin, const Part &part,
                                             typename Shape::T *q) {
    using S = Stream<Shape>;
    constexpr int chunks = S::D / 8;
    for (int i = threadIdx.x; i < 16 * chunks; i += kStreamThreads) {
        const int query = i / chunks, chunk = i % chunks, row = query / S::tile_heads, head = query % S::tile_heads;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (row < part.count && (S::head_tiles == 1 || part.head + head < (part.kv_head + 1) * S::group))
            x = head_chunk<Shape>(qkv, cos, sin, part.row + row, part.head + head, chunk);
        put_chunk(q + 8 * (chunk * 16 + query), x);
    }
}

// K and V of the step's rows that are of this sequence, zeros for the others; and the unit's own into the pages.
// `at` [rows]: the positions, -1 for the others. The last warps begin: the first ones are still forming queries.
template <class Shape>
__device__ __forceinline__ void form_keys(const float *qkv, const float *cos, const float *sin, const int *page_table,
                                          const Part &part, const int *at, typename Shape::T *fresh,
                                          typename Shape::T *kv) {
    using S = Stream<Shape>;
    constexpr int chunks = S::D / 8;
    const bool writes = part.head == part.kv_head * S::group;
    for (int i = kStreamThreads - 1 - threadIdx.x; i < 2 * chunks * S::fresh_rows; i += kStreamThreads) {
        const int chunk = i % chunks, is_value = i / chunks % 2, row = i / (2 * chunks);
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
        put_chunk(fresh + (row / 16 * 2 + is_value) * S::block + 8 * (chunk * 16 + row % 16), x);
    }
}

// 16 keys of this warp, the lane's at positions key(0..15), negative: not there.
template <class Shape, class Key>
__device__ __forceinline__ void attend(Gathered<Shape> &state, const Part &part, float (&s)[2][4], bool masked,
                                       Key key) {
    constexpr int heads = Stream<Shape>::tile_heads;
    const int at[2] = {part.first + lane_index() / 4 / heads, part.first + (lane_index() / 4 + 8) / heads};
    weigh<Shape, kTokens>(state, s, masked, [&](int half, int i) {
        const int position = key(i);
        return position >= 0 && position <= at[half] && at[half] <= part.last &&
               (!Shape::window || position > at[half] - Shape::window);
    });
}

// This warp's tokens of the split's pages.
template <class Shape>
__device__ __forceinline__ void walk_pages(Gathered<Shape> &state, const Queries<Shape, 16> &q, const Part &part,
                                           const Fresh<Shape> &fresh, Copies<Shape> &copies) {
    using S = Stream<Shape>;
    int slot = 0;
    const auto arrived = [&] {
        cp_async_wait<Shape::slots - 1>();
        __syncwarp();
        const typename Shape::T *tokens = copies.slots + slot * S::block;
        slot = slot + 1 == Shape::slots ? 0 : slot + 1;
        return tokens;
    };
    for (int page = part.begin; page < part.end; page++) {
        const int first = page * kPageTokens + kTokens * warp_index();
        float s[2][4];
        score<Shape, kTokens, kTokens>(s, q, arrived());
        __syncwarp();
        copies.ask(part, fresh);
        const uint32_t cached = cached_tokens<Shape>(fresh, part.last, first);
        const bool masked = cached != 0xffff || first + kTokens - 1 > part.first ||
                            (Shape::window && first <= part.last - Shape::window);
        attend<Shape>(state, part, s, masked, [&](int i) { return cached >> i & 1 ? first + i : -1; });
        add_values<Shape, kTokens, kTokens>(state, s, arrived());
        __syncwarp();
        copies.ask(part, fresh);
    }
}

// The four warps' sums of column quad c (4 columns) of a query: x, and its (most, sum). Parts as in Stream's comment.
template <class Shape>
struct Merged {
    float x[4], most, sum;

    __device__ __forceinline__ Merged() : x{0.f, 0.f, 0.f, 0.f}, most(-INFINITY), sum(0.f) {}

    __device__ __forceinline__ void add(float4 o, float o_most, float o_sum) {
        constexpr float c = Shape::softcap > 0.f ? kLog2E : Shape::scale * kLog2E;
        const float top = fmaxf(most, o_most);
        if (top == -INFINITY) return;
        const float keep = exp2_approx((most - top) * c), take = exp2_approx((o_most - top) * c);
        x[0] = x[0] * keep + o.x * take, x[1] = x[1] * keep + o.y * take;
        x[2] = x[2] * keep + o.z * take, x[3] = x[3] * keep + o.w * take;
        sum = sum * keep + o_sum * take;
        most = top;
    }
};

// A finished column quad.
template <class Shape>
__device__ __forceinline__ void finish(typename Shape::Out *out, const Part &part, int query, int quad,
                                       const Merged<Shape> &merged) {
    constexpr int heads = Stream<Shape>::tile_heads;
    const float scale = 1.f / merged.sum;
    const float x[4] = {merged.x[0] * scale, merged.x[1] * scale, merged.x[2] * scale, merged.x[3] * scale};
    write_result<Shape>(out, part.row + query / heads, (part.head + query % heads) * Shape::head_dim + 4 * quad, x);
}

// Everything this warp gathered, to shared memory.
template <class Shape>
__device__ __forceinline__ void hand_over(const Gathered<Shape> &state, float *o, float2 *tops) {
    using S = Stream<Shape>;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int query = lane_index() / 4 + 8 * half, column = 2 * (lane_index() % 4);
        const float sum = row_sum(state.sum[half]);
        if (query < S::queries) {
            if (lane_index() % 4 == 0) tops[warp_index() * S::queries + query] = make_float2(state.most[half], sum);
            float *to = o + (warp_index() * S::queries + query) * S::D + column;
#pragma unroll
            for (int j = 0; j < S::D / 8; j++)
                *reinterpret_cast<float2 *>(to + 8 * j) = make_float2(state.o[j][2 * half], state.o[j][2 * half + 1]);
        }
    }
}

// Warps, then splits, merged in order. partial: o [units][splits][queries][D], (most, sum) [units][splits][queries].
template <class Shape>
__device__ __forceinline__ void merge(const Part &part, const float *o, const float2 *tops, typename Shape::Out *out,
                                      float *partial, uint32_t *counters) {
    using S = Stream<Shape>;
    constexpr int quads = S::D / 4;
    const int unit = blockIdx.x % S::units;
    float2 *partial_tops = reinterpret_cast<float2 *>(partial + S::units * Shape::splits * S::queries * S::D);
    const int tile_heads = S::head_tiles == 1 ? S::tile_heads
                                              : min(S::tile_heads, (part.kv_head + 1) * S::group - part.head);
    const int n = part.count * tile_heads * quads;
    for (int i = threadIdx.x; i < n; i += kStreamThreads) {
        const int query = i / quads, quad = i % quads;
        Merged<Shape> merged;
#pragma unroll
        for (int w = 0; w < kStreamWarps; w++) {
            const float2 top = tops[w * S::queries + query];
            merged.add(reinterpret_cast<const float4 *>(o)[(w * S::queries + query) * quads + quad], top.x, top.y);
        }
        if (part.splits == 1) {
            finish<Shape>(out, part, query, quad, merged);
            continue;
        }
        const int place = (unit * Shape::splits + part.split) * S::queries + query;
        reinterpret_cast<float4 *>(partial)[place * quads + quad] =
            make_float4(merged.x[0], merged.x[1], merged.x[2], merged.x[3]);
        if (quad == 0) partial_tops[place] = make_float2(merged.most, merged.sum);
    }
    if (part.splits == 1) return;

    __shared__ bool is_last;
    __syncthreads();
    if (threadIdx.x == 0) is_last = count_up(counters + unit) == uint32_t(part.splits - 1);
    __syncthreads();
    if (!is_last) return;
    for (int i = threadIdx.x; i < n; i += kStreamThreads) {
        const int query = i / quads, quad = i % quads;
        Merged<Shape> merged;
        for (int split = 0; split < part.splits; split++) {
            const int place = (unit * Shape::splits + split) * S::queries + query;
            const float2 top = partial_tops[place];
            merged.add(reinterpret_cast<const float4 *>(partial)[place * quads + quad], top.x, top.y);
        }
        finish<Shape>(out, part, query, quad, merged);
    }
    if (threadIdx.x == 0) counters[unit] = 0;
}

// qkv [M, (H + 2 KH) D], cos, sin [M, RD/2], positions [M], page_table [M, P], kv: this layer's part of page 0,
// out [M, H D], partial, counters [units]; a block for each (split, unit).
template <class Shape>
__device__ __forceinline__ void attention_stream(const float *qkv, const float *cos, const float *sin,
                                                 const int *positions, const int *page_table, typename Shape::T *kv,
                                                 typename Shape::Out *out, float *partial, uint32_t *counters) {
    using S = Stream<Shape>;
    using T = typename Shape::T;
    T *ring = reinterpret_cast<T *>(dynamic_shared()), *q = ring + S::ring, *new_keys = q + S::block;
    __shared__ int new_at[S::fresh_rows];

    // The step's inputs and the pages of earlier steps were there before the step began: no need to wait for them.
    Part part;
    if (!find_unit<Shape>(positions, page_table, part)) return;
    if (part.first < 0) {  // a row that pads the step
        if (part.split || part.head % kGroup<Shape>) return;
        wait_for_previous();
        const bool is_end = part.kv_head == Shape::kv_heads - 1;
        const int from = part.kv_head * S::group * S::D;
        write_zeros<Shape>(out, part.row, from, is_end ? kPaddedColumns<Shape> : from + S::group * S::D, threadIdx.x,
                           kStreamThreads);
        return;
    }
    const Fresh<Shape> fresh = fresh_rows<Shape>(positions, page_table, part);
    if (!share_pages<Shape>(fresh, part)) return;
    Copies<Shape> copies = {ring + warp_index() * Shape::slots * S::block, kv,
                            page_table + (part.row + part.count - 1) * Shape::pages, 0, 2 * (part.end - part.begin), 0};
#pragma unroll
    for (int i = 0; i < Shape::slots; i++) copies.ask(part, fresh);
    let_next_start();
    if (warp_index() == 0) {
#pragma unroll
        for (int j = 0; j < S::per_lane; j++)
            if (32 * j + lane_index() < S::fresh_rows) new_at[32 * j + lane_index()] = fresh.at[j];
    }
    __syncthreads();
    wait_for_previous();

    const bool has_new = part.split == part.splits - 1;
    form_queries<Shape>(qkv, cos, sin, part, q);
    if (has_new) form_keys<Shape>(qkv, cos, sin, page_table, part, new_at, new_keys, kv);
    __syncthreads();

    Queries<Shape, 16> queries;
    queries.load(q);
    Gathered<Shape> state;
    clear(state);
    walk_pages<Shape>(state, queries, part, fresh, copies);
    if (has_new && 16 * warp_index() < Shape::rows) {
        const T *keys = new_keys + 2 * warp_index() * S::block;
        float s[2][4];
        score<Shape, kTokens, kTokens>(s, queries, keys);
        attend<Shape>(state, part, s, true, [&](int i) { return new_at[16 * warp_index() + i]; });
        add_values<Shape, kTokens, kTokens>(state, s, keys + S::block);
    }

    __syncthreads();
    float *o = reinterpret_cast<float *>(ring);
    float2 *tops = reinterpret_cast<float2 *>(q);
    hand_over<Shape>(state, o, tops);
    __syncthreads();
    merge<Shape>(part, o, tops, out, partial, counters);
    if (part.split == 0 && part.head + S::tile_heads >= Shape::heads)
        for (int row = part.row; row < part.row + part.count; row++)
            write_zeros<Shape>(out, row, kColumns<Shape>, kPaddedColumns<Shape>, threadIdx.x, kStreamThreads);
}
