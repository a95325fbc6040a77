// What the kernels of latent attention share, and the first of them. All heads of a token see one key and one value: the
// latent of a token, which is both, and behind it in the key what is turned by the position. arXiv:2405.04434.
//
// A page's part for one layer is one copy of the keys,
//
//     [D/8 chunks][64 tokens][8 elements of T]             D = L + RD; the latent's L elements first
//
// which `ldmatrix` reads as they are for scores, and transposed for the sums of values (attention.cuh).
//
// A tile is R = tile_rows rows of a product: tile_heads heads, of tile_tokens rows of the step one after the other. Its
// queries lie as a page does: [D/8][R][8]. Places that no row and head have hold anything: they change no other row.
//
// Shape is attention.cuh's, with head_dim for L, and has besides:
//     query_dim                  elements of a head of q; the last RD are turned
//     tile_rows, tile_tokens     16, 32 or 64; more than 1 only if so many times all heads find room
//     splits, least              blocks that may share a row's context, and pages of each where there are several: of
//                                tiles of one token alone
//     stages                     pages in shared memory
//     epsilon                    of the latent's norm
#pragma once

#include "attention_heads.cuh"
#include "attention_merge.cuh"
#include "attention_rows.cuh"

constexpr int kLatentWarps = 4;  // of a block, of the kernels before and behind attention itself
constexpr int kLatentThreads = 32 * kLatentWarps;

template <class Shape>
struct Latent {
    static constexpr int L = Shape::head_dim, RD = Shape::rotary_dim, D = L + RD;
    static constexpr int R = Shape::tile_rows, tokens = Shape::tile_tokens;
    static constexpr int head_tiles = ceil_div(Shape::heads, R);
    static constexpr int tile_heads = ceil_div(Shape::heads, head_tiles);
    static constexpr int tiles = ceil_div(Shape::rows, tokens) * head_tiles;
    static constexpr int page = kPageTokens * D;  // elements of a layer's part
    static_assert(L % 16 == 0 && D % 16 == 0, "whole steps of products");
    static_assert(tokens * tile_heads <= R && (tokens == 1 || (head_tiles == 1 && Shape::splits == 1)), "rows find room");

    // A row's and head's tile, and place in it.
    __device__ static __forceinline__ int tile_of(int row, int head) {
        return row / tokens * head_tiles + head / tile_heads;
    }
    __device__ static __forceinline__ int place_of(int row, int head) {
        return row % tokens * tile_heads + head % tile_heads;
    }
};

// Into how many parts the pages of a row at position `at` are cut; -1: it pads the step.
template <class Shape>
__device__ __forceinline__ int latent_splits(int at) {
    if constexpr (Shape::splits == 1) return 1;
    const int begin = Shape::window ? max(at - sight<Shape>(at) + 1, 0) / kPageTokens : 0;
    const int n = at < 0 ? 0 : at / kPageTokens + 1 - begin;
    return max(min(n / Shape::least, Shape::splits), 1);
}

// ---- what comes first ----------------------------------------------------------------------------------------------

// A row's latent, normalised, and what is turned behind it, to its page; by a warp.
template <class Shape>
__device__ __forceinline__ void keep_latent(const float *x, const float *norm, const float *cos, const float *sin,
                                            typename Shape::Kv *to) {
    using S = Latent<Shape>;
    float squares = 0.f;
    for (int c = lane_index(); c < S::L / 8; c += 32) {
        const Eight y = load_eight(x + 8 * c);
#pragma unroll
        for (int i = 0; i < 8; i++) squares = fmaf(y.at[i], y.at[i], squares);
    }
    const NormedVector latent = {x, norm, rsqrtf(warp_sum(squares) * (1.f / S::L) + Shape::epsilon)};
    for (int c = lane_index(); c < S::D / 8; c += 32) {
        const int turned = 8 * c - S::L;
        const Eight y = turned < 0 ? load_eight(latent + 8 * c) : turned_eight<Shape>(x + S::L, cos, sin, turned);
        store_16(to + 8 * kPageTokens * c, pack_eight<typename Shape::Kv>(y));
    }
}

// A warp for each row and head, which puts the head's query together, and one more for each row, which keeps its latent.
// q [M, heads * query_dim], absorbed [M, heads * L], kv [M, L + RD], norm [L], cos, sin [M, RD/2].
// Bytes: 4 (L + RD) a row and head, and 2 (L + RD) written.
template <class Shape>
__device__ __forceinline__ void latent_append(const float *q, const float *absorbed, const float *kv, const float *norm,
                                              const float *cos, const float *sin, const int *positions,
                                              const int *page_table, typename Shape::Kv *cache,
                                              typename Shape::T *queries) {
    using S = Latent<Shape>;
    constexpr int half = S::RD / 2;
    const int unit = blockIdx.x * kLatentWarps + warp_index();
    const int row = unit / (Shape::heads + 1), head = unit % (Shape::heads + 1);
    const int at = row < Shape::rows ? positions[row] : -1;
    const int page = at >= 0 ? page_table[row * Shape::pages + at / kPageTokens] : 0;
    wait_for_previous();
    let_next_start();
    if (at < 0) return;
    cos += row * half, sin += row * half;
    if (head == Shape::heads) {
        keep_latent<Shape>(kv + int64_t(row) * S::D, norm, cos, sin,
                           cache + int64_t(page) * Shape::page_elements + 8 * (at % kPageTokens));
        return;
    }
    const int64_t vector = int64_t(row) * Shape::heads + head;
    const float *turning = q + vector * Shape::query_dim + (Shape::query_dim - S::RD);
    typename Shape::T *to = queries + int64_t(S::tile_of(row, head)) * (S::R * S::D) + 8 * S::place_of(row, head);
    for (int c = lane_index(); c < S::D / 8; c += 32) {
        const int turned = 8 * c - S::L;
        const Eight x = turned < 0 ? load_eight(absorbed + vector * S::L + 8 * c)
                                   : turned_eight<Shape>(turning, cos, sin, turned);
        store_16(to + 8 * S::R * c, pack_eight<typename Shape::T>(x));
    }
}

// ---- what comes last -----------------------------------------------------------------------------------------------

// What splits have gathered of tiles: o [tiles][splits][R][L], and behind it (most, sum) [tiles][splits][R], in float32.
template <class Shape>
__device__ __forceinline__ int64_t latent_part(int tile, int split, int place) {
    return (int64_t(tile) * Shape::splits + split) * Latent<Shape>::R + place;
}
template <class Shape>
__device__ __forceinline__ float2 *latent_tops(float *partial) {
    using S = Latent<Shape>;
    return reinterpret_cast<float2 *>(partial + int64_t(S::tiles) * Shape::splits * S::R * S::L);
}

// A block for each row and head: the splits of its context, where there are several, merged in order.
template <class Shape>
__device__ __forceinline__ void latent_merge(const int *positions, float *partial, typename Shape::Out *out) {
    using S = Latent<Shape>;
    const int row = blockIdx.x / Shape::heads, head = blockIdx.x % Shape::heads;
    const int splits = latent_splits<Shape>(positions[row]);
    const int tile = S::tile_of(row, head), place = S::place_of(row, head);
    const float2 *tops = latent_tops<Shape>(partial);
    wait_for_previous();
    let_next_start();
    if (splits == 1) return;
    for (int quad = threadIdx.x; quad < S::L / 4; quad += kLatentThreads) {
        Merged<Shape> merged;
#pragma unroll 4
        for (int split = 0; split < splits; split++) merged.see(tops[latent_part<Shape>(tile, split, place)].x);
#pragma unroll 4
        for (int split = 0; split < splits; split++) {
            const int64_t part = latent_part<Shape>(tile, split, place);
            merged.add(*reinterpret_cast<const float4 *>(partial + part * S::L + 4 * quad), tops[part]);
        }
        const float scale = 1.f / merged.sum;
        const float x[4] = {merged.x[0] * scale, merged.x[1] * scale, merged.x[2] * scale, merged.x[3] * scale};
        write_result<Shape>(out, row, head * S::L + 4 * quad, x);
    }
}
