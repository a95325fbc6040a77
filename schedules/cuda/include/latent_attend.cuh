// Latent attention, after latent_append (latent.cuh): a block for each tile of queries and split of its context.
//
//     for each run of the tile's rows that continue one sequence:
//         for page of the run, or of the split:
//             s[R, 64] = q k^T             each of eight warps 16 rows and 64 / (128 / R) tokens
//             p = 2^(s - most)             by way of shared memory, as are the largest scores
//             o[R, L] = o * keep + p v     each warp up to 32 rows and a share of the columns
//
// Pages into which the step writes nothing are asked for before the launch in front has ended.
//
// A page's one copy of the latents is read for all of it. Bytes: 2 (L + RD) a token of context and tile; operations:
// 2 R (2 L + RD). Of 64 rows shared memory reads 55 KB a warp for scores and 20 for sums, which is the limit on paper.
#pragma once

#include "latent_pages.cuh"

template <class Shape>
struct LatentWork {
    using S = Latent<Shape>;
    // Of scores: groups of 16 rows, and of tokens, and how many times eight tokens a warp has.
    static constexpr int row_groups = S::R / 16, token_groups = kAttendWarps / row_groups;
    static constexpr int eights = kPageTokens / 8 / token_groups;
    // Of sums: how many times 16 rows a warp has; groups of rows, and of columns, and how many times 16 columns it has.
    static constexpr int sixteens = row_groups > 1 ? 2 : 1, sum_groups = row_groups / sixteens;
    static constexpr int column_groups = kAttendWarps / sum_groups, strips = ceil_div(S::L / 16, column_groups);
    // Shared memory: queries [D/8][R][8], stages [D/8][64][8], weights [64/8][R][8].
    static constexpr int stages_at = S::R * S::D, weights_at = stages_at + Shape::stages * S::page;
};

// What warps tell each other of a tile's rows.
template <class Shape>
struct LatentRows {
    float top[LatentWork<Shape>::token_groups][Shape::tile_rows];  // the largest scores of a page's tokens; last: sums
    float keep[Shape::tile_rows];                                  // what sums of pages before are worth
    float most[Shape::tile_rows];                                  // the largest scores of all
};

// The warp's rows and tokens of the scores: a lane has rows 16 group + lane/4 and 8 on.
template <class Shape>
struct LatentScores {
    using W = LatentWork<Shape>;
    using S = Latent<Shape>;
    using T = typename Shape::T;
    const int row_group, token_group;
    float most[2], sum[2];

    __device__ __forceinline__ LatentScores()
        : row_group(warp_index() % W::row_groups), token_group(warp_index() / W::row_groups),
          most{-INFINITY, -INFINITY}, sum{0.f, 0.f} {}

    __device__ __forceinline__ int place(int half) const { return 16 * row_group + lane_index() / 4 + 8 * half; }

    // s = q k^T, in two chains: each product of a sum waits for the one before.
    __device__ __forceinline__ void score(float (&s)[W::eights][4], const T *queries, const T *keys) const {
        const int matrix = lane_index() / 8, line = lane_index() % 8;
        float odd[W::eights][4];
#pragma unroll
        for (int n = 0; n < W::eights; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) s[n][i] = odd[n][i] = 0.f;
        const T *own_queries = queries + 8 * (matrix / 2 * S::R + 16 * row_group + matrix % 2 * 8 + line);
        const T *own_keys = keys + 8 * (matrix % 2 * kPageTokens + 8 * W::eights * token_group + line);
#pragma unroll
        for (int i = 0; i < S::D / 16; i++) {
            uint32_t q[4];
            ldmatrix_x4(q, own_queries + 16 * S::R * i);
            if constexpr (W::eights == 1) {
                uint32_t k[2];
                ldmatrix_x2(k, own_keys + 16 * kPageTokens * i);
                mma_16816<T>(i % 2 ? odd[0] : s[0], q, k);
            } else {
#pragma unroll
                for (int n = 0; n < W::eights; n += 2) {
                    uint32_t k[4];
                    ldmatrix_x4(k, own_keys + 16 * kPageTokens * i + 8 * (8 * n + matrix / 2 * 8));
                    mma_16816<T>(i % 2 ? odd[n] : s[n], q, {k[0], k[1]});
                    mma_16816<T>(i % 2 ? odd[n + 1] : s[n + 1], q, {k[2], k[3]});
                }
            }
        }
#pragma unroll
        for (int n = 0; n < W::eights; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) s[n][i] += odd[n][i];
    }

    // Scores as the softmax takes them; those of tokens that a row does not see are -inf. Of each row the largest.
    template <class Sees>
    __device__ __forceinline__ void limit(float (&s)[W::eights][4], LatentRows<Shape> &rows, bool masked,
                                          Sees sees) const {
        float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int n = 0; n < W::eights; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if constexpr (Shape::softcap > 0.f)
                    s[n][i] = Shape::softcap * tanhf(s[n][i] * (Shape::scale / Shape::softcap));
                const int token = 8 * (W::eights * token_group + n) + 2 * (lane_index() % 4) + i % 2;
                if (masked && !sees(place(i / 2), token)) s[n][i] = -INFINITY;
                top[i / 2] = fmaxf(top[i / 2], s[n][i]);
            }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            top[half] = fmaxf(top[half], __shfl_xor_sync(kAllLanes, top[half], 1));
            top[half] = fmaxf(top[half], __shfl_xor_sync(kAllLanes, top[half], 2));
            if (lane_index() % 4 == 0) rows.top[token_group][place(half)] = top[half];
        }
    }

    // Scores -> weights, to shared memory; all warps' largest scores are known.
    __device__ __forceinline__ void weigh(float (&s)[W::eights][4], LatentRows<Shape> &rows, T *weights) {
        constexpr float c = kExponent<Shape>;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float top = most[half];
#pragma unroll
            for (int g = 0; g < W::token_groups; g++) top = fmaxf(top, rows.top[g][place(half)]);
            const float base = top == -INFINITY ? 0.f : top * c;  // a row that has seen nothing yet weighs nothing
            const float keep = exp2_approx(fmaf(most[half], c, -base));
            if (token_group == 0 && lane_index() % 4 == 0) rows.keep[place(half)] = keep;
            most[half] = top;
            float more = 0.f;
#pragma unroll
            for (int n = 0; n < W::eights; n++) {
                const float p[2] = {exp2_approx(fmaf(s[n][2 * half], c, -base)),
                                    exp2_approx(fmaf(s[n][2 * half + 1], c, -base))};
                more += p[0] + p[1];
                T *to = weights + 8 * ((W::eights * token_group + n) * S::R + place(half)) + 2 * (lane_index() % 4);
                *reinterpret_cast<uint32_t *>(to) = pack2<T>(p[0], p[1]);
            }
            sum[half] = fmaf(sum[half], keep, more);
        }
    }

    // The largest scores, and each warp's part of the sums of weights.
    __device__ __forceinline__ void hand_over(LatentRows<Shape> &rows) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float part = row_sum(sum[half]);
            if (lane_index() % 4) continue;
            rows.top[token_group][place(half)] = part;
            if (token_group == 0) rows.most[place(half)] = most[half];
        }
    }
};

// The warp's rows and columns of o: a lane has columns 16 strip + 2 (lane % 4) + {0, 1} and 8 on.
template <class Shape>
struct LatentSums {
    using W = LatentWork<Shape>;
    using S = Latent<Shape>;
    using T = typename Shape::T;
    const int first_row, first_strip;
    float o[W::sixteens][2 * W::strips][4];

    __device__ __forceinline__ LatentSums()
        : first_row(16 * W::sixteens * (warp_index() % W::sum_groups)),
          first_strip(W::strips * (warp_index() / W::sum_groups)), o{} {}

    __device__ __forceinline__ int place(int r, int half) const {
        return first_row + 16 * r + lane_index() / 4 + 8 * half;
    }
    __device__ __forceinline__ bool is_there(int j) const {
        return W::strips * W::column_groups == S::L / 16 || first_strip + j < S::L / 16;
    }

    // o to the new largest scores.
    __device__ __forceinline__ void keep(const LatentRows<Shape> &rows) {
#pragma unroll
        for (int r = 0; r < W::sixteens; r++) {
            const float by[2] = {rows.keep[place(r, 0)], rows.keep[place(r, 1)]};
            if (!__any_sync(kAllLanes, by[0] != 1.f || by[1] != 1.f)) continue;
#pragma unroll
            for (int j = 0; j < 2 * W::strips; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) o[r][j][i] *= by[i / 2];
        }
    }

    // o += p v
    __device__ __forceinline__ void add(const T *weights, const T *values) {
        const int matrix = lane_index() / 8, line = lane_index() % 8;
        const T *own_weights = weights + 8 * (matrix / 2 * S::R + first_row + matrix % 2 * 8 + line);
        const T *own_values = values + 8 * ((2 * first_strip + matrix / 2) * kPageTokens + matrix % 2 * 8 + line);
#pragma unroll
        for (int n = 0; n < kPageTokens / 16; n++) {
            uint32_t p[W::sixteens][4];
#pragma unroll
            for (int r = 0; r < W::sixteens; r++) ldmatrix_x4(p[r], own_weights + 8 * (2 * n * S::R + 16 * r));
#pragma unroll
            for (int j = 0; j < W::strips; j++) {
                if (!is_there(j)) break;
                uint32_t v[4];
                ldmatrix_x4_trans(v, own_values + 8 * (2 * j * kPageTokens + 16 * n));
#pragma unroll
                for (int r = 0; r < W::sixteens; r++) {
                    mma_16816<T>(o[r][2 * j], p[r], {v[0], v[1]});
                    mma_16816<T>(o[r][2 * j + 1], p[r], {v[2], v[3]});
                }
            }
        }
    }

    // put(r, half, column, the values of it and the next one)
    template <class Put>
    __device__ __forceinline__ void each(Put put) const {
#pragma unroll
        for (int r = 0; r < W::sixteens; r++)
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int j = 0; j < 2 * W::strips; j++)
                    if (is_there(j / 2))
                        put(r, half, 16 * (first_strip + j / 2) + j % 2 * 8 + 2 * (lane_index() % 4),
                            make_float2(o[r][j][2 * half], o[r][j][2 * half + 1]));
    }
};

// A run's rows and its pages, of which the first `asked` have been asked for. queries, weights: in shared memory.
template <class Shape>
__device__ __forceinline__ void attend_latents(LatentScores<Shape> &scores, LatentSums<Shape> &sums,
                                               LatentRows<Shape> &rows, const LatentBlock<Shape> &block,
                                               const Stretch &stretch, const LatentPages<Shape> &pages, int asked,
                                               const typename Shape::T *queries, typename Shape::T *weights) {
    using S = Latent<Shape>;
    using W = LatentWork<Shape>;
    using T = typename Shape::T;
    for (int i = asked; i < Shape::stages - 1; i++) pages.ask(pages.begin + i);
    for (int page = pages.begin; page < pages.end; page++) {
        pages.ask(page + Shape::stages - 1);
        if (Shape::stages > 2 && page == pages.begin)
            cp_async_wait<1>();  // queries may have been asked for behind all first pages
        else
            cp_async_wait<Shape::stages - 1>();
        __syncthreads();
        const T *stage = pages.stage(page);
        float s[W::eights][4];
        scores.score(s, queries, stage);
        const bool masked = !sees_all<Shape>(stretch, page, block.n);
        scores.limit(s, rows, masked, [&](int place, int token) {
            return sees<Shape>(stretch, place / S::tile_heads, page * kPageTokens + token);
        });
        __syncthreads();
        scores.weigh(s, rows, weights);
        __syncthreads();
        sums.keep(rows);
        sums.add(weights, stage);
        __syncthreads();
    }
}

// Results, or what a split has of them.
template <class Shape>
__device__ __forceinline__ void write_latents(const LatentSums<Shape> &sums, const LatentRows<Shape> &rows,
                                              const LatentBlock<Shape> &block, const int *positions,
                                              typename Shape::Out *out, float *partial) {
    using S = Latent<Shape>;
    using W = LatentWork<Shape>;
    float factor[W::sixteens][2];
#pragma unroll
    for (int r = 0; r < W::sixteens; r++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int place = sums.place(r, half);
            float total = 0.f;
#pragma unroll
            for (int g = 0; g < W::token_groups; g++) total += rows.top[g][place];
            const bool is_real = block.has(place) && positions[block.row(place)] >= 0;
            factor[r][half] = is_real ? 1.f / total : 0.f;
            if (Shape::splits > 1 && block.splits > 1 && sums.first_strip == 0 && lane_index() % 4 == 0)
                latent_tops<Shape>(partial)[latent_part<Shape>(block.tile, block.split, place)] =
                    make_float2(rows.most[place], total);
        }
    sums.each([&](int r, int half, int column, float2 x) {
        const int place = sums.place(r, half);
        if (!block.has(place)) return;
        if (Shape::splits > 1 && block.splits > 1) {
            float *to = partial + latent_part<Shape>(block.tile, block.split, place) * S::L + column;
            *reinterpret_cast<float2 *>(to) = x;
            return;
        }
        const float by = factor[r][half], y[2] = {by == 0.f ? 0.f : x.x * by, by == 0.f ? 0.f : x.y * by};
        write_result<Shape>(out, block.row(place), block.head(place) * S::L + column, y);
    });
    if (block.split == 0 && block.first_head + S::tile_heads >= Shape::heads)
        for (int row = block.first_row; row < block.first_row + block.n; row++)
            write_zeros<Shape>(out, row, kColumns<Shape>, kPaddedColumns<Shape>, threadIdx.x, kAttendThreads);
}

// partial: read and written only where splits > 1.
template <class Shape>
__device__ __forceinline__ void latent_attend(const typename Shape::T *queries, const int *positions,
                                              const int *page_table, const typename Shape::Kv *kv,
                                              typename Shape::Out *out, float *partial) {
    using S = Latent<Shape>;
    using T = typename Shape::T;
    __shared__ LatentRows<Shape> rows;
    T *shared = reinterpret_cast<T *>(dynamic_shared());
    const LatentBlock<Shape> block(positions);
    const uint64_t joined = continued<Shape>(positions, page_table, block.first_row, block.n);
    const auto pages_of = [&](const Stretch &stretch) {
        return LatentPages<Shape>(block, stretch, page_table, kv, shared + LatentWork<Shape>::stages_at);
    };
    int asked = 0;
    if constexpr (S::tokens == 1 && Shape::rows <= kEarlyRows) {
        const int at = positions[block.first_row];
        if (block.split < block.splits) asked = pages_of({0, 1, at, at}).ask_early(positions, page_table);
    }
    wait_for_previous();
    let_next_start();
    if (block.split >= block.splits) return;

    const T *from = queries + int64_t(block.tile) * (S::R * S::D);
#pragma unroll 4
    for (int i = threadIdx.x; i < S::R * S::D / 8; i += kAttendThreads) cp_async_16(shared + 8 * i, from + 8 * i);
    cp_async_commit();
    LatentScores<Shape> scores;
    LatentSums<Shape> sums;
    for (Stretch stretch = {0, 0, 0, 0}; stretch.begin < block.n; stretch.begin = stretch.end) {
        stretch.first = positions[block.first_row + stretch.begin];
        stretch.end = stretch.begin + 1 + ones_up(joined, stretch.begin + 1);
        stretch.last = stretch.first + stretch.end - 1 - stretch.begin;
        if (stretch.first < 0) continue;
        attend_latents<Shape>(scores, sums, rows, block, stretch, pages_of(stretch), asked, shared,
                              shared + LatentWork<Shape>::weights_at);
    }
    cp_async_wait<0>();  // queries of rows that all pad the step
    scores.hand_over(rows);
    __syncthreads();
    write_latents<Shape>(sums, rows, block, positions, out, partial);
}
