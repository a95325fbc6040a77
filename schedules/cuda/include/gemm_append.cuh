// The end of a tile of queries, keys and values: they are turned, rounded, and stored where attention reads them.
//
//     queries   [ceil(M/64)][heads][D/8][64 rows][8]          as a page's keys lie (attention_rows.cuh)
//     keys      turned, and values: in the pages of the cache
//
// Rotary turns elements i and i + RD/2 of a head by the angles of the row's position. They are sums of different
// warpgroups, or of one warpgroup's first and other 64 rows: so all who end a tile bring a few tokens of it to shared
// memory and take two chunks of 8 elements that turn each other from there, in float32:
//
//     meet | 16 or 8 sums to shared memory | meet | two chunks of a token | angles of the next round | turn, round, store
//
// A warp has the same two chunks of 32 (or 16) tokens, and stores 512 (256) bytes in a row. What is rounded and when is
// what attention_append() makes of the product's float32: the same bits.
//
// Bytes of a tile: 2 RD of angles a token and tile of queries or keys, from L2; 2 an output.
//
// L has beside what epilogue.cuh lists:
//     Heads     attention.cuh's Shape
#pragma once

#include "attention_turn.cuh"
#include "gemm_wgmma.cuh"

template <class L>
constexpr bool kAppends<L, typename Void<typename L::Heads>::Type> = true;

// Tables [M, RD/2]; positions [M], less than 0 for a row that is none; page_table [M, pages]; the layer's part of the
// cache.
template <class L>
struct HandedOn<L, typename Void<typename L::Heads>::Type> {
    const float *cos, *sin;
    const int *positions, *page_table;
    typename L::Heads::Kv *kv;
    typename L::Heads::T *queries;
};

// The end of a tile for one thread: of all its rows that are the thread's. What it reads is asked for before the products.
template <class Tiling, bool>
struct AppendEnd {
    using L = typename Tiling::L;
    using Shape = typename L::Heads;
    using T = typename Shape::T;
    static constexpr int D = Shape::head_dim, kHeadUnits = D / 16, n_heads = Shape::heads + 2 * Shape::kv_heads;
    static constexpr int kHalf = Shape::rotary_dim / 2, kHalfChunks = kHalf / 8;
    static constexpr int kUnits = 4 * Tiling::kRowGroups;                 // two chunks each, of a token in a tile
    static constexpr int kRound = 128 * Tiling::kOwners / kUnits;         // tokens that go through together
    static constexpr int kRounds = ceil_div(Tiling::kTokens, kRound);
    static constexpr int kGroupFloats = kRound * kStagedRow<L>;           // of 64 outputs
    static constexpr bool kAllTokens = L::kM % Tiling::kTokens == 0 && Tiling::kTokens % kRound == 0;
    static constexpr bool kWholeTiles = Tiling::kTokens % kTileRows == 0;  // of queries
    static_assert(kHalf % 8 == 0 && !Shape::interleaved, "whole chunks turn each other");
    static_assert(D <= kTile * Tiling::kRowGroups || 2 * kHalf <= kTile * Tiling::kRowGroups, "and both are in the tile");

    const Epilogue<L> &epilogue;
    Warpgroup group;
    RowEpilogue<Tiling> rows, last;  // of the first 64 rows that are the thread's, and of the last
    int first_token, token;          // of the tile; of a round
    int head, chunk[2], column;      // of qkv; of the head, which turn each other; of the head's first output in the tile
    bool turns;
    int slot[kRounds];  // of the cache's tokens; less than 0 where nothing is stored
    Eight cos[2], sin[2];  // of a round, and of the next

    __device__ __forceinline__ AppendEnd(const Place &place, const Warpgroup &group, const Epilogue<L> &epilogue)
        : epilogue(epilogue), group(group), rows(rows_of(place, group, 0)),
          last(rows_of(place, group, Tiling::kOwnRows - 1)), first_token(place.token), token(thread() % kRound) {
        const int units = place.tile_row * (kTile / 16) + thread() / kRound, unit = units % kHeadUnits;
        head = units / kHeadUnits, column = head * D - place.tile_row * kTile;
        turns = unit < kHalfChunks && head < Shape::heads + Shape::kv_heads;
        chunk[0] = unit < kHalfChunks ? unit : 2 * unit, chunk[1] = chunk[0] + (unit < kHalfChunks ? kHalfChunks : 1);
        read_slots();
        rows.read(epilogue);
        if constexpr (Tiling::kOwnRows > 1) last.read(epilogue);
        read_angles(0), read_angles(1);
    }

    static __device__ RowEpilogue<Tiling> rows_of(const Place &place, const Warpgroup &group, int own) {
        return {(place.tile_row + group.part + own) * kTile, group.thread / 32, lane_index() / 4};
    }

    // Of those who end a tile.
    __device__ int thread() const { return kJoint<Tiling> ? 128 * group.part + group.thread : group.thread; }

    __device__ bool is_row(int round) const {
        const int within = round * kRound + token;
        return kAllTokens || (within < Tiling::kTokens && first_token + within < L::kM);
    }

    __device__ __forceinline__ void read_slots() {
        const int *positions = epilogue.next.positions + first_token + token;
        const int *pages = epilogue.next.page_table + (first_token + token) * Shape::pages;
#pragma unroll
        for (int round = 0; round < kRounds; round++) {
            slot[round] = head < n_heads && is_row(round) ? positions[round * kRound] : -1;
        }
#pragma unroll
        for (int round = 0; round < kRounds; round++) {
            const int at = slot[round];
            if (at < 0 || head < Shape::heads) continue;
            slot[round] = pages[round * kRound * Shape::pages + at / kPageTokens] * kPageTokens + at % kPageTokens;
        }
    }

    __device__ __forceinline__ void read_angles(int round) {
        if constexpr (kHalf > 0) {
            if (round >= kRounds || !turns || !is_row(round)) return;
            const int at = (first_token + token) * kHalf + 8 * chunk[0];
            cos[round % 2] = load_eight(epilogue.next.cos + at + round * kRound * kHalf);
            sin[round % 2] = load_eight(epilogue.next.sin + at + round * kRound * kHalf);
        }
    }

    // staging: of all who end the tile, in shared memory.
    __device__ __forceinline__ void store(float (&sums)[Tiling::kSums], float *staging) {
        const float2 *norms = norms_at<Tiling>(epilogue.front.norms, first_token);
#pragma unroll
        for (int round = 0; round < kRounds; round++) {
            meet<Tiling>(group);  // the last tokens have left the shared memory
#pragma unroll
            for (int own = 0; own < Tiling::kOwnRows; own++) {
                float *to = staging + (group.part + own) * kGroupFloats;
                stage_tokens<Tiling, kRound>(row_sums<Tiling>(sums, own), to, own > 0 ? last : rows,
                                             round * kRound / 2, group.thread / 32, norms);
            }
            meet<Tiling>(group);
            Eight x[2] = {take(staging, chunk[0]), take(staging, chunk[1])};
            if (turns) turn_chunks(x, cos[round % 2], sin[round % 2]);
            read_angles(round + 2);
            if (slot[round] >= 0) put(x, round);
        }
    }

    // A chunk of the head, of the round's token.
    __device__ __forceinline__ Eight take(const float *staging, int chunk) const {
        const int output = column + 8 * chunk;
        return load_eight(staging + output / kTile * kGroupFloats + token * kStagedRow<L> + output % kTile);
    }

    __device__ __forceinline__ void put(const Eight (&x)[2], int round) const {
        T *to = head < Shape::heads ? query_place(round) : page_place(round);
#pragma unroll
        for (int j = 0; j < 2; j++) store_16(to + 8 * kPageTokens * chunk[j], pack_eight<T>(x[j]));
    }

    __device__ __forceinline__ T *query_place(int round) const {
        const int within = round * kRound, row = first_token + within + token;
        T *queries = epilogue.next.queries;
        if constexpr (kWholeTiles) {
            T *first = query_tile<Shape>(queries, first_token / kTileRows, head) + 8 * token;
            return first + within / kTileRows * (Shape::heads * kTileRows * D) + 8 * (within % kTileRows);
        }
        return query_tile<Shape>(queries, row / kTileRows, head) + 8 * (row % kTileRows);
    }

    __device__ __forceinline__ T *page_place(int round) const {
        const int kv_head = head - Shape::heads, page = slot[round] / kPageTokens;
        return page_head<Shape>(epilogue.next.kv, page, kv_head % Shape::kv_heads) +
               8 * (slot[round] % kPageTokens) + kv_head / Shape::kv_heads * kHeadElements<Shape>;
    }
};
