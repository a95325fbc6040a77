// The pairs of a step, a token and one of its experts each, sorted by expert: pair m k + j is token m's j-th.
//
// An expert's pairs lie in the order of tokens, in tiles of kRows rows, of which its last may have fewer. Tiles are those
// of all experts that have pairs, one after the other; a static bound holds for any choice.
//
// sort_pairs() is one block. Each warp has a stretch of pairs and counts its own, so that places are known without
// waiting for each other: before those of an expert in warp w come those in warps below it.
#pragma once

#include "tiles.cuh"

// kTokens tokens of kChosen experts each, out of kExperts; kRows: of a tile. As it lies in memory, in 4 bytes each:
//
//     [number of tiles] [expert of each tile, kTiles] [pair of each row, kTiles kRows; -1: none] [row of each pair, kPairs]
template <int kTokens_, int kChosen_, int kExperts_, int kRows_>
struct PairTable {
    static constexpr int kTokens = kTokens_, kChosen = kChosen_, kExperts = kExperts_, kRows = kRows_;
    static constexpr int kPairs = kTokens * kChosen;
    static constexpr int kActive = kExperts < kPairs ? kExperts : kPairs;  // experts that can have pairs
    static constexpr int kTiles = kPairs < kPairs / kRows + kActive ? kPairs : kPairs / kRows + kActive;
    static constexpr int kAllRows = kTiles * kRows;
    static constexpr int kExpertsAt = 1, kPairsAt = kExpertsAt + kTiles, kRowsAt = kPairsAt + kAllRows;
};

// A number that is no expert's counts as the nearest that is.
template <int kExperts>
__device__ __forceinline__ int expert_of(long long number) {
    return number < 0 ? 0 : number >= kExperts ? kExperts - 1 : static_cast<int>(number);
}

// The lanes that hold the same number, of 0 … kMost.
template <int kMost>
__device__ __forceinline__ uint32_t lanes_with(int number) {
    uint32_t same = 0xffffffffu;
#pragma unroll
    for (int bit = 1; bit <= kMost; bit *= 2) {
        const uint32_t there = __ballot_sync(0xffffffffu, (number & bit) != 0);
        same &= number & bit ? there : ~there;
    }
    return same;
}

template <class Table, int kWarps>
struct PairSort {
    static constexpr int kShare = ceil_div(ceil_div(Table::kPairs, kWarps), 32) * 32;  // pairs of a warp
    static constexpr int kThreads = 32 * kWarps;

    struct Shared {
        int counts[kWarps][Table::kExperts];  // of each warp's pairs; then how many come before its first
        int totals[Table::kExperts], first_tile[Table::kExperts];
    };

    // Calls visit(pair, expert, lanes with the same one) for a warp's pairs, 32 at a time; an expert too many for no pair.
    template <class Visit>
    static __device__ void each(const long long *index, const Visit &visit) {
        const int begin = warp_index() * kShare;
        for (int i = 0; i < kShare && begin + i < Table::kPairs; i += 32) {
            const int pair = begin + i + lane_index();
            const int expert = pair < Table::kPairs ? expert_of<Table::kExperts>(index[pair]) : Table::kExperts;
            visit(pair, expert, lanes_with<Table::kExperts>(expert));
            __syncwarp();  // what its first lane has counted is seen
        }
    }

    static __device__ bool is_first(uint32_t lanes) { return __ffs(lanes) - 1 == lane_index(); }

    static __device__ void run(const long long *index, int *table) {
        __shared__ Shared shared;
        wait_for_previous();
        let_next_start();
        for (int i = threadIdx.x; i < kWarps * Table::kExperts; i += kThreads) (&shared.counts[0][0])[i] = 0;
        for (int i = threadIdx.x; i < Table::kAllRows; i += kThreads) table[Table::kPairsAt + i] = -1;
        __syncthreads();
        int *own = shared.counts[warp_index()];
        each(index, [&](int, int expert, uint32_t lanes) {
            if (expert < Table::kExperts && is_first(lanes)) own[expert] += __popc(lanes);
        });
        __syncthreads();
        for (int expert = threadIdx.x; expert < Table::kExperts; expert += kThreads) {
            int total = 0;
            for (int warp = 0; warp < kWarps; warp++) {
                const int count = shared.counts[warp][expert];
                shared.counts[warp][expert] = total;
                total += count;
            }
            shared.totals[expert] = total;
        }
        __syncthreads();
        if (warp_index() == 0) give_tiles(shared, table);
        __syncthreads();
        each(index, [&](int pair, int expert, uint32_t lanes) {
            const bool there = expert < Table::kExperts;
            const uint32_t before = lanes & ((1u << lane_index()) - 1);
            const int place = there ? own[expert] + __popc(before) : 0;
            __syncwarp();
            if (!there) return;
            if (is_first(lanes)) own[expert] = place + __popc(lanes);
            const int row = shared.first_tile[expert] * Table::kRows + place;
            table[Table::kPairsAt + row] = pair;
            table[Table::kRowsAt + pair] = row;
        });
    }

    // By one warp, a stretch of experts a lane.
    static __device__ void give_tiles(Shared &shared, int *table) {
        constexpr int kOwn = ceil_div(Table::kExperts, 32);
        const int begin = lane_index() * kOwn, end = min(begin + kOwn, Table::kExperts);
        int n_tiles = 0;
        for (int expert = begin; expert < end; expert++) n_tiles += ceil_div(shared.totals[expert], Table::kRows);
        int through = n_tiles;  // with those of lower lanes
        for (int offset = 1; offset < 32; offset *= 2) {
            const int below = __shfl_up_sync(0xffffffffu, through, offset);
            if (lane_index() >= offset) through += below;
        }
        int tile = through - n_tiles;
        for (int expert = begin; expert < end; expert++) {
            shared.first_tile[expert] = tile;
            const int own = ceil_div(shared.totals[expert], Table::kRows);
            for (int i = 0; i < own; i++) table[Table::kExpertsAt + tile++] = expert;
        }
        if (lane_index() == 31) table[0] = through;
    }
};

template <class Table, int kWarps>
__device__ __forceinline__ void sort_pairs(const long long *index, int *table) {
    PairSort<Table, kWarps>::run(index, table);
}
