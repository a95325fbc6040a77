// Attention of small steps (decode) in one launch: rotary, append, attention over the pages, merge of its splits.
//
// A unit is one key head and up to 16 rows of the product: the queries of its group, for as many rows of the step as
// continue one sequence (one, when every row is another sequence's). A unit's pages are shared out among at most
// `splits` teams of `team` warps of a block, `least` pages or more each, by its length as it is now; teams beyond that
// leave at once. A team's warps take 16 tokens at a time by turns, which each streams through its own part of shared
// memory, K and V by turns, with `slots - 1` copies ahead of the product; nothing but the end needs the team's barrier.
//
//     warp w of W:  for chunk w, w + W … of my split:   s[16,16] = q k^T      k: 16 tokens                D * 32 bytes
//                                                       o[16,D] = o * keep + 2^(s - most) v              D * 32 bytes
//     the team's warps, then the unit's splits -> out: merged in order, by the last team to finish.
//
// Few units take teams of four, so that each is short. Where there are more units than warps of a block find room at
// once, each has a warp for itself: nothing waits for other warps, what begins and ends a unit (its row's positions and
// pages, queries, new keys, result) is done once a warp, not once in each of four, and all units are under way together
// instead of in rounds.
//
// The keys of the step itself are not yet in the pages: the last split forms them from qkv, attends them like more
// tokens, 16 rows of the step at a time if any is of this sequence, and writes its own rows' into the pages. Whatever a
// page holds at their places is never read: copies put zeros there instead.
//
// Bytes: 4 D a token of context and key head in 2-byte T, 2 (D + 4) in int8; operations: 4 D a token and query head.
// Memory is the limit.
//
// Beside what attention.cuh lists, Shape has:
//     team        warps that share a unit, or a split of it: 4, 2 or 1
//     splits      teams that may share a unit
//     least       pages of each of them, where there are several
//     slots       copies of K or V (each 16 tokens a warp) that a block's shared memory holds
//     resident    blocks that share a multiprocessor
// and, where it has them (attention_unit.cuh):
//     together    times 16 tokens that a warp takes at once
//     ahead       copies beyond the slots that are asked for, to L2, before queries are there
// `partial` and `counters` are read and written only where splits > 1; counters are zero before and after.
#pragma once

#include "attention_copies.cuh"
#include "attention_fresh.cuh"
#include "attention_merge.cuh"

// kKeys keys of this warp, the lane's at positions key(0..kKeys-1), negative: not there. is_first: o is still zeros.
template <class Shape, int kKeys, class Key>
__device__ __forceinline__ void attend(Gathered<Shape> &state, const Part &part, float (&s)[kKeys / 8][4], bool masked,
                                       bool is_first, Key key) {
    constexpr int heads = Stream<Shape>::tile_heads;
    const int at[2] = {part.first + lane_index() / 4 / heads, part.first + (lane_index() / 4 + 8) / heads};
    float keep[2];
    const auto sees = [&](int half, int i) {
        const int position = key(i);
        return position >= 0 && position <= at[half] && at[half] <= part.last &&
               (!Shape::window || position > at[half] - sight<Shape>(at[half]));
    };
    if constexpr (kHasSlopes<Shape>) {
        const auto distance = [&](int half, int n, int i) { return key(8 * n + 2 * (lane_index() % 4) + i) - at[half]; };
        weigh_scores<Shape, kKeys>(state, s, keep, masked, sees, biased_by<Shape>(state, distance));
    } else {
        weigh_scores<Shape, kKeys>(state, s, keep, masked, sees);
    }
    if (!is_first) keep_sums(state, keep);
}

// A block keeps its queries in registers, unless so many share a multiprocessor that there are too few.
template <class Shape>
using StreamQueries = Queries<Shape, 16, Shape::head_dim <= 128 && Shape::resident < 4>;

// s[16,16] = q k^T of a chunk. Where a warp has registers for it, every other product goes to sums of its own: each of a
// sum's products waits for the one before, and with few warps nothing else is there to do.
template <class Shape>
__device__ __forceinline__ void score_chunk(float (&s)[2][4], const StreamQueries<Shape> &q,
                                            const typename Shape::Kv *keys) {
    if constexpr (kCoded<Shape> || !StreamQueries<Shape>::in_registers) {
        score<Shape, kTokens, kTokens>(s, q, keys);
    } else {
        const int matrix = lane_index() / 8;
        float odd[2][4];
#pragma unroll
        for (int i = 0; i < 4; i++) s[0][i] = s[1][i] = odd[0][i] = odd[1][i] = 0.f;
#pragma unroll
        for (int i = 0; i < Shape::head_dim / 16; i++) {
            uint32_t a[4], k[4];
            q.step(a, i);
            ldmatrix_x4(k, keys + 8 * ((2 * i + matrix % 2) * kTokens + matrix / 2 * 8 + lane_index() % 8));
            mma_16816<typename Shape::T>(i % 2 ? odd[0] : s[0], a, {k[0], k[1]});
            mma_16816<typename Shape::T>(i % 2 ? odd[1] : s[1], a, {k[2], k[3]});
        }
#pragma unroll
        for (int i = 0; i < 4; i++) s[0][i] += odd[0][i], s[1][i] += odd[1][i];
    }
}

// Scores, then weights, of chunk u of those taken together.
template <int kChunks>
__device__ __forceinline__ float (&chunk_of(float (&s)[2 * kChunks][4], int u))[2][4] {
    return reinterpret_cast<float(&)[2][4]>(s[2 * u]);
}

// This warp's tokens of the split's pages.
template <class Shape>
__device__ __forceinline__ void walk_pages(Gathered<Shape> &state, const StreamQueries<Shape> &q, const Part &part,
                                           const Fresh<Shape> &fresh, Copies<Shape> &copies) {
    using S = Stream<Shape>;
    constexpr int n = kTogether<Shape>, further = kTokens * S::team;  // from a chunk to the warp's next
    constexpr uint32_t all = 0xffffffffu >> (32 - kTokens * n);
    int slot = 0;
    const auto arrived = [&] {
        const typename Shape::Kv *tokens = copies.slots + slot * S::block;
        slot = slot + 1 == Shape::slots ? 0 : slot + 1;
        return tokens;
    };
    const auto wait = [&] {
        cp_async_wait<Shape::slots - n>();
        __syncwarp();
    };
    const auto ask = [&] {
        __syncwarp();
#pragma unroll
        for (int u = 0; u < n; u++) copies.ask(part, fresh);
    };
    for (int i = 0; 2 * i < copies.n; i += n) {
        const int first = chunk_first<Shape>(part, i);
        float s[2 * n][4];
        wait();
#pragma unroll
        for (int u = 0; u < n; u++) score_chunk<Shape>(chunk_of<n>(s, u), q, arrived());
        ask();
        uint32_t cached = 0;
#pragma unroll
        for (int u = 0; u < n; u++)
            if (copies.is_there(i + u)) cached |= cached_tokens<Shape>(fresh, part.last, first + u * further) << kTokens * u;
        const bool masked = cached != all || first + (n - 1) * further + kTokens - 1 > part.first ||
                            (Shape::window && first <= part.last - sight<Shape>(part.last));
        attend<Shape, kTokens * n>(state, part, s, masked, i == 0, [&](int key) {
            return cached >> key & 1 ? first + key % kTokens + key / kTokens * further : -1;
        });
        wait();
#pragma unroll
        for (int u = 0; u < n; u++) add_values<Shape, kTokens, kTokens>(state, chunk_of<n>(s, u), arrived());
        ask();
    }
}

// Positions of the step's rows, for all warps of the team; by its first.
template <class Shape>
__device__ __forceinline__ void put_positions(int *new_at, const Fresh<Shape> &fresh) {
    using S = Stream<Shape>;
#pragma unroll
    for (int j = 0; j < S::per_lane; j++)
        if (32 * j + lane_index() < 16 * S::fresh_groups) new_at[32 * j + lane_index()] = fresh.at[j];
}

// 16 rows of the step as keys and values, at positions `at`.
template <class Shape>
__device__ __forceinline__ void attend_fresh(Gathered<Shape> &state, const StreamQueries<Shape> &q, const Part &part,
                                             const typename Shape::Kv *keys, const int *at) {
    float s[2][4];
    score_chunk<Shape>(s, q, keys);
    attend<Shape, kTokens>(state, part, s, true, false, [&](int i) { return at[i]; });
    add_values<Shape, kTokens, kTokens>(state, s, keys + Stream<Shape>::block);
}

// The result of a row that pads the step: zeros, by the teams of each group's first heads.
template <class Shape>
__device__ __forceinline__ void write_padding(const Part &part, typename Shape::Out *out) {
    using S = Stream<Shape>;
    if (part.split || part.head % kGroup<Shape>) return;
    wait_for_previous();
    const bool is_end = part.kv_head == Shape::kv_heads - 1;
    const int from = part.kv_head * S::group * S::D;
    write_zeros<Shape>(out, part.row, from, is_end ? kPaddedColumns<Shape> : from + S::group * S::D,
                       team_thread<Shape>(), S::threads);
}

// The columns by which a tiled result is padded, by the team of the last heads.
template <class Shape>
__device__ __forceinline__ void write_end(const Part &part, typename Shape::Out *out) {
    using S = Stream<Shape>;
    if (part.split == 0 && part.head + S::tile_heads >= Shape::heads)
        for (int row = part.row; row < part.row + part.count; row++)
            write_zeros<Shape>(out, row, kColumns<Shape>, kPaddedColumns<Shape>, team_thread<Shape>(), S::threads);
}

// qkv [M, (H + 2 KH) D], cos, sin [M, RD/2], positions [M], page_table [M, P], kv: this layer's part of page 0,
// out [M, H D], partial, counters [units]; a team for each (split, unit).
//
// Positions and page tables are on the GPU when the step's graph is launched (the host has waited for the copy), or are
// copied in front of it in its stream; no kernel writes them, and what is copied while the graph runs goes to the other
// half of the input. Earlier steps wrote their pages in graphs before it. The graph's first kernel waits for all of
// that, and each other one begins after blocks of the one before it have begun: so they may be read before the wait.
// What this step's own kernels write (qkv; cos and sin, which are gathered) may not: only the wait says that those have
// ended. The launch behind begins when all blocks here have, so it takes no room away from them.
template <class Shape>
__device__ __forceinline__ void attention_stream(HeadRows<Shape> qkv, const float *cos, const float *sin,
                                                 const int *positions, const int *page_table, typename Shape::Kv *kv,
                                                 typename Shape::Out *out, float *partial, uint32_t *counters,
                                                 const float *sinks = nullptr, const float *slopes = nullptr) {
    using S = Stream<Shape>;
    using T = typename Shape::T;
    using Kv = typename Shape::Kv;
    __shared__ int all_new_at[S::teams][16 * S::fresh_groups];
    __shared__ float all_own_scores[S::teams][16];
    const int team = team_index<Shape>();
    Kv *ring = reinterpret_cast<Kv *>(dynamic_shared());
    T *q = reinterpret_cast<T *>(ring + S::ring);
    unsigned char *news = reinterpret_cast<unsigned char *>(q + S::teams * 16 * S::D) + team * S::new_bytes;
    ring += team * S::team * Shape::slots * S::block, q += team * 16 * S::D;
    float *own = reinterpret_cast<float *>(news), *own_scores = all_own_scores[team];
    Kv *new_keys = S::team == 1 ? ring : reinterpret_cast<Kv *>(news);
    int *new_at = all_new_at[team];

    let_next_start();
    const int early = first_pages<Shape>(page_table);
    Part part;
    prefetch_norms<Shape>(qkv);
    prefetch_sinks<Shape>(sinks);
    if (!find_unit<Shape>(positions, page_table, part)) return;
    if ((part.first < 0) | is_no_page(early)) return write_padding<Shape>(part, out);
    const Fresh<Shape> fresh = fresh_rows<Shape>(positions, page_table, part);
    if (!share_pages<Shape>(fresh, part)) return;
    Copies<Shape> copies = begin_copies<Shape>(ring, kv, page_table, part, fresh);
    const bool is_last = part.split == part.splits - 1, is_alone = Shape::rows == 1 || fresh.n == 1;
    uint32_t groups = is_last && !is_alone ? fresh.groups : 0;  // of new rows, not yet attended
    if (!is_last || !is_alone) own = nullptr;
    Kv *page = own ? own_page<Shape>(kv, page_table, part) : nullptr;
    clear_queries<Shape>(q);
    Gathered<Shape> state;
    clear(state);
    if constexpr (kCoded<Shape>) clear_unit(state);
    if constexpr (kHasSlopes<Shape>) {
        const auto head = [&](int query) { return min(part.head + query % S::tile_heads, Shape::heads - 1); };
        read_slopes<Shape>(state, slopes, head(lane_index() / 4), head(lane_index() / 4 + 8));
    }
    if (groups && team_warp<Shape>() == 0) put_positions<Shape>(new_at, fresh);
    team_barrier<Shape>();
    wait_for_previous();

    const auto form_group = [&] {
        form_fresh<Shape>(qkv, cos, sin, page_table, part, 16 * (__ffs(groups) - 1), new_at, new_keys, kv);
    };
    form_vectors<Shape>(qkv, cos, sin, part, q, own, page);
    if (S::team > 1 && groups) form_group();
    team_barrier<Shape>();  // queries are there

    StreamQueries<Shape> queries;
    queries.load(q);
    if (own) score_own<Shape>(q, own, part, own_scores);
    walk_pages<Shape>(state, queries, part, fresh, copies);
    for (bool formed = S::team > 1; groups; groups &= groups - 1, formed = false) {
        if (!formed && (S::team == 1 || S::fresh_groups > 1)) {
            team_barrier<Shape>();  // all has been attended that was there
            form_group();
            team_barrier<Shape>();  // 16 new keys are there
        }
        const int group = __ffs(groups) - 1;
        if (team_warp<Shape>() == group % S::team)
            attend_fresh<Shape>(state, queries, part, new_keys, new_at + 16 * group);
    }
    team_barrier<Shape>();
    float *o = reinterpret_cast<float *>(ring);
    float2 *tops = reinterpret_cast<float2 *>(q);
    hand_over<Shape>(state, part, o, tops);
    team_barrier<Shape>();  // sums are there
    merge<Shape>(part, o, tops, own ? own + S::D : nullptr, own_scores, out, partial, counters, sinks);
    write_end<Shape>(part, out);
}
