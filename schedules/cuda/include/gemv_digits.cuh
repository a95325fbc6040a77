// Products of whole numbers: codes of 4 bits as they are stored, by x in two digits of 8 bits. Nothing is widened.
//
// Of a column (64 of K) a token's x is q · unit, unit a power of two for which the largest |q| has 15 bits; q = 256 high +
// low, both signed bytes. A number of 8 significant bits is exact unless it is smaller than a 128th of the column's
// largest; then it is rounded to 2^-16 of that, where the largest itself was rounded to 2^-9. Sums over a column are
// exact.
//
//     mma.m16n8k32    A: 16 rows of codes    B: columns 2m and 2m + 1 are the digits of token m, M <= 4
//
// so that lane 4 g + t has both digits of the sums of token t, rows g and g + 8. Which element of K a byte stands for is
// the weight's matter (quant_strips.py); x is stored in the same order, 16 bytes for each digit and t:
//
//     word i (of two a half), byte b      element b / 2 of the lane's pair i + 2 (b % 2)
//                                         (the low nibbles of a word, then the high ones)
#pragma once

#include "gemv_kept.cuh"
#include "gemv_quant.cuh"

// A GEMV `G` with kDigits, of M <= 4 tokens whose x lies tiled.
template <class G>
struct GemvDigits {
    static_assert(!G::kDigits || (G::kM <= 4 && G::kTiledX && G::kSharedX), "tokens in digits");
    static_assert(!G::kDigits || G::Weight::kGroupScales, "codes of 4 bits");
    static constexpr int kColumns = ceil_div(G::kK, kTile);
    static constexpr int kStride = G::kSplit * G::kWarps;  // from a warp's step to its next
    static constexpr int kOwn = ceil_div(kColumns, kStride * G::kDepth) * G::kDepth;  // columns of a warp
    static constexpr int kItems = kOwn * G::kM;  // of a warp: a column of a token
    static constexpr int kPasses = ceil_div(kItems, 4), kTogether = kPasses < 8 ? kPasses : 4;
    static constexpr int kTokenBytes = 128;  // of a column: [digit][t] 16 bytes
    static constexpr int kHeld = G::kKept ? kOwn : kColumns;    // side by side: a warp's own, or all
    static constexpr int kUnits = kHeld * G::kM * kTokenBytes;  // where units begin
    static constexpr int kPartBytes = round_up(kUnits + 4 * kHeld * G::kM, 16);
    static constexpr int kBytes = kPartBytes * (G::kKept ? G::kWarps : 1);  // of shared memory

    struct Column {
        uint4 digits;  // of token lane / 8, digit lane / 4 % 2
        float unit;    // of token lane % 4
    };

    static __device__ __forceinline__ void take(Column &x, const unsigned char *shared, int column) {
        const int first = column * G::kM, token = min(lane_index() / 8, G::kM - 1);  // any for one that is not there
        x.digits = load_16(shared + (first + token) * kTokenBytes + lane_index() % 8 * 16);
        x.unit = reinterpret_cast<const float *>(shared + kUnits)[first + min(lane_index() % 4, G::kM - 1)];
    }

    // Each warp brings the columns that it multiplies, `first` and on, eight lanes one of them: no other waits for it.
    // `shared`: of the block, or of the warp where it keeps its own.  `meanwhile()` while the first are on their way.
    template <class Work>
    static __device__ __forceinline__ void fill(unsigned char *shared, const void *tiled, int first, const Work &meanwhile) {
        for (int pass = 0; pass < kPasses; pass += kTogether) {
            uint32_t pairs[kTogether][4];
#pragma unroll
            for (int i = 0; i < kTogether; i++) {
                const Item item = {pass + i, first};
                const auto *x = static_cast<const unsigned char *>(tiled) + item.column * (round_up(G::kM, 8) * kRowBytes);
#pragma unroll
                for (int p = 0; p < 4; p++) {
                    const int at = chunk_offset(item.token, item.half * 4 + p) + 4 * item.t;
                    pairs[i][p] = item.is_there ? *reinterpret_cast<const uint32_t *>(x + at) : 0;
                }
            }
            if (pass == 0) meanwhile();
#pragma unroll
            for (int i = 0; i < kTogether; i++) put({pass + i, first}, shared, pairs[i]);
        }
        __syncwarp();
    }

  private:
    struct Item {
        int own, column, token, half, t;  // own: which of the warp's columns
        bool is_there;

        __device__ Item(int pass, int first) {
            const int index = pass * 4 + lane_index() / 8;
            column = GemvKept<G, kOwn, kStride>::column(first, index / G::kM), token = index % G::kM;
            own = index / G::kM, half = lane_index() / 4 % 2, t = lane_index() % 4;
            is_there = column < kColumns;
        }
    };

    // Eight elements of a token's column, as bf16: in digits to shared memory.
    static __device__ __forceinline__ void put(Item item, unsigned char *shared, const uint32_t (&pairs)[4]) {
        uint32_t largest = 0;  // bits of floats are in the order of their sizes
        float x[8];
#pragma unroll
        for (int p = 0; p < 4; p++) {
            const float2 both = unpack2<typename G::T>(pairs[p]);
            x[2 * p] = both.x, x[2 * p + 1] = both.y;
            largest = max(largest, max(__float_as_uint(fabsf(both.x)), __float_as_uint(fabsf(both.y))));
        }
#pragma unroll
        for (int offset = 4; offset > 0; offset /= 2) largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
        if (!item.is_there) return;
        const uint32_t exponent = max(largest >> 23, 24u);
        const float scale = __uint_as_float((268 - exponent) << 23), unit = __uint_as_float((exponent - 14) << 23);
        uint32_t high[2] = {}, low[2] = {};
#pragma unroll
        for (int e = 0; e < 8; e++) {
            const int q = min(__float2int_rn(x[e] * scale), 127 * 256 + 127);
            const int word = G::Weight::word_of(e / 2), place = 8 * (G::Weight::byte_of(e / 2) + 2 * (e % 2));
            high[word] |= (uint32_t(q + 128) >> 8 & 0xff) << place;
            low[word] |= (uint32_t(q) & 0xff) << place;
        }
        const int index = (G::kKept ? item.own : item.column) * G::kM + item.token;
        unsigned char *to = shared + index * kTokenBytes + item.t * 16 + item.half * 8;
        *reinterpret_cast<uint2 *>(to) = make_uint2(high[0], high[1]);
        *reinterpret_cast<uint2 *>(to + 64) = make_uint2(low[0], low[1]);
        const bool is_number = exponent < 255;  // infinity and NaN stay none
        if (lane_index() % 8 == 0) {
            const float one = is_number ? unit * G::Weight::kCodeUnit : __uint_as_float(0x7fc00000);
            reinterpret_cast<float *>(shared + kUnits)[index] = one;
        }
    }
};

// sums += 16 rows of the weight by a column of x: rows g and g + 8 of token t.
template <class Weight, class Column>
__device__ __forceinline__ void multiply_digits(float (&sums)[2], const Weight &weight, const Column &x) {
    const uint32_t b[2][2] = {{x.digits.x, x.digits.y}, {x.digits.z, x.digits.w}};
    float groups[2] = {};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t a[4];
        int d[4] = {};
        weight.codes(a, half);
        mma_16832(d, a, b[half]);
#pragma unroll
        for (int i = 0; i < 2; i++)
            groups[i] += weight.scale(half, i) * static_cast<float>(256 * d[2 * i] + d[2 * i + 1]);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) sums[i] += x.unit * groups[i];
}
