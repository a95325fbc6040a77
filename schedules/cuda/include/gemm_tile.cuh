// A matrix product y[M,N] = x Wᵀ as both GEMMs cut it up: tiles of 128 stored rows of W by kTokens rows of x.
//
// Two warpgroups own a tile, 64 rows each: one row of W's own tiles. A step of 64 along K is a stage of a ring in
// shared memory, where all lies as in global memory:
//
//     stage   [W: 64 rows for each warpgroup, a tile or four pieces of codes] [x: kTokens rows x 128 bytes]
//
// Of a weight with few rows two warpgroups take the same 64 of them and share K (kAlong): a stage is two steps then,
//
//     stage   [W: 64 rows by 128 of K, a tile or four pieces for each warpgroup] [x: kTokens x 128 bytes, for each]
//
// and there are twice as many tiles, so that none has to be shared out: putting its parts together is what the kernel
// behind would wait for.
//
// Of many tokens each warpgroup may own tiles alone, every other one, of 64 or 128 rows (kTurns: how many times 64):
//
//     stage   [W: 64 rows by 64 of K, once or twice] [x: kTokens x 128 bytes]      one warpgroup's
//
// Tiles are counted kBand token tiles at a time, down the rows of W: blocks side by side share rows of W and tokens in
// L2. A cluster of blocks owns a tile of as many times 128 rows, each block 128 of them; a block whose rows lie past the
// last one goes along, and stores nothing.
#pragma once

#include "gemm_work.cuh"
#include "tiles.cuh"

// A tile's first row of W's tiles, and its first token.
struct Place {
    int tile_row, token;
};

// `Layer` is that of epilogue.cuh, with kK, T, and how a Weight lies (gemv_weight.cuh, gemv_quant.cuh). kStages: of the
// ring. kBlocks: of the grid; kCluster: of a cluster. kShared: Work's.
// kQuick: how a tile ends (gemm_quick_end.cuh).
template <class Layer, int kTokens_, int kStages_, int kBlocks, int kShared, int kBand, int kCluster_ = 1,
          bool kAlong_ = false, int kTurns_ = 0, bool kQuick_ = false>
struct Tiling {
    static_assert(kBlocks % kCluster_ == 0, "the grid is whole clusters");
    using L = Layer;
    static constexpr int kTokens = kTokens_, kStages = kStages_, kCluster = kCluster_;
    static constexpr bool kAlong = kAlong_;
    static constexpr int kTurns = kTurns_;
    static constexpr bool kQuick = kQuick_;
    static constexpr bool kOfExperts = false;  // whether tiles have weights of their own (experts_gemm.cuh)
    static_assert(!(kAlong && kTurns), "a tile has one warpgroup, or two");
    static constexpr int kGroups = 2;  // warpgroups that multiply
    static constexpr int kRowGroups = kTurns ? kTurns : kAlong ? 1 : kGroups;  // rows of W's tiles in a block's tile
    static constexpr int kHalves = kAlong ? 2 : 1;                             // steps in a stage
    static constexpr int kOwnRows = kTurns ? kTurns : 1;                       // of them a warpgroup has so many
    static constexpr int kReaders = kTurns ? 1 : kGroups;                      // warpgroups that read a stage
    static constexpr int kOwners = kRowGroups / kOwnRows;                      // and finish a block's tile
    static constexpr int kRowSums = kTokens / 2, kSums = kOwnRows * kRowSums;  // that a thread holds
    static constexpr int kTileGroups = kRowGroups * kCluster;  // a cluster's rows of W's tiles in a tile
    static constexpr int kGroupBytes = 4 * L::Weight::kPieceBytes;  // of the weight, for 64 rows' step
    static constexpr int kStageGroups = kTurns ? kTurns : kGroups;  // of these in a stage
    static constexpr int kWeightBytes = round_up(kStageGroups * kGroupBytes, 1024);  // x is swizzled by 1024
    static constexpr int kXBytes = kTokens * kRowBytes;
    static constexpr int kStageBytes = kWeightBytes + kHalves * kXBytes;

    static constexpr int n_tile_rows = tile_rows(L::kN, L::kGated);
    static constexpr int n_columns = ceil_div(L::kK, kTile), n_steps = n_columns / kHalves;
    static_assert(n_columns % kHalves == 0, "both warpgroups have something to multiply in every step");
    static constexpr int n_row_tiles = ceil_div(n_tile_rows, kTileGroups), n_token_tiles = ceil_div(L::kM, kTokens);
    static constexpr int kPaddedM = round_up(L::kM, 8);
    static constexpr bool kFullTiles = n_tile_rows % kTileGroups == 0;  // each warpgroup has rows in every tile

    using W = Work<n_row_tiles * n_token_tiles, n_steps, kBlocks / kCluster, kShared>;

    // Which of Work's blocks this is, or is part of; and the cluster's how many-th.
    static __device__ int worker() { return blockIdx.x / kCluster; }
    static __device__ int rank() { return blockIdx.x % kCluster; }

    // This block's part of a tile.
    static __device__ Place place_of(int tile) {
        constexpr int kBandTiles = kBand * n_row_tiles;
        const int band = tile / kBandTiles, within = tile % kBandTiles;
        const int width = n_token_tiles % kBand == 0 ? kBand : min(kBand, n_token_tiles - band * kBand);
        return {within / width * kTileGroups + rank() * kRowGroups, (band * kBand + within % width) * kTokens};
    }

    // Of a tile at the edge: how many rows of W's tiles there are, and how many rows of x.
    static __device__ int tile_rows_at(const Place &place) {
        return max(0, min(kRowGroups, n_tile_rows - place.tile_row));
    }
    static __device__ int tokens_at(const Place &place) { return min(kTokens, kPaddedM - place.token); }

    // What a step needs of the weight, for one warpgroup, and of x.
    static __device__ const unsigned char *weight_at(const void *weight, const Place &place, int group, int step) {
        const int64_t at = int64_t(place.tile_row + (kAlong ? 0 : group)) * n_columns + kHalves * step + (kAlong ? group : 0);
        return static_cast<const unsigned char *>(weight) + at * kGroupBytes;
    }
    // From the first bias to that of W's first row, of which there is one W here.
    static __device__ constexpr int64_t bias_offset(const Place &) { return 0; }

    static __device__ const unsigned char *x_at(const void *x, const Place &place, int step, int half) {
        const int first = kTile * (kHalves * step + half);
        return static_cast<const unsigned char *>(x) + 2 * activation_index(kPaddedM, place.token, first);
    }
};

// The threads that own 64 rows of a tile together.
struct Warpgroup {
    int index;   // of the block's warpgroups that multiply
    int part;    // of a stage's weight, and of a tile's rows: the first that is its own
    int thread;  // of the 128

    __device__ void meet() const { named_barrier(1 + index, 128); }
};
