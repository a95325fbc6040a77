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
// `partial` and `counters` are read and written only where splits > 1; counters are zero before and after.
#pragma once

#include "attention_codes.cuh"
#include "attention_unit.cuh"

// A lane's part of 16 tokens' codes of K or V, from a page's token `first` on to shared memory: that of `token`, every
// other chunk; zeros if not `valid`. Two chunks on a token lies 4 places away (chunk_place), four chunks on at the same
// place.
template <class Shape>
__device__ __forceinline__ void copy_codes(uint8_t *to, const uint8_t *page, int first, int token, bool valid) {
    constexpr int D = Shape::head_dim;
    const int upper = lane_index() / kTokens;
    const int to_place = chunk_place<kTokens>(token / 8 * 8, token % 8, upper);
    const int from_place = chunk_place<kPageTokens>(first + token / 8 * 8, token % 8, upper);
    uint8_t *const to_by_parity[2] = {to + to_place, to + (to_place ^ 4 * 16)};
    const uint8_t *const from_by_parity[2] = {page + from_place, page + (from_place ^ 4 * 16)};
#pragma unroll
    for (int i = 0; i < (D + 16) / 32; i++)
        if (D % 32 == 0 || 2 * i + upper < D / 16)
            cp_async_16(to_by_parity[i % 2] + 2 * i * kTokens * 16, from_by_parity[i % 2] + 2 * i * kPageTokens * 16,
                        valid);
    if (!upper)
        cp_async_4(scales_of<Shape, kTokens>(to) + token, scales_of<Shape, kPageTokens>(page) + first + token, valid);
}

// Of a warp's i-th chunk, its first token.
template <class Shape>
__device__ __forceinline__ int chunk_first(const Part &part, int i) {
    return part.begin * kPageTokens + kTokens * (team_warp<Shape>() + Stream<Shape>::team * i);
}

// The copies of one warp's tokens: entry 2i is K of its i-th chunk, entry 2i + 1 its V.
template <class Shape>
struct Copies {
    using Kv = typename Shape::Kv;
    Kv *slots;
    const Kv *kv;
    const int *pages;
    int next, n, slot;  // the entry to ask for, how many there are, where it goes

    __device__ __forceinline__ void ask(const Part &part, const Fresh<Shape> &fresh) {
        if (next < n) {
            const int first = chunk_first<Shape>(part, next / 2), token = lane_index() % kTokens;
            const bool valid = cached_tokens<Shape>(fresh, part.last, first) >> token & 1;
            const Kv *from = page_head<Shape>(const_cast<Kv *>(kv), pages[first / kPageTokens], part.kv_head) +
                             next % 2 * kHeadElements<Shape>;
            Kv *to = slots + slot * Stream<Shape>::block;
            if constexpr (kCoded<Shape>) {
                copy_codes<Shape>(to, from, first % kPageTokens, token, valid);
            } else {
                from += 8 * (first % kPageTokens + token), to += 8 * token;
#pragma unroll
                for (int i = 0; i < Shape::head_dim / 16; i++) {
                    const int chunk = 2 * i + lane_index() / kTokens;
                    cp_async_16(to + chunk * kTokens * 8, from + chunk * kPageTokens * 8, valid);
                }
            }
            next++;
            slot = slot + 1 == Shape::slots ? 0 : slot + 1;
        }
        cp_async_commit();
    }
};

// The unit's queries [D/8][16][8], zeros below them.
template <class Shape>
__device__ __forceinline__ void form_queries(const float *qkv, const float *cos, const float *sin, const Part &part,
                                             typename Shape::T *q) {
    using S = Stream<Shape>;
    constexpr int chunks = S::D / 8;
    for (int i = team_thread<Shape>(); i < 16 * chunks; i += S::threads) {
        const int query = i / chunks, chunk = i % chunks, row = query / S::tile_heads, head = query % S::tile_heads;
        uint4 x = make_uint4(0, 0, 0, 0);
        const bool is_here = row < part.count && (S::head_tiles == 1 || part.head + head < (part.kv_head + 1) * S::group);
        if constexpr (kCoded<Shape>) {
            if (is_here) x = pack_query(head_eight<Shape>(qkv, cos, sin, part.row + row, part.head + head, chunk));
            put_query<Shape>(q, query, chunk, x);
        } else {
            if (is_here) x = head_chunk<Shape>(qkv, cos, sin, part.row + row, part.head + head, chunk);
            put_chunk(q + 8 * (chunk * 16 + query), x);
        }
    }
}

// K and V of 16 rows of the step, from `first` on: zeros for those of other sequences; and the unit's own into the
// pages. `at` [rows]: the positions, -1 for the others. The last warps begin: the first ones are still forming queries.
template <class Shape>
__device__ __forceinline__ void form_keys(const float *qkv, const float *cos, const float *sin, const int *page_table,
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

// The same in int8: vectors of a row and K or V, each by lanes of one warp.
template <class Shape>
__device__ __forceinline__ void form_codes(const float *qkv, const float *cos, const float *sin, const int *page_table,
                                           const Part &part, int first, const int *at, uint8_t *fresh, uint8_t *kv) {
    using S = Stream<Shape>;
    constexpr int lanes = kVectorLanes<Shape>;
    const bool writes = part.head == part.kv_head * S::group;
    const int chunk = threadIdx.x % lanes;
    for (int i = (S::threads - 1 - team_thread<Shape>()) / lanes; i < 2 * 16; i += S::threads / lanes) {
        const int is_value = i % 2, row = first + i / 2;
        const bool is_here = at[row] >= 0, has_chunk = chunk < S::D / 8;
        Eight x = {};
        if (is_here && has_chunk) {
            const int head = Shape::heads + is_value * Shape::kv_heads + part.kv_head;
            x = head_eight<Shape>(qkv, cos, sin, row, head, chunk);
        }
        const Codes codes = quantise<lanes>(x);
        if (!has_chunk) continue;
        if (is_here && writes && row >= part.row && row < part.row + part.count) {
            const int page = page_table[row * Shape::pages + at[row] / kPageTokens];
            put_codes<Shape, kPageTokens>(page_head<Shape>(kv, page, part.kv_head) + is_value * kHeadElements<Shape>,
                                          at[row] % kPageTokens, chunk, codes);
        }
        put_codes<Shape, 16>(fresh + is_value * S::block, row % 16, chunk, codes);
    }
}

// The new keys and values of 16 rows, in either form.
template <class Shape>
__device__ __forceinline__ void form_fresh(const float *qkv, const float *cos, const float *sin, const int *page_table,
                                           const Part &part, int first, const int *at, typename Shape::Kv *fresh,
                                           typename Shape::Kv *kv) {
    if constexpr (kCoded<Shape>)
        form_codes<Shape>(qkv, cos, sin, page_table, part, first, at, fresh, kv);
    else
        form_keys<Shape>(qkv, cos, sin, page_table, part, first, at, fresh, kv);
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

// A block keeps its queries in registers, unless so many share a multiprocessor that there are too few.
template <class Shape>
using StreamQueries = Queries<Shape, 16, Shape::head_dim <= 128 && Shape::resident < 4>;

// Chunks that this warp takes.
template <class Shape>
__device__ __forceinline__ int chunks_of(const Part &part) {
    return (part.n_chunks + Stream<Shape>::team - 1 - team_warp<Shape>()) / Stream<Shape>::team;
}

// This warp's tokens of the split's pages.
template <class Shape>
__device__ __forceinline__ void walk_pages(Gathered<Shape> &state, const StreamQueries<Shape> &q, const Part &part,
                                           const Fresh<Shape> &fresh, Copies<Shape> &copies) {
    using S = Stream<Shape>;
    int slot = 0;
    const auto arrived = [&] {
        cp_async_wait<Shape::slots - 1>();
        __syncwarp();
        const typename Shape::Kv *tokens = copies.slots + slot * S::block;
        slot = slot + 1 == Shape::slots ? 0 : slot + 1;
        return tokens;
    };
    for (int i = 0; 2 * i < copies.n; i++) {
        const int first = chunk_first<Shape>(part, i);
        float s[2][4];
        score<Shape, kTokens, kTokens>(s, q, arrived());
        __syncwarp();
        copies.ask(part, fresh);
        const uint32_t cached = cached_tokens<Shape>(fresh, part.last, first);
        const bool masked = cached != 0xffff || first + kTokens - 1 > part.first ||
                            (Shape::window && first <= part.last - Shape::window);
        attend<Shape>(state, part, s, masked, [&](int key) { return cached >> key & 1 ? first + key : -1; });
        add_values<Shape, kTokens, kTokens>(state, s, arrived());
        __syncwarp();
        copies.ask(part, fresh);
    }
}

// Warps' sums of column quad c (4 columns) of a query: x, and its (most, sum). Parts as in Stream's comment.
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

// Everything this warp gathered for the unit's queries, to shared memory.
template <class Shape>
__device__ __forceinline__ void hand_over(const Gathered<Shape> &state, const Part &part, float *o, float2 *tops) {
    using S = Stream<Shape>;
    const int warp = team_warp<Shape>(), n = part.count * S::tile_heads;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int query = lane_index() / 4 + 8 * half, first = kCoded<Shape> ? 0 : 2 * (lane_index() % 4);
        const float sum = row_sum(state.sum[half]);
        if (query < n) {
            if (lane_index() % 4 == 0) tops[warp * S::queries + query] = make_float2(state.most[half], sum);
            float *to = o + (warp * S::queries + query) * S::D + first;
#pragma unroll
            for (int j = 0; j < S::D / 8; j++) {
                if constexpr (kCoded<Shape>) {
                    const Column mine = column<Shape>(j);
                    to[mine.at] = state.o[j][2 * half] * value_unit(state);
                    to[mine.at + mine.codes] = state.o[j][2 * half + 1] * value_unit(state);
                } else {
                    *reinterpret_cast<float2 *>(to + 8 * j) = make_float2(state.o[j][2 * half], state.o[j][2 * half + 1]);
                }
            }
        }
    }
}

// Warps, then splits, merged in order. partial: o [units][splits][queries][D], (most, sum) [units][splits][queries].
template <class Shape>
__device__ __forceinline__ void merge(const Part &part, const float *o, const float2 *tops, typename Shape::Out *out,
                                      float *partial, uint32_t *counters, int team) {
    using S = Stream<Shape>;
    constexpr int quads = S::D / 4;
    float2 *partial_tops = reinterpret_cast<float2 *>(partial + S::units * Shape::splits * S::queries * S::D);
    const int tile_heads = S::head_tiles == 1 ? S::tile_heads
                                              : min(S::tile_heads, (part.kv_head + 1) * S::group - part.head);
    const int n = part.count * tile_heads * quads;
    for (int i = team_thread<Shape>(); i < n; i += S::threads) {
        const int query = i / quads, quad = i % quads;
        Merged<Shape> merged;
#pragma unroll
        for (int w = 0; w < S::team; w++) {
            const float2 top = tops[w * S::queries + query];
            merged.add(reinterpret_cast<const float4 *>(o)[(w * S::queries + query) * quads + quad], top.x, top.y);
        }
        if (part.splits == 1) {
            finish<Shape>(out, part, query, quad, merged);
            continue;
        }
        const int place = (part.unit * Shape::splits + part.split) * S::queries + query;
        reinterpret_cast<float4 *>(partial)[place * quads + quad] =
            make_float4(merged.x[0], merged.x[1], merged.x[2], merged.x[3]);
        if (quad == 0) partial_tops[place] = make_float2(merged.most, merged.sum);
    }
    if (part.splits == 1) return;

    __shared__ int is_last[S::teams];
    team_barrier<Shape>();
    if (team_thread<Shape>() == 0)
        is_last[team] = count_up(counters + part.unit) == uint32_t(part.splits - 1);
    team_barrier<Shape>();
    if (!is_last[team]) return;
    for (int i = team_thread<Shape>(); i < n; i += S::threads) {
        const int query = i / quads, quad = i % quads;
        Merged<Shape> merged;
        for (int split = 0; split < part.splits; split++) {
            const int place = (part.unit * Shape::splits + split) * S::queries + query;
            const float2 top = partial_tops[place];
            merged.add(reinterpret_cast<const float4 *>(partial)[place * quads + quad], top.x, top.y);
        }
        finish<Shape>(out, part, query, quad, merged);
    }
    if (team_thread<Shape>() == 0) counters[part.unit] = 0;
}

// qkv [M, (H + 2 KH) D], cos, sin [M, RD/2], positions [M], page_table [M, P], kv: this layer's part of page 0,
// out [M, H D], partial, counters [units]; a team for each (split, unit).
template <class Shape>
__device__ __forceinline__ void attention_stream(const float *qkv, const float *cos, const float *sin,
                                                 const int *positions, const int *page_table, typename Shape::Kv *kv,
                                                 typename Shape::Out *out, float *partial, uint32_t *counters) {
    using S = Stream<Shape>;
    using T = typename Shape::T;
    using Kv = typename Shape::Kv;
    const int team = team_index<Shape>();
    Kv *ring = reinterpret_cast<Kv *>(dynamic_shared());
    T *q = reinterpret_cast<T *>(ring + S::ring) + team * 16 * S::D;
    ring += team * S::team * Shape::slots * S::block;
    Kv *new_keys = ring;
    if constexpr (S::team > 1)
        new_keys = reinterpret_cast<Kv *>(q + (S::teams - team) * 16 * S::D) + team * 2 * S::block;
    __shared__ int all_new_at[S::teams][16 * S::fresh_groups];
    int *new_at = all_new_at[team];

    // The step's inputs and the pages of earlier steps were there before the step began: no need to wait for them.
    Part part;
    if (!find_unit<Shape>(positions, page_table, part)) return;
    if (part.first < 0) {  // a row that pads the step
        if (part.split || part.head % kGroup<Shape>) return;
        wait_for_previous();
        const bool is_end = part.kv_head == Shape::kv_heads - 1;
        const int from = part.kv_head * S::group * S::D;
        write_zeros<Shape>(out, part.row, from, is_end ? kPaddedColumns<Shape> : from + S::group * S::D,
                           team_thread<Shape>(), S::threads);
        return;
    }
    const Fresh<Shape> fresh = fresh_rows<Shape>(positions, page_table, part);
    if (!share_pages<Shape>(fresh, part)) return;
    Copies<Shape> copies = {ring + team_warp<Shape>() * Shape::slots * S::block, kv,
                            page_table + (part.row + part.count - 1) * Shape::pages, 0, 2 * chunks_of<Shape>(part), 0};
#pragma unroll 1
    for (int i = 0; i < Shape::slots; i++) copies.ask(part, fresh);
    let_next_start();
    if (team_warp<Shape>() == 0) {
#pragma unroll
        for (int j = 0; j < S::per_lane; j++)
            if (32 * j + lane_index() < 16 * S::fresh_groups) new_at[32 * j + lane_index()] = fresh.at[j];
    }
    team_barrier<Shape>();
    wait_for_previous();

    uint32_t groups = part.split == part.splits - 1 ? fresh.groups : 0;  // of new rows, not yet attended
    form_queries<Shape>(qkv, cos, sin, part, q);
    StreamQueries<Shape> queries;
    Gathered<Shape> state;
    const auto walk = [&] {
        queries.load(q);
        clear(state);
        if constexpr (kCoded<Shape>) clear_unit(state);
        walk_pages<Shape>(state, queries, part, fresh, copies);
    };
    if constexpr (S::team == 1) {
        team_barrier<Shape>();
        walk();
    }
    for (bool walked = S::team == 1;; walked = true) {
        const int group = __ffs(groups) - 1;
        if (groups) form_fresh<Shape>(qkv, cos, sin, page_table, part, 16 * group, new_at, new_keys, kv);
        team_barrier<Shape>();
        if constexpr (S::team > 1)
            if (!walked) walk();
        if (groups && team_warp<Shape>() == group % S::team) {
            float s[2][4];
            score<Shape, kTokens, kTokens>(s, queries, new_keys);
            attend<Shape>(state, part, s, true, [&](int i) { return new_at[16 * group + i]; });
            add_values<Shape, kTokens, kTokens>(state, s, new_keys + S::block);
        }
        team_barrier<Shape>();  // all has been attended that was there
        groups &= groups - 1;
        if (!groups) break;
    }

    float *o = reinterpret_cast<float *>(ring);
    float2 *tops = reinterpret_cast<float2 *>(q);
    hand_over<Shape>(state, part, o, tops);
    team_barrier<Shape>();
    merge<Shape>(part, o, tops, out, partial, counters, team);
    if (part.split == 0 && part.head + S::tile_heads >= Shape::heads)
        for (int row = part.row; row < part.row + part.count; row++)
            write_zeros<Shape>(out, row, kColumns<Shape>, kPaddedColumns<Shape>, team_thread<Shape>(), S::threads);
}
