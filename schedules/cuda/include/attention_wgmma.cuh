// Attention of large steps on Hopper: attention_tile's work with bulk copies and the products of warpgroups.
//
// A block is `groups` warpgroups, each with 64 rows of one query head, and one more warp that fetches the pages they
// share into a ring of `stages` pages. It takes several items (rows and heads) one after the other, so that the ring
// holds the next one's first pages when one ends.
//
//     warpgroup:  q[64,D] stays in registers
//                 for page:  s[64,64] = q K^T            K [D/8][64][8], k contiguous         D/16 products of N = 64
//                            o[64,D] = o * keep + p V    V [D/8][64][8], n contiguous            4 of N = D
//
// The tensor cores take 4 D clocks for a page and 64 rows, the units of 2^x 256, all else of a page's scores starts some
// 200 instructions in each of the four schedulers. So that the first are never idle: a warpgroup asks for a page's scores
// before it asks for p V of the page before, and weighs the scores while that is multiplied; and warpgroups ask in turn,
// so that one multiplies while another weighs. A warpgroup skips a page that none of its rows sees.
//
// In shared memory chunks of V are `pad` tokens more than a page apart: eight chunks of one token, as the product may
// read them, then lie in different banks, as do eight tokens of one chunk.
//
// V of a page that is not full comes with its valid tokens only: what was never written could be NaN, and 0 * NaN is
// NaN. (K may: such scores are masked.) So the ring's V begins as zeros.
//
// Of codes, the page goes through the registers of a warpgroup that does nothing else (attention_widen_ring.cuh).
//
// Beside what attention.cuh lists, Shape has:
//     stages      pages in shared memory, at least 2: a page's V is used after the next one's K
//     groups      warpgroups with rows
//     pad         tokens
//     in_turn     whether warpgroups take turns
#pragma once

#include "attention_widen_ring.cuh"

#ifdef LLMC_HAS_WGMMA

// K of a page and V of its valid tokens. A copy wants what is known to be the same in all lanes.
template <class Shape>
__device__ __forceinline__ void fetch_page(const typename Shape::Kv *from, int tokens, const Place<Shape> &place,
                                           Ring<Shape> &ring) {
    using W = Warpgroups<Shape>;
    const int stage = __shfl_sync(kAllLanes, place.stage, 0), n = min(tokens, kPageTokens);
    typename Shape::T *to = stage_of<Shape>(stage);
    mbarrier_wait(&ring.done[stage], place.parity ^ 1);
    if (elect_one()) {
        mbarrier_arrive_expect(&ring.keys[stage], kPageTokens * W::token_bytes);
        bulk_copy(to, from, kPageTokens * W::token_bytes, &ring.keys[stage]);
        to += W::keys, from += kHeadElements<Shape>;
        mbarrier_arrive_expect(&ring.values[stage], n * W::token_bytes);
        if (Shape::pad == 0 && n == kPageTokens) {
            bulk_copy(to, from, kPageTokens * W::token_bytes, &ring.values[stage]);
        } else {
#pragma unroll
            for (int chunk = 0; chunk < Shape::head_dim / 8; chunk++)
                bulk_copy(to + chunk * W::pitch * 8, from + chunk * kPageTokens * 8, n * 16, &ring.values[stage]);
        }
    }
    __syncwarp();
}

// Fetches the pages of all of the block's items.
template <class Shape>
__device__ __forceinline__ void fetch_all(const int *positions, const int *page_table, const typename Shape::Kv *kv,
                                          Ring<Shape> &ring) {
    using Kv = typename Shape::Kv;
    const int thread = threadIdx.x - 128 * Shape::groups;
    Place<Shape> place;
    for (Item<Shape> item; item.next();) {
        const int round = item.round - 1, kv_head = __shfl_sync(kAllLanes, item.head / kGroup<Shape>, 0);
        if (warp_index() == 4 * Shape::groups) look_at_rows<Shape>(positions, page_table, item, round, ring);
        if (round == 0) wait_for_previous(), let_next_start();
        mbarrier_wait(&ring.known[round % 2], round / 2 % 2);
        for_each_stretch<Shape>(ring.rows[round % 2], item.n_rows(), [&](const Stretch &stretch) {
            const int *pages = page_table + (item.first_row() + stretch.end - 1) * Shape::pages;
            for (int page = first_page<Shape>(stretch); page * kPageTokens <= last_seen<Shape>(stretch); page++, place.next()) {
                const int at = __shfl_sync(kAllLanes, pages[page], 0);
                const auto *from = page_head<Shape>(const_cast<Kv *>(kv), at, kv_head);
                const int tokens = __shfl_sync(kAllLanes, last_seen<Shape>(stretch) + 1 - page * kPageTokens, 0);
                if constexpr (kCoded<Shape>)
                    widen_page<Shape>(from, tokens, place, ring, thread);
                else
                    fetch_page<Shape>(from, tokens, place, ring);
            }
        });
        __syncwarp();
        if (lane_index() == 0) mbarrier_arrive(&ring.over[round % 2]);
    }
}

// Warpgroups ask for products in turn, once for each page of their block.
template <class Shape>
struct Turns {
    static constexpr bool any = Shape::in_turn && Shape::groups > 1;
    int group;

    __device__ __forceinline__ void begin() const {
        if (any && group == Shape::groups - 1) named_barrier_arrive(1, 256);
    }
    __device__ __forceinline__ void take() const {
        if (any) named_barrier(1 + group, 256);
    }
    __device__ __forceinline__ void pass() const {
        if (any) named_barrier_arrive(1 + (group + 1) % Shape::groups, 256);
    }
    __device__ __forceinline__ void end() const {
        if (any && group == 0) named_barrier(1, 256);
    }
};

// A warpgroup's 64 rows of an item.
template <class Shape>
struct Consumer {
    using T = typename Shape::T;
    using W = Warpgroups<Shape>;
    static constexpr int D = Shape::head_dim;
    static constexpr int key_chunk = 16 * kPageTokens, value_chunk = 16 * W::pitch, eight = 128;  // bytes to the next
    static constexpr int stage_bytes = W::stage * int(sizeof(T));
    const uint64_t first_keys = plain_descriptor(stage_of<Shape>(0), key_chunk, eight);
    const uint64_t first_values = plain_descriptor(stage_of<Shape>(0) + W::keys, eight, value_chunk);
    Gathered<Shape> state;
    uint32_t q[D / 16][4], p[kPageTokens / 16][4];
    float s[kPageTokens / 8][4];
    Place<Shape> place;
    Turns<Shape> turns;
    int row;  // the first of the lane's two in the block

    __device__ __forceinline__ float (&scores())[kPageTokens / 2] {
        return reinterpret_cast<float(&)[kPageTokens / 2]>(s);
    }
    __device__ __forceinline__ float (&sums())[D / 2] { return reinterpret_cast<float(&)[D / 2]>(state.o); }

    // Registers of a warp's 16 rows, from [D/8][64][8] in global memory: 128 bytes in a row each time.
    __device__ __forceinline__ void read_queries(const T *tile) {
        const int row = 16 * (warp_index() % 4) + lane_index() / 4;
#pragma unroll
        for (int i = 0; i < D / 16; i++)
#pragma unroll
            for (int r = 0; r < 4; r++)
                q[i][r] = *reinterpret_cast<const uint32_t *>(
                    tile + ((2 * i + r / 2) * kTileRows + row + r % 2 * 8) * 8 + 2 * (lane_index() % 4));
    }

    // K and V of a stage as products see them. To be asked for before the turn: it takes a while.
    __device__ __forceinline__ uint64_t keys_of(int stage) const { return further(first_keys, stage * stage_bytes); }
    __device__ __forceinline__ uint64_t values_of(int stage) const { return further(first_values, stage * stage_bytes); }

    // s = q K^T begins.
    __device__ __forceinline__ void ask_scores(uint64_t keys) {
        wgmma_fence(scores());
#pragma unroll
        for (int i = 0; i < D / 16; i++) wgmma<kPageTokens, T>(scores(), q[i], further(keys, i * 2 * key_chunk), i > 0);
        wgmma_commit();
    }

    // o += p V begins.
    __device__ __forceinline__ void ask_sums(uint64_t values) {
        wgmma_fence(sums());
#pragma unroll
        for (int n = 0; n < kPageTokens / 16; n++) wgmma<D, T, true>(sums(), p[n], further(values, n * 2 * eight));
        wgmma_commit();
    }

    // Scores -> weights. `keep`: of o.
    __device__ __forceinline__ void weigh_page(const Stretch &rows, int page, float (&keep)[2]) {
        if constexpr (kCoded<Shape>) scale_scores<kPageTokens>(s, stage_scales<Shape>(place.stage));
        weigh_scores<Shape, kPageTokens>(
            state, s, keep, !sees_all<Shape>(rows, page, kTileRows),
            [&](int half, int i) { return sees<Shape>(rows, row + 8 * half, page * kPageTokens + i); },
            page_bias<Shape>(state, rows, row, page));
    }

    // Weights -> p, and o to what they count. V is there, and no product under way.
    __device__ __forceinline__ void take_weights(const float (&keep)[2]) {
        keep_sums(state, keep);
        if constexpr (kCoded<Shape>)
            scale_weights<Shape, kPageTokens>(state, s, stage_scales<Shape>(place.stage) + kPageTokens);
#pragma unroll
        for (int n = 0; n < kPageTokens / 16; n++)
#pragma unroll
            for (int r = 0; r < 4; r++)
                p[n][r] = pack2<T>(s[2 * n + r / 2][r % 2 * 2], s[2 * n + r / 2][r % 2 * 2 + 1]);
    }

    __device__ __forceinline__ void release(int stage, Ring<Shape> &ring) const {
        if constexpr (kCoded<Shape>) __syncwarp();  // all lanes have read scales
        if (lane_index() == 0) mbarrier_arrive(&ring.done[stage]);
    }

    // A page that none of the rows sees.
    __device__ __forceinline__ void skip_page(Ring<Shape> &ring) {
        mbarrier_wait(&ring.keys[place.stage], place.parity);
        turns.take(), turns.pass();
        release(place.stage, ring);
        place.next();
    }

    // Pages [page, end), which the rows see. Scores are a page ahead of sums.
    __device__ __forceinline__ void attend_pages(const Stretch &rows, int page, int end, Ring<Shape> &ring) {
        float keep[2];
        uint64_t keys = keys_of(place.stage);
        mbarrier_wait(&ring.keys[place.stage], place.parity);
        turns.take();
        ask_scores(keys);
        turns.pass();
        wgmma_wait<0>(scores());
        weigh_page(rows, page, keep);
        mbarrier_wait(&ring.values[place.stage], place.parity);
        take_weights(keep);
        for (page++; page < end; page++) {
            const Place<Shape> before = place;
            place.next();
            keys = keys_of(place.stage);
            const uint64_t values = values_of(before.stage);
            mbarrier_wait(&ring.keys[place.stage], place.parity);
            turns.take();
            ask_scores(keys);
            ask_sums(values);
            turns.pass();
            wgmma_wait<1>(scores());
            weigh_page(rows, page, keep);
            pin_registers(scores());
            mbarrier_wait(&ring.values[place.stage], place.parity);  // and the compiler weighs before it waits
            wgmma_wait<0>(sums());
            for (auto &weights : p) pin_registers(weights);
            release(before.stage, ring);
            take_weights(keep);
        }
        ask_sums(values_of(place.stage));
        wgmma_wait<0>(sums());
        release(place.stage, ring);
        place.next();
    }

    // The rows' part of a stretch of the block's.
    __device__ __forceinline__ void attend_stretch(const Stretch &stretch, Ring<Shape> &ring) {
        const Stretch rows = part_of<Shape>(stretch, kTileRows * turns.group, kTileRows);
        const bool any = rows.begin < rows.end;
        int page = first_page<Shape>(stretch);
        const int begin = any ? first_page<Shape>(rows) : page, end = any ? last_seen<Shape>(rows) / kPageTokens + 1 : page;
        for (; page < begin; page++) skip_page(ring);
        if (any) attend_pages(rows, page, end, ring);
        for (page = end; page * kPageTokens <= last_seen<Shape>(stretch); page++) skip_page(ring);
    }
};

// At most as many blocks as there are items, each (64 * groups rows, head). queries: as many tiles as those have.
template <class Shape>
__device__ __forceinline__ void attention_wgmma(const typename Shape::T *queries, const int *positions,
                                                const int *page_table, const typename Shape::Kv *kv,
                                                typename Shape::Out *out, const float *sinks = nullptr,
                                                const float *slopes = nullptr) {
    using T = typename Shape::T;
    using W = Warpgroups<Shape>;
    __shared__ Ring<Shape> ring;
    const int group = warp_index() / 4;
    prepare<Shape>(ring);
    if (group == Shape::groups) {
        if constexpr (W::lends) set_max_registers_down<W::fetching_registers>();
        if (warp_index() < 4 * Shape::groups + W::fetching / 32) fetch_all<Shape>(positions, page_table, kv, ring);
        return;
    }
    if constexpr (W::lends) set_max_registers_up<W::registers>();
    wait_for_previous();
    let_next_start();

    Consumer<Shape> mine;
    mine.turns.group = group, mine.row = own_row(0);
    mine.turns.begin();
    const auto read_queries = [&](const Item<Shape> &item) {
        const int tile = item.row_block * Shape::groups + group;
        mine.read_queries(query_tile<Shape>(const_cast<T *>(queries), tile, item.head));
    };
    Item<Shape> item;
    bool more = item.next();
    if (more) read_queries(item);
    while (more) {
        const Item<Shape> now = item;
        const Rows<Shape> &rows = ring.rows[(now.round - 1) % 2];
        clear(mine.state);
        read_slopes<Shape>(mine.state, slopes, now.head, now.head);
        if constexpr (kCoded<Shape>) clear_unit(mine.state);
        mbarrier_wait(&ring.known[(now.round - 1) % 2], (now.round - 1) / 2 % 2);
        for_each_stretch<Shape>(rows, now.n_rows(), [&](const Stretch &stretch) { mine.attend_stretch(stretch, ring); });
        const int at[2] = {rows.at[mine.row], rows.at[mine.row + 8]};
        __syncwarp();
        if (lane_index() == 0) mbarrier_arrive(&ring.over[(now.round - 1) % 2]);
        more = item.next();
        if (more) read_queries(item);  // which come while results leave
        write_rows<Shape>(mine.state, at, now.first_row(), now.head, out, value_unit(mine.state), sinks);
        if (now.head == Shape::heads - 1)
            for (int row = now.first_row(); row < now.first_row() + now.n_rows(); row++)
                write_zeros<Shape>(out, row, kColumns<Shape>, kPaddedColumns<Shape>, threadIdx.x, 128 * Shape::groups);
    }
    mine.turns.end();
}

#endif  // LLMC_HAS_WGMMA
