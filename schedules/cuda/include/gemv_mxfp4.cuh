// Weights in mxfp4: floats of 4 bits (e2m1) and a power of two for each 32 along K, taken apart in registers.
//
//     piece       16 rows by 64 of K: as int4's (gemv_quant.cuh), 512 bytes; then powers, exponent + 127 in a byte each:
//                 [g] { half 0: row g, row g + 8; half 1: the same }                                      32 bytes
//     word        eight codes in four pairs, each turned so that they fill it (schedules/mxfp4_words.py): a mask for the
//                 first, a turn and a mask for the next two, both twice for the last, which is in two parts
//
// What a mask leaves is 2^-126 of what the codes say, subnormal numbers too; multiplied by 2^126 it is exact in bf16. A
// GEMV applies the power of 32 codes to the sum of their products. A GEMM multiplies codes by it before: no number is
// rounded, a weight is what it would be if it were stored in bf16.
//
// Instructions for two weights, beside products and powers: 2.25 and a multiplication; int4 takes 1.75. On paper 360 for a
// column of 64 rows, while memory brings its 2176 bytes a multiprocessor of an H200 issues 468 (gemv_quant.cuh).
#pragma once

#include "gemv_quant.cuh"

template <class T>
struct Mxfp4Weight;  // f16 has not the range

template <>
struct Mxfp4Weight<bf16> {
    static constexpr int kScaleBytes = 32, kPieceBytes = 512 + kScaleBytes, kColumnStep = 4 * kPieceBytes;
    static constexpr bool kByChunks = false;
    static constexpr bool kGroupScales = true, kRowScales = false, kPowers = true;

    uint4 words;      // rows g and g + 8 of a half, then of the other
    uint32_t powers;  // a byte for each

    static __device__ int64_t offset(int strip, int column, int columns) {
        return piece_index(strip, column, columns) * kPieceBytes;
    }

    static __device__ __forceinline__ void ask(unsigned char *slot, const unsigned char *piece) {
        const int at = lane_index() * 16;
        cp_async_16(slot + at, piece + at);
        if (at < kScaleBytes) cp_async_16(slot + 512 + at, piece + 512 + at);
    }

    __device__ __forceinline__ void take(const unsigned char *slot) {
        __syncwarp();  // powers came by other lanes
        words = load_16(slot + lane_index() * 16);
        powers = *reinterpret_cast<const uint32_t *>(slot + 512 + lane_index() / 4 * 4);
    }

    __device__ __forceinline__ void fragments(uint32_t (&a)[2][4], int half) const {
        const uint32_t rows[2] = {half ? words.z : words.x, half ? words.w : words.y};
#pragma unroll
        for (int row = 0; row < 2; row++) {
            const uint32_t word = rows[row];
            a[0][row] = number(word & 0x81c081c0);
            a[0][row + 2] = number(turned(word, 6) & 0x81c081c0);
            a[1][row] = number(turned(word, 10) & 0x81c081c0);
            a[1][row + 2] = number(bits_of<kAndOr>(turned(word, 4), 0x80c080c0, turned(word, 12) & 0x01000100));
        }
    }

    // Of row g (0) or g + 8 (1): as a number, and two of it in bf16.
    __device__ float scale(int half, int row) const { return __uint_as_float(field(half, row, 23)); }
    __device__ uint32_t scale_pair(int half, int row) const {
        const uint32_t one = field(half, row, 7);
        return one | one << 16;
    }

  private:
    static __device__ uint32_t turned(uint32_t word, int places) { return word >> places | word << (32 - places); }

    // 2^126 times two numbers of bf16.
    static __device__ uint32_t number(uint32_t bits) { return multiply2(bf16(), bits, 0x7e807e80); }

    // A power's byte, so many places up.
    __device__ uint32_t field(int half, int row, int places) const {
        const int from = 16 * half + 8 * row;
        const uint32_t moved = from > places ? powers >> (from - places) : powers << (places - from);
        return moved & 0xffu << places;
    }
};
