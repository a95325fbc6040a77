// x that stays where it is multiplied: each warp brings x of its own columns, once, and finds it there in every band.
//
//     shared memory     [warp][own column] { [token tile][half][lane] 16 bytes; [token tile][half][t] 16 bytes }
//
// A slot of x beside each stage of weights is brought again for each band: of 8 tokens 1024 bytes beside 2304 of codes in
// four bits. No other warp waits for a warp's columns, or reads them; a barrier of its own counts their bytes.
//
// What comes once may be made ready once, for codes of four bits (Int4Weight::high_fragments): they are multiplied in f16,
// whose ten bits of mantissa hold two of a word's four pairs of codes where they lie, one of the two sixteenfold. bf16 has
// seven, and needs the other three pairs moved. So x becomes f16 in the order of its lanes, times a power of two for each
// token of a warp, by which the largest is just below 2^15; the second and fourth pairs by a sixteenth of that. A number of
// 8 significant bits is exact down to 2^-27 of the largest. And products with what codes are raised by are made once.
#pragma once

#include "gemv_ring.cuh"

// A GEMV `G` with kKept and without kDigits, of weights in int4 by bulk copies and of a tiled x in bf16, whose warps have
// kOwn columns each in a band, kStride steps apart.
template <class G, int kOwn, int kStride>
struct GemvKept {
    using X = GemvX<G>;

    static_assert(!G::kKept || G::kDigits ||
                      (G::kBulk && G::kTiledX && !G::kSharedX && G::Weight::kGroupScales && sizeof(typename G::T) == 2),
                  "x comes by bulk copies, once, beside int4");
    static constexpr int kTiles = X::kTokenTiles;
    static constexpr int kStarts = kTiles * 1024;  // where products with offsets begin, in a column
    static constexpr int kColumnBytes = kStarts + kTiles * 128;
    static constexpr int kBytes = kOwn * kColumnBytes;  // of a warp
    static constexpr uint32_t kMinusOffset = 0xe408e408, kMinusHighOffset = 0xe480e480;  // f16: -1032, -(1024 + 16 * 8)

    // What a lane multiplies in one column, and what its sums of each half begin with, which is the same for all rows.
    struct Column {
        uint4 chunks[kTiles][2];
        float4 start[kTiles][2];
    };

    using Units = float2[kTiles];  // that sums are in, of tokens 2t and 2t + 1

    // A warp's own column j; `first` is its own first.
    static __device__ __forceinline__ int column(int first, int j) {
        return first + j / G::kDepth * (kStride * G::kDepth) + j % G::kDepth;
    }

    static __device__ __forceinline__ bool is_column(int first, int j) { return column(first, j) < X::kColumns; }

    static __device__ __forceinline__ void take(Column &x, const unsigned char *own, int j) {
        const unsigned char *from = own + j * kColumnBytes;
#pragma unroll
        for (int i = 0; i < 2 * kTiles; i++) {
            x.chunks[i / 2][i % 2] = load_16(from + (32 * i + lane_index()) * 16);
            x.start[i / 2][i % 2] = reinterpret_cast<const float4 *>(from + kStarts + i * 64)[lane_index() % 4];
        }
    }

#ifdef LLMC_HAS_BULK_COPY
    // One lane asks; of a warp without a column for nothing.
    static __device__ void ask(unsigned char *own, const unsigned char *x, int first, uint64_t *barrier) {
        if (lane_index() != 0) return;
        int n = 0;
        for (int j = 0; j < kOwn; j++) n += is_column(first, j);
        mbarrier_arrive_expect(barrier, n * G::kM * kRowBytes);
#pragma unroll
        for (int j = 0; j < kOwn; j++) {
            if (j >= n) break;
            bulk_copy(own + j * kColumnBytes, x + column(first, j) * X::kColumnStep, G::kM * kRowBytes, barrier);
        }
    }

    // Waits for the columns and makes them ready.
    static __device__ void prepare(Units &units, unsigned char *own, int first, uint64_t *barrier) {
        mbarrier_wait(barrier, 0);
        uint32_t largest[kTiles] = {};  // bits of floats are in the order of their sizes
        for (int j = 0; j < kOwn && is_column(first, j); j++) {
            typename X::Column x;
            X::take(x, own + j * kColumnBytes);
#pragma unroll
            for (int i = 0; i < 2 * kTiles; i++) {
                const uint4 four = x.chunks[i / 2][i % 2];
                const uint32_t size = max(max(size_of(four.x), size_of(four.y)), max(size_of(four.z), size_of(four.w)));
                largest[i / 2] = max(largest[i / 2], size);
            }
        }
        float scales[kTiles];  // of token g
#pragma unroll
        for (int tile = 0; tile < kTiles; tile++) {
            for (int offset = 2; offset > 0; offset /= 2) {
                largest[tile] = max(largest[tile], __shfl_xor_sync(0xffffffffu, largest[tile], offset));
            }
            const uint32_t exponent = max(largest[tile] >> 23, 24u);
            scales[tile] = __uint_as_float((268 - exponent) << 23);
            const float unit = __uint_as_float((exponent - 14) << 23);
            const int t = lane_index() % 4;
            units[tile].x = __shfl_sync(0xffffffffu, unit, 8 * t);
            units[tile].y = __shfl_sync(0xffffffffu, unit, 8 * t + 4);
        }
        for (int j = 0; j < kOwn && is_column(first, j); j++) put(own + j * kColumnBytes, scales);
        __syncwarp();
    }

  private:
    // The larger size of two elements, as the bits of a float.
    static __device__ __forceinline__ uint32_t size_of(uint32_t pair) {
        return max(pair << 16 & 0x7fff0000, pair & 0x7fff0000);
    }

    // A column, in place.
    static __device__ void put(unsigned char *slot, const float (&scales)[kTiles]) {
        typename X::Column x;
        X::take(x, slot);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 2 * kTiles; i++) {
            const uint4 four = x.chunks[i / 2][i % 2];
            const float low = scales[i / 2], high = low / 16;
            const uint4 scaled = {times(four.x, low), times(four.y, high), times(four.z, low), times(four.w, high)};
            store_16(slot + (32 * i + lane_index()) * 16, scaled);
            constexpr uint32_t a[4] = {kMinusOffset, kMinusOffset, kMinusHighOffset, kMinusHighOffset};
            const uint32_t b[2][2] = {{scaled.x, scaled.y}, {scaled.z, scaled.w}};
            float start[4] = {};
            mma_16816<f16>(start, a, b[0]);
            mma_16816<f16>(start, a, b[1]);
            if (lane_index() < 4) {
                auto *to = reinterpret_cast<float4 *>(slot + kStarts + i * 64);
                to[lane_index()] = make_float4(start[0], start[1], start[2], start[3]);
            }
        }
    }

    static __device__ __forceinline__ uint32_t times(uint32_t pair, float scale) {
        const float2 both = unpack2<typename G::T>(pair);
        return pack2<f16>(both.x * scale, both.y * scale);
    }
#endif
};

// sums += 16 rows of the weight by a column of x that was made ready. Products of both halves lie side by side: those that
// wait for each other are further apart, and none begins with a copy of what it adds to.
template <class Weight, class Column, int kTiles>
__device__ __forceinline__ void multiply_ready(float (&sums)[kTiles][4], const Weight &weight, const Column &x) {
    uint32_t a[2][2][4];  // [half][product]
#pragma unroll
    for (int half = 0; half < 2; half++) weight.high_fragments(a[half], half);
#pragma unroll
    for (int tile = 0; tile < kTiles; tile++) {
        float part[2][4];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float4 start = x.start[tile][half];
            const uint32_t b[2] = {x.chunks[tile][half].x, x.chunks[tile][half].y};
            mma_16816<f16>(part[half], a[half][0], b, {start.x, start.y, start.z, start.w});
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint32_t b[2] = {x.chunks[tile][half].z, x.chunks[tile][half].w};
            mma_16816<f16>(part[half], a[half][1], b);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) sums[tile][i % 4] += weight.scale(i / 4, i % 4 / 2) * part[i / 4][i % 4];
    }
}
