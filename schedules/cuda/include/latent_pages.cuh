// What a block of latent attention (latent_attend.cuh) has: rows and heads, and the pages that it reads for them.
#pragma once

#include "latent.cuh"

constexpr int kAttendWarps = 8;
constexpr int kAttendThreads = 32 * kAttendWarps;
constexpr int kEarlyRows = 64;  // most of a step for which a block looks where each of them writes

// The rows and heads that a block has.
template <class Shape>
struct LatentBlock {
    using S = Latent<Shape>;
    int tile, split, splits, first_row, first_head, n;  // n: rows of the step

    // Tiles of the last rows, which see most, start first, and first splits: those that leave at once come last.
    __device__ __forceinline__ LatentBlock(const int *positions) {
        tile = S::tiles - 1 - blockIdx.x % S::tiles, split = blockIdx.x / S::tiles;
        first_row = tile / S::head_tiles * S::tokens, first_head = tile % S::head_tiles * S::tile_heads;
        n = min(Shape::rows - first_row, S::tokens);
        splits = latent_splits<Shape>(positions[first_row]);
    }
    __device__ __forceinline__ int row(int place) const { return first_row + place / S::tile_heads; }
    __device__ __forceinline__ int head(int place) const { return first_head + place % S::tile_heads; }
    __device__ __forceinline__ bool has(int place) const {
        return place < n * S::tile_heads && (Shape::heads % S::tile_heads == 0 || head(place) < Shape::heads);
    }
};

// The pages that a block reads for a run of rows that continue one sequence: all, or a split's.
template <class Shape>
struct LatentPages {
    using S = Latent<Shape>;
    using T = typename Shape::T;
    const int *pages;
    const T *kv;
    T *stages;
    int begin, end, last;  // last: of the run's positions

    __device__ __forceinline__ LatentPages(const LatentBlock<Shape> &block, const Stretch &stretch, const int *page_table,
                                           const T *kv, T *stages)
        : pages(page_table + (block.first_row + stretch.end - 1) * Shape::pages), kv(kv), stages(stages),
          last(stretch.last) {
        const int first = first_page<Shape>(stretch), n = last < 0 ? 0 : last / kPageTokens + 1 - first;
        begin = first + n * block.split / block.splits, end = first + n * (block.split + 1) / block.splits;
    }

    __device__ __forceinline__ T *stage(int page) const { return stages + page % Shape::stages * S::page; }

    // Asks for a page; zeros for tokens after the last, which may never have been written.
    __device__ __forceinline__ void ask(int page) const {
        if (page < end) {
            const T *from = kv + int64_t(pages[page]) * Shape::page_elements;
            T *to = stage(page);
            const int tokens = last + 1 - page * kPageTokens;
#pragma unroll 4
            for (int i = threadIdx.x; i < S::page / 8; i += kAttendThreads)
                cp_async_16(to + 8 * i, from + 8 * i, i % kPageTokens < tokens);
        }
        cp_async_commit();
    }

    // Asks for first pages, one stage less than there are, as long as no row of the step writes into them, whichever
    // sequence has it. Nothing else that may still run writes this layer's pages: the launch in front alone appends to
    // them, earlier steps' graphs have ended (attention_stream.cuh says why), and pages are copied between graphs. How
    // many that were.
    __device__ __forceinline__ int ask_early(const int *positions, const int *page_table) const {
        for (int i = 0; i < Shape::stages - 1; i++) {
            if (begin + i >= end) return i;
            bool written = false;
            for (int row = lane_index(); row < Shape::rows; row += 32) {
                const int at = positions[row];
                written |= at >= 0 && page_table[row * Shape::pages + at / kPageTokens] == pages[begin + i];
            }
            if (__any_sync(kAllLanes, written)) return i;
            ask(begin + i);
        }
        return Shape::stages - 1;
    }
};
