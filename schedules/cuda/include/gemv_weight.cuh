// A weight on its way from memory to the tensor cores, one strip (16 rows) by one column (64 of K) at a time.
//
// A lane (g = lane / 4, t = lane % 4) brings 8 consecutive k of rows g and g + 8, chunk t, and the same of chunk t + 4.
// mma.m16n8k16 asks a lane for elements 2t, 2t + 1, 2t + 8, 2t + 9 of 16: but a sum does not care in which order k
// comes, as long as x comes in the same. So the first four of the eight feed one mma, the other four the next:
//
//     chunk t of row g        [ 0 1 | 2 3 | 4 5 | 6 7 ]        registers of mma 0: a0 = 0 1, a2 = 2 3
//     chunk t of row g + 8    [ 0 1 | 2 3 | 4 5 | 6 7 ]                            a1 = 0 1, a3 = 2 3   of mma 1: 4 … 7
//     chunk t of token g      [ 0 1 | 2 3 | 4 5 | 6 7 ]                            b0 = 0 1, b1 = 2 3
//
// So a lane copies 16 bytes at a time from memory to shared memory, and reads back what it copied itself, straight into
// the registers that multiply: no barrier, and copies are waited for one stage after the other. (Loads to registers
// would do without shared memory, but the compiler waits for all of them at once.) Quantised weights are stored in
// mma's own order instead (gemv_quant.cuh).
#pragma once

#include "gemv_x.cuh"

// Brings a piece to L2; a whole warp calls.
template <int kBytes>
__device__ __forceinline__ void prefetch_piece(const unsigned char *piece) {
#ifdef LLMC_HAS_BULK_COPY
    if (lane_index() == 0) bulk_prefetch_l2(piece, kBytes);
#else
    for (int at = 32 * lane_index(); at < kBytes; at += 1024) prefetch_l2(piece + at);
#endif
}

// Weights in T, in the tiles of tiles.cuh: 2048 bytes a piece.
template <class T>
struct PlainWeight {
    static constexpr int kPieceBytes = kStripBytes;
    static constexpr bool kByChunks = true;  // what a lane holds of 32 elements of K is chunk t
    static constexpr bool kGroupScales = false, kRowScales = false, kPowers = false;

    uint4 rows[2][2];  // [chunk t, t + 4][row g, g + 8]

    // Bytes from the weight's start to a piece, and to the next column's.
    static constexpr int kColumnStep = kTileBytes;
    static __device__ int64_t offset(int strip, int column, int columns) { return strip_offset(strip, column, columns); }

    // Asks for a piece: a warp copies it to its slot, kPieceBytes of shared memory.
    static __device__ __forceinline__ void ask(unsigned char *slot, const unsigned char *piece) {
        const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            cp_async_16(slot + (32 * i + lane_index()) * 16, piece + i % 2 * 8 * kRowBytes + chunk_offset(g, t + 4 * (i / 2)));
        }
    }

    // What has come to the slot.
    __device__ __forceinline__ void take(const unsigned char *slot) {
#pragma unroll
        for (int i = 0; i < 4; i++) rows[i / 2][i % 2] = load_16(slot + (32 * i + lane_index()) * 16);
    }

    // The left operands of the two mma of a half.
    __device__ __forceinline__ void fragments(uint32_t (&a)[2][4], int half) const {
        const uint4 low = rows[half][0], high = rows[half][1];
        a[0][0] = low.x, a[0][1] = high.x, a[0][2] = low.y, a[0][3] = high.y;
        a[1][0] = low.z, a[1][1] = high.z, a[1][2] = low.w, a[1][3] = high.w;
    }
};

// sums += 16 rows of the weight, of half a column, by 8 tokens of x.
template <class T>
__device__ __forceinline__ void multiply_half(float (&sums)[4], const uint32_t (&a)[2][4], const uint4 &x) {
    const uint32_t b[2][2] = {{x.x, x.y}, {x.z, x.w}};
    mma_16816<T>(sums, a[0], b[0]);
    mma_16816<T>(sums, a[1], b[1]);
}

// What sums of each half of a column begin with, in all rows: nothing, or what takes away an offset that codes are
// multiplied with.
template <class T, class Weight, int kTokenTiles>
struct ColumnStart {
    static constexpr bool kRaised = Weight::kGroupScales && !Weight::kPowers;
    float sums[kRaised ? kTokenTiles : 1][2][4];

    __device__ __forceinline__ explicit ColumnStart(const uint4 (&x)[kTokenTiles][2]) : sums() {
        if constexpr (kRaised) {
            constexpr uint32_t kPair = Weight::kMinusOffset;
            constexpr uint32_t a[2][4] = {{kPair, kPair, kPair, kPair}, {kPair, kPair, kPair, kPair}};
#pragma unroll
            for (int i = 0; i < 2 * kTokenTiles; i++) multiply_half<T>(sums[i / 2][i % 2], a, x[i / 2][i % 2]);
        }
    }
};

// sums[tile] += 16 rows of the weight by 8 tokens of x, over the 64 k of a column.
template <class T, class Weight, int kTokenTiles>
__device__ __forceinline__ void multiply_piece(float (&sums)[kTokenTiles][4], const Weight &weight,
                                               const uint4 (&x)[kTokenTiles][2],
                                               const ColumnStart<T, Weight, kTokenTiles> &start) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t a[2][4];
        constexpr bool kRaised = ColumnStart<T, Weight, kTokenTiles>::kRaised;
        if constexpr (kRaised) {
            weight.raised_fragments(a, half);
        } else {
            weight.fragments(a, half);
        }
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; tile++) {
            if constexpr (Weight::kGroupScales) {
                const float(&first)[4] = start.sums[kRaised ? tile : 0][half];
                float part[4] = {first[0], first[1], first[2], first[3]};
                multiply_half<T>(part, a, x[tile][half]);
#pragma unroll
                for (int i = 0; i < 4; i++) sums[tile][i] += weight.scale(half, i / 2) * part[i];
            } else {
                multiply_half<T>(sums[tile], a, x[tile][half]);
            }
        }
    }
}
