// The division of a matrix product among thread blocks that stay.
//
// y[M,N] is cut into tiles, and a tile's sum over K into steps of 64. There are rarely as many tiles as a multiple of
// the blocks: the tiles that are left over are shared out evenly, step by step, so that every block does the same
// amount of work. A block does its share first, then whole tiles:
//
//     blocks      0       1       2       3                5 tiles of 8 steps, 4 blocks: 1 shared tile, 4 whole ones
//     shared   |0 0|   |0 0|   |0 0|   |0 0|               each block sums a quarter of tile 0 …
//     whole    [ 1 ]   [ 2 ]   [ 3 ]   [ 4 ]               … and then a tile of its own
//
// The parts of a shared tile are added by the block that comes last, always in the order of K (gemm_epilogue.cuh).
// Where blocks form clusters, a cluster stands for a block here: its blocks do the same steps, each on its own rows.
// "Stream-K", Osama et al. 2023, arXiv:2301.03598.
#pragma once

#include "device.cuh"

// A stretch of a tile's steps, [begin, end).
struct Stretch {
    int tile, begin, end;
};

// kTiles tiles of kSteps steps for kBlocks blocks; the first kShared tiles are shared out.
template <int kTiles, int kSteps, int kBlocks, int kShared>
struct Work {
    static_assert((kTiles - kShared) % kBlocks == 0 || kShared == 0, "what is not shared is whole rounds");
    static constexpr int n_shared_steps = kShared * kSteps;
    static_assert(kShared == 0 || n_shared_steps >= kBlocks, "no block comes away empty-handed");

    int step, steps_end;  // of the shared tiles' steps, counted from tile 0's first
    int whole_tile;

    __device__ explicit Work(int block)
        : step(first_step(block)), steps_end(first_step(block + 1)), whole_tile(kShared + block) {}

    // The block's next stretch; false when it has done its work.
    __device__ bool next(Stretch &stretch) {
        if (kShared > 0 && step < steps_end) {
            stretch.tile = step / kSteps;
            stretch.begin = step - stretch.tile * kSteps;
            stretch.end = min(kSteps, stretch.begin + steps_end - step);
            step += stretch.end - stretch.begin;
            return true;
        }
        if (whole_tile >= kTiles) return false;
        stretch = {whole_tile, 0, kSteps};
        whole_tile += kBlocks;
        return true;
    }

    // Whether other blocks sum the rest of the tile.
    static __device__ bool is_part(const Stretch &stretch) { return stretch.end - stretch.begin < kSteps; }

    // How many stretches the block has before that of a tile: what a count of them would say, but for the register.
    static __device__ int stretches_before(int block, int tile) {
        const int first_shared = first_step(block) / kSteps;
        if (kShared > 0 && tile < kShared) return tile - first_shared;
        const int n_shared = kShared > 0 ? (first_step(block + 1) - 1) / kSteps - first_shared + 1 : 0;
        return n_shared + (tile - kShared) / kBlocks;
    }

    // The blocks that share a tile are first_block … last_block.
    static __device__ int first_block(int tile) { return block_of(tile * kSteps); }
    static __device__ int last_block(int tile) { return block_of((tile + 1) * kSteps - 1); }

    // Where a block's part of a tile is kept: block + tile grows by one from each part to the next.
    static constexpr int n_parts = kShared > 0 ? kShared + kBlocks - 1 : 0;

  private:
    static __device__ int first_step(int block) { return static_cast<int>(int64_t(block) * n_shared_steps / kBlocks); }

    static __device__ int block_of(int shared_step) {
        return static_cast<int>((int64_t(shared_step + 1) * kBlocks - 1) / max(n_shared_steps, 1));
    }
};

// The same work step by step, as whoever fetches ahead walks through it.
template <class W>
struct Steps {
    W work;
    Stretch now;
    bool any;

    __device__ explicit Steps(int block) : work(block), now{0, 0, 0}, any(work.next(now)) {}

    __device__ void advance() {
        if (++now.begin == now.end) any = work.next(now);
    }
};
