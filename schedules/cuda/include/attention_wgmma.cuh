// Attention of large steps on Hopper: attention_tile's work with bulk copies and the products of warpgroups.
//
// A block is `groups` warpgroups, each with 64 rows of one query head, and one more warp that fetches the pages they
// share: K and V of a page are one bulk copy each, as they lie, into a ring of `stages` pages.
//
//     warpgroup:  q[64,D] stays in registers
//                 for page:  s[64,64] = q K^T            K [D/8][64][8], k contiguous         D/16 products of N = 64
//                            o[64,D] = o * keep + p V    V [D/8][64][8], n contiguous            4 of N = D
//
// While one warpgroup weighs its scores the other multiplies. A warpgroup skips a page that none of its rows sees.
// V of a page that is not full comes by chunks, its valid tokens only: what was never written could be NaN, and 0 * NaN
// is NaN. (K may: such scores are masked.) So the ring's V begins as zeros.
//
// Of codes, the page goes through the registers of a warpgroup that does nothing else (attention_widen_ring.cuh).
//
// Beside what attention.cuh lists, Shape has:
//     stages      pages in shared memory
//     groups      warpgroups with rows, 1 or 2
#pragma once

#include "attention_widen_ring.cuh"

#ifdef LLMC_HAS_WGMMA

template <class Shape>
__device__ __forceinline__ void fetch_page(const typename Shape::Kv *from, int tokens, const Place<Shape> &place,
                                           Ring<Shape> &ring) {
    using W = Warpgroups<Shape>;
    typename Shape::T *to = stage_of<Shape>(place.stage);
    const int n = min(tokens, kPageTokens), lane = lane_index();
    mbarrier_wait(&ring.done[place.stage], place.parity ^ 1);
    if (lane == 0) {
        mbarrier_arrive_expect(&ring.keys[place.stage], W::head_bytes);
        bulk_copy(to, from, W::head_bytes, &ring.keys[place.stage]);
        mbarrier_arrive_expect(&ring.values[place.stage], n * (W::head_bytes / kPageTokens));
    }
    __syncwarp();
    to += W::head, from += W::head;
    if (n == kPageTokens) {
        if (lane == 0) bulk_copy(to, from, W::head_bytes, &ring.values[place.stage]);
    } else if (lane < Shape::head_dim / 8) {
        const int chunk = lane * kPageTokens * 8;
        bulk_copy(to + chunk, from + chunk, n * 16, &ring.values[place.stage]);
    }
}

// Registers of a warp's 16 rows, from [D/8][64][8] in global memory: 128 bytes in a row each time.
template <class Shape>
__device__ __forceinline__ void read_queries(uint32_t (&q)[Shape::head_dim / 16][4], const typename Shape::T *tile) {
    const int row = 16 * (warp_index() % 4) + lane_index() / 4;
#pragma unroll
    for (int i = 0; i < Shape::head_dim / 16; i++)
#pragma unroll
        for (int r = 0; r < 4; r++)
            q[i][r] = *reinterpret_cast<const uint32_t *>(
                tile + ((2 * i + r / 2) * kTileRows + row + r % 2 * 8) * 8 + 2 * (lane_index() % 4));
}

// One page and a warpgroup's rows of a stretch.
template <class Shape>
__device__ __forceinline__ void multiply_page(Gathered<Shape> &state, const uint32_t (&q)[Shape::head_dim / 16][4],
                                              const Stretch &rows, int page, const Place<Shape> &place,
                                              Ring<Shape> &ring) {
    using T = typename Shape::T;
    constexpr int D = Shape::head_dim, chunk = kPageTokens * 16, eight = 128;  // bytes to the next chunk, 8 tokens
    const T *keys = stage_of<Shape>(place.stage), *values = keys + Warpgroups<Shape>::head;
    const bool used = sees_some<Shape>(rows, page);
    mbarrier_wait(&ring.keys[place.stage], place.parity);
    float s[kPageTokens / 8][4];
    if (used) {
        auto &scores = reinterpret_cast<float(&)[kPageTokens / 2]>(s);
        wgmma_fence(scores);
#pragma unroll
        for (int i = 0; i < D / 16; i++)
            wgmma<kPageTokens, T>(scores, q[i], plain_descriptor(keys + i * 2 * kPageTokens * 8, chunk, eight), i > 0);
        wgmma_commit();
        wgmma_wait<0>(scores);
        if constexpr (kCoded<Shape>) scale_scores<kPageTokens>(s, stage_scales<Shape>(place.stage));
        const int row = 16 * warp_index() + lane_index() / 4;
        weigh<Shape, kPageTokens>(state, s, !sees_all<Shape>(rows, page, kTileRows), [&](int half, int i) {
            return sees<Shape>(rows, row + 8 * half, page * kPageTokens + i);
        });
    }
    mbarrier_wait(&ring.values[place.stage], place.parity);
    if (!used) return;
    if constexpr (kCoded<Shape>)
        scale_weights<Shape, kPageTokens>(state, s, stage_scales<Shape>(place.stage) + kPageTokens);
    uint32_t p[kPageTokens / 16][4];
#pragma unroll
    for (int n = 0; n < kPageTokens / 16; n++) {
        p[n][0] = pack2<T>(s[2 * n][0], s[2 * n][1]), p[n][1] = pack2<T>(s[2 * n][2], s[2 * n][3]);
        p[n][2] = pack2<T>(s[2 * n + 1][0], s[2 * n + 1][1]), p[n][3] = pack2<T>(s[2 * n + 1][2], s[2 * n + 1][3]);
    }
    auto &o = reinterpret_cast<float(&)[D / 2]>(state.o);
    wgmma_fence(o);
#pragma unroll
    for (int n = 0; n < kPageTokens / 16; n++)
        wgmma<D, T, true>(o, p[n], plain_descriptor(values + n * 16 * 8, eight, chunk));
    wgmma_commit();
    wgmma_wait<0>(o);
}

// Calls visit(stretch, its last row's pages) for each stretch of sequences' rows of the block, in order.
template <class Shape, class Visit>
__device__ __forceinline__ void for_each_stretch(const int *positions, const int *page_table, int first_row, int n,
                                                 Visit visit) {
    const uint64_t low = continued<Shape>(positions, page_table, first_row, min(n, 64));
    const uint64_t high = n > 64 ? continued<Shape>(positions, page_table, first_row + 64, n - 64) : 0;
    for (Stretch stretch = {0, 0, 0, 0}; stretch.begin < n; stretch.begin = stretch.end) {
        stretch.end = stretch.begin + 1;
        if (stretch.end < 64) stretch.end += ones_up(low, stretch.end);
        if (stretch.end >= 64) stretch.end += ones_up(high, stretch.end - 64);
        stretch.first = positions[first_row + stretch.begin];
        stretch.last = stretch.first + stretch.end - 1 - stretch.begin;
        if (stretch.first >= 0) visit(stretch, page_table + (first_row + stretch.end - 1) * Shape::pages);
    }
}

// The ring's barriers; V in it as zeros, where whole tokens are left out.
template <class Shape>
__device__ __forceinline__ void prepare(Ring<Shape> &ring) {
    using W = Warpgroups<Shape>;
    for (int i = threadIdx.x; !kCoded<Shape> && i < Shape::stages * W::head / 8; i += W::threads) {
        const int stage = i / (W::head / 8), chunk = i % (W::head / 8);
        put_chunk(stage_of<Shape>(stage) + W::head + 8 * chunk, make_uint4(0, 0, 0, 0));
    }
    fence_async_shared();
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < Shape::stages; stage++) {
            mbarrier_init(&ring.keys[stage], kCoded<Shape> ? W::fetching : 1);
            mbarrier_init(&ring.values[stage], kCoded<Shape> ? W::fetching : 1);
            mbarrier_init(&ring.done[stage], 4 * Shape::groups);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
}

// A block for each (64 * groups rows, head), the last rows first. queries: as many tiles as the blocks have.
template <class Shape>
__device__ __forceinline__ void attention_wgmma(const typename Shape::T *queries, const int *positions,
                                                const int *page_table, const typename Shape::Kv *kv,
                                                typename Shape::Out *out) {
    using W = Warpgroups<Shape>;
    using T = typename Shape::T;
    using Kv = typename Shape::Kv;
    __shared__ Ring<Shape> ring;
    const int head = blockIdx.x % Shape::heads, block = W::blocks - 1 - blockIdx.x / Shape::heads;
    const int first_row = block * W::rows, n = min(Shape::rows - first_row, W::rows), group = warp_index() / 4;
    prepare<Shape>(ring);
    wait_for_previous();
    let_next_start();

    Place<Shape> place;
    if (group == Shape::groups) {
        for_each_stretch<Shape>(positions, page_table, first_row, n, [&](const Stretch &stretch, const int *pages) {
            for (int page = first_page<Shape>(stretch); page * kPageTokens <= stretch.last; page++, place.next()) {
                const auto *from = page_head<Shape>(const_cast<Kv *>(kv), pages[page], head / kGroup<Shape>);
                const int tokens = stretch.last + 1 - page * kPageTokens;
                if constexpr (kCoded<Shape>)
                    widen_page<Shape>(from, tokens, place, ring, threadIdx.x % 128);
                else
                    fetch_page<Shape>(from, tokens, place, ring);
            }
        });
        return;
    }
    uint32_t q[Shape::head_dim / 16][4];
    read_queries<Shape>(q, query_tile<Shape>(const_cast<T *>(queries), block * Shape::groups + group, head));
    Gathered<Shape> state;
    clear(state);
    if constexpr (kCoded<Shape>) clear_unit(state);
    for_each_stretch<Shape>(positions, page_table, first_row, n, [&](const Stretch &stretch, const int *) {
        const Stretch rows = part_of(stretch, kTileRows * group, kTileRows);
        for (int page = first_page<Shape>(stretch); page * kPageTokens <= stretch.last; page++, place.next()) {
            multiply_page<Shape>(state, q, rows, page, place, ring);
            if (lane_index() == 0) mbarrier_arrive(&ring.done[place.stage]);
        }
    });
    write_rows<Shape>(state, positions, first_row, head, out, value_unit(state));
    if (head == Shape::heads - 1)
        for (int row = first_row; row < first_row + n; row++)
            write_zeros<Shape>(out, row, kColumns<Shape>, kPaddedColumns<Shape>, threadIdx.x, 128 * Shape::groups);
}

#endif  // LLMC_HAS_WGMMA
