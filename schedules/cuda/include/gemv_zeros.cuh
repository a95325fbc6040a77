// Weights in int4 whose groups have a zero besides their scale: (code - zero) * scale (gemv_quant.cuh has the others).
//
//     piece       as int4's: 512 bytes of nibbles, then f16 scales; then zeros, f16, in the same order: 64 or 32 bytes
//
// A GEMV multiplies codes that are raised by an offset, and begins a group's sums with -offset times the sum of x, the
// same for all rows (ColumnStart). From that comes what a row's zero takes away as well: zero / offset of it, one
// multiply-add for each sum of a group. (For a GEMM: gemm_zeros.cuh.)
#pragma once

#include "gemv_quant.cuh"

template <class T>
constexpr float kOffset = 0;  // what codes are raised by
template <>
constexpr float kOffset<bf16> = 136;
template <>
constexpr float kOffset<f16> = 1032;

template <class T, int kGroup>
struct Int4ZerosWeight : Int4Weight<T, kGroup> {
    using Plain = Int4Weight<T, kGroup>;
    static constexpr int kScaleBytes = Plain::kScaleBytes, kPieceBytes = 512 + 2 * kScaleBytes;
    static constexpr int kColumnStep = 4 * kPieceBytes;

    uint32_t zeros[2];  // as scales

    static __device__ int64_t offset(int strip, int column, int columns) {
        return piece_index(strip, column, columns) * kPieceBytes;
    }

    static __device__ __forceinline__ void ask(unsigned char *slot, const unsigned char *piece) {
        const int at = lane_index() * 16;
        cp_async_16(slot + at, piece + at);
        if (at < 2 * kScaleBytes) cp_async_16(slot + 512 + at, piece + 512 + at);
    }

    __device__ __forceinline__ void take(const unsigned char *slot) {
        Plain::take(slot);
        const unsigned char *from = slot + 512 + kScaleBytes + lane_index() / 4 * (kScaleBytes / 8);
        if constexpr (kGroup == 32) {
            const uint2 both = *reinterpret_cast<const uint2 *>(from);
            zeros[0] = both.x, zeros[1] = both.y;
        } else {
            zeros[0] = zeros[1] = *reinterpret_cast<const uint32_t *>(from);
        }
    }

    // Of row g (0) or g + 8 (1).
    __device__ float zero(int half, int row) const {
        const float2 both = unpack2<f16>(zeros[half]);
        return row ? both.y : both.x;
    }
};

// sums[tile] += 16 rows of the weight by 8 tokens of x, over the 64 k of a column.
template <class T, int kGroup, int kTokenTiles>
__device__ __forceinline__ void multiply_piece(float (&sums)[kTokenTiles][4], const Int4ZerosWeight<T, kGroup> &weight,
                                               const uint4 (&x)[kTokenTiles][2],
                                               const ColumnStart<T, Int4ZerosWeight<T, kGroup>, kTokenTiles> &start) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t a[2][4];
        weight.raised_fragments(a, half);
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; tile++) {
            const float(&first)[4] = start.sums[tile][half];
            float part[4] = {first[0], first[1], first[2], first[3]};
            multiply_half<T>(part, a, x[tile][half]);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float less = weight.zero(half, i / 2) * (1 / kOffset<T>);
                sums[tile][i] += weight.scale(half, i / 2) * (part[i] + less * first[i]);
            }
        }
    }
}
