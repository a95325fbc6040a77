// Weights in 8 and 4 bits, taken apart in registers: the GEMV of gemv.cuh with half and a quarter of the bytes.
//
// A piece, 16 rows by 64 of K, lies as its lanes read it, 16 bytes at a time; the four pieces of 64 rows lie together, a
// column of 64 of K behind the other (quant_strips.py packs):
//
//     int8, fp8   [half][lane] { row g: 8 bytes; row g + 8: 8 bytes }               1024 bytes
//     int4        [lane][half] { row g: 8 nibbles; row g + 8: 8 nibbles }            512 bytes
//                 then f16 scales: groups of 32 [g][half][row g, row g + 8], of 128 [g][row g, row g + 8]
//
// The eight are elements 2t, 2t + 1 of each chunk of a half (32 of K): in the order of mma's and wgmma's own fragments.
//
// int8 and fp8 have one f32 scale a row, behind all pieces, applied to the finished sum. An int4 scale is applied to the
// sum of its 32 products. So codes are multiplied as they are, exact in T.
//
// Codes become numbers as codes.cuh says; a mask takes two that are 16 bits apart, which are neighbours along K.
// Of int4 they are multiplied raised by 136 (bf16), which is taken away from the sums of 32: products with -136, once for
// all rows of a column, are what those begin with.
//
// Instructions for two weights, as they stand in machine code, beside the products: int8 3.5 in bf16, 2.5 in f16; fp8 3.5
// (2 for the two codes that lie in place, 5 for those around them); int4 1.8, and 0.8 for scales. For a column of 64 rows in
// all, with its wait and its copies: int8 300, int4 262, in pairs of columns 235. A multiprocessor of an H200
// issues 4 a clock, for 32 lanes each, while memory brings 18.6 bytes: 880 for 4096 bytes in int8, 496 for 2304 in int4.
#pragma once

#include "codes.cuh"
#include "gemv_weight.cuh"

// Nibbles 0 and 4 of a word, which are codes + 8, as numbers that are greater than the codes by an offset: 136 in bf16,
// 1032 in f16, exactly.
__device__ __forceinline__ uint32_t raised_nibbles(bf16, uint32_t word) {
    return bits_of<kAndOr>(word, 0x000f000f, 0x43004300);
}
__device__ __forceinline__ uint32_t raised_nibbles(f16, uint32_t word) {
    return bits_of<kAndOr>(word, 0x000f000f, 0x64006400);
}

template <class T>
constexpr uint32_t kMinusOffsets = 0;  // two of what takes it away
template <>
constexpr uint32_t kMinusOffsets<bf16> = 0xc308c308;
template <>
constexpr uint32_t kMinusOffsets<f16> = 0xe408e408;

// The codes of nibbles 0 and 4.
template <class T>
__device__ __forceinline__ uint32_t nibbles(T type, uint32_t word) {
    return subtract2(type, raised_nibbles(type, word), kMinusOffsets<T> ^ 0x80008000);
}

// Which piece of a weight it is: those of four strips are neighbours, as rows of a tile are.
__device__ __forceinline__ int64_t piece_index(int strip, int column, int columns) {
    return (int64_t(strip / 4) * columns + column) * 4 + strip % 4;
}

template <class T, class Codes>
struct ByteWeight {
    static constexpr int kPieceBytes = 1024, kColumnStep = 4 * kPieceBytes;
    static constexpr bool kByChunks = false;
    static constexpr bool kGroupScales = false, kRowScales = true, kPowers = false;

    uint4 halves[2];  // rows g (x, y) and g + 8 (z, w)

    static __device__ int64_t offset(int strip, int column, int columns) {
        return piece_index(strip, column, columns) * kPieceBytes;
    }

    static __device__ __forceinline__ void ask(unsigned char *slot, const unsigned char *piece) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int at = (32 * half + lane_index()) * 16;
            cp_async_16(slot + at, piece + at);
        }
    }

    __device__ __forceinline__ void take(const unsigned char *slot) {
#pragma unroll
        for (int half = 0; half < 2; half++) halves[half] = load_16(slot + (32 * half + lane_index()) * 16);
    }

    __device__ __forceinline__ void fragments(uint32_t (&a)[2][4], int half) const {
        const uint32_t words[2][2] = {{halves[half].x, halves[half].z}, {halves[half].y, halves[half].w}};
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int row = 0; row < 2; row++) {
                a[i][row] = Codes::first(T(), words[i][row]);
                a[i][row + 2] = Codes::second(T(), words[i][row]);
            }
        }
    }

    __device__ float scale(int, int) const { return 1.0f; }
};

template <class T>
using Int8Weight = ByteWeight<T, Int8Codes>;
template <class T>
using Fp8Weight = ByteWeight<T, Fp8Codes>;

template <class T, int kGroup>
struct Int4Weight {
    static_assert(kGroup == 32 || kGroup == 128, "what compiler/quantization/quantize.py makes");
    static constexpr int kScaleBytes = kGroup == 32 ? 64 : 32, kPieceBytes = 512 + kScaleBytes;
    static constexpr int kColumnStep = 4 * kPieceBytes;
    static constexpr bool kByChunks = false;
    static constexpr bool kGroupScales = true, kRowScales = false, kPowers = false;

    uint4 words;          // rows g and g + 8 of a half, then of the other
    uint32_t scales[2];   // of rows g and g + 8, for each half; one for both where groups are longer

    static __device__ int64_t offset(int strip, int column, int columns) {
        return piece_index(strip, column, columns) * kPieceBytes;
    }

    static __device__ __forceinline__ void ask(unsigned char *slot, const unsigned char *piece) {
        const int at = lane_index() * 16;
        cp_async_16(slot + at, piece + at);
        if (at < kScaleBytes) cp_async_16(slot + 512 + at, piece + 512 + at);
    }

    __device__ __forceinline__ void take(const unsigned char *slot) {
        __syncwarp();  // scales came by other lanes
        words = load_16(slot + lane_index() * 16);
        const unsigned char *from = slot + 512 + lane_index() / 4 * (kScaleBytes / 8);
        if constexpr (kGroup == 32) {
            const uint2 both = *reinterpret_cast<const uint2 *>(from);
            scales[0] = both.x, scales[1] = both.y;
        } else {
            scales[0] = scales[1] = *reinterpret_cast<const uint32_t *>(from);
        }
    }

    __device__ __forceinline__ void fragments(uint32_t (&a)[2][4], int half) const {
        fragments_by(a, half, [](uint32_t word) { return nibbles(T(), word); });
    }

    // Of codes that are raised by an offset: one instruction less for two of them.
    static constexpr uint32_t kMinusOffset = kMinusOffsets<T>;

    __device__ __forceinline__ void raised_fragments(uint32_t (&a)[2][4], int half) const {
        fragments_by(a, half, [](uint32_t word) { return raised_nibbles(T(), word); });
    }

    // In f16, where a pair and the next lie in one word as they are multiplied, the next sixteenfold: raised by 1024 and by
    // the code's own 8, or 16 times 8 (gemv_kept.cuh).
    __device__ __forceinline__ void high_fragments(uint32_t (&a)[2][4], int half) const {
        const uint32_t rows[2] = {half ? words.z : words.x, half ? words.w : words.y};
#pragma unroll
        for (int row = 0; row < 2; row++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t word = rows[row] >> 8 * i;
                a[i][row] = bits_of<kAndOr>(word, 0x000f000f, 0x64006400);
                a[i][row + 2] = bits_of<kAndOr>(word, 0x00f000f0, 0x64006400);
            }
        }
    }

    // Of row g (0) or g + 8 (1).
    __device__ float scale(int half, int row) const {
        const float2 both = unpack2<f16>(scales[half]);
        return row ? both.y : both.x;
    }

    // As signed bytes (gemv_digits.cuh), 16 times what they stand for: which word and byte of a half a lane's pairs begin
    // in, and the left operand.
    static constexpr float kCodeUnit = 1.0f / 16;
    static __device__ constexpr int word_of(int pair) { return pair % 2; }
    static __device__ constexpr int byte_of(int pair) { return pair / 2; }

    __device__ __forceinline__ void codes(uint32_t (&a)[4], int half) const {
        const uint32_t rows[2] = {half ? words.z : words.x, half ? words.w : words.y};
#pragma unroll
        for (int row = 0; row < 2; row++) {
            a[row] = bits_of<kXorAnd>(rows[row] << 4, 0x80808080, 0xf0f0f0f0);
            a[row + 2] = bits_of<kXorAnd>(rows[row], 0x80808080, 0xf0f0f0f0);
        }
    }

  private:
    template <class Numbers>
    __device__ __forceinline__ void fragments_by(uint32_t (&a)[2][4], int half, const Numbers &numbers) const {
        const uint32_t rows[2] = {half ? words.z : words.x, half ? words.w : words.y};
#pragma unroll
        for (int row = 0; row < 2; row++) {
            a[0][row] = numbers(rows[row]);
            a[0][row + 2] = numbers(rows[row] >> 4);
            a[1][row] = numbers(rows[row] >> 8);
            a[1][row + 2] = numbers(rows[row] >> 12);
        }
    }
};
