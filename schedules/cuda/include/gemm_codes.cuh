// Quantised weights of both GEMMs: from pieces in shared memory (gemv_quant.cuh) to left operands in registers.
//
// A step brings the four pieces of 64 stored rows by 64 of K for each warpgroup; a warp takes one, 16 rows, and turns
// it into the fragments of mma.m16n8k16, which are wgmma's too: nothing is exchanged and nothing goes back to memory.
//
//     int8, fp8    codes are multiplied as they are, exact in T; the row's scale is applied to its finished sums
//     int4         a code times its group's scale, rounded to T once: what the weight would be if it were stored in T
//     mxfp4        a code times its group's power of two, which is exact (gemv_mxfp4.cuh)
//
// (Sums of each group, scaled in f32 as the GEMV has them, would take as many multiplications again for each 32 or 128
// of K as there are tokens.)
//
// Instructions of a warp's step on Hopper (counted by tests/schedules/cuda/test_sass.py): about 110 with codes of 8 bits,
// half of them to make operands; 150 with int4. Two warps take turns at a scheduler: 220 and 300 cycles. At 4.3 TB/s and
// 1.75 GHz a multiprocessor waits 440 and 250 cycles for the codes of a step; at 128 x 256 sums its tensor cores take
// 1024. So int4 at few tokens is bound by instructions, a quarter above its bytes, and nothing else is.
#pragma once

#include "codes.cuh"
#include "gemm_tile.cuh"

// Two elements of bf16 each: a b + c, rounded once.
__device__ __forceinline__ uint32_t multiply_add2(bf16, uint32_t a, uint32_t b, uint32_t c) {
    const auto d = __hfma2(*reinterpret_cast<const __nv_bfloat162 *>(&a), *reinterpret_cast<const __nv_bfloat162 *>(&b),
                           *reinterpret_cast<const __nv_bfloat162 *>(&c));
    return *reinterpret_cast<const uint32_t *>(&d);
}

// A group's scale, which is an f16, ready to multiply codes in T.
template <class T>
struct GroupScale;

template <>
struct GroupScale<f16> {
    uint32_t scale;

    __device__ explicit GroupScale(float s) : scale(pack2<f16>(s, s)) {}
    __device__ uint32_t times(uint32_t codes) const { return multiply2(f16(), codes, scale); }
};

// bf16 holds 8 of the scale's 11 bits. The other three times a code of four is exact, and so the result is rounded once.
template <>
struct GroupScale<bf16> {
    uint32_t high, low;

    __device__ explicit GroupScale(float s) : high(pack2<bf16>(s, s)) {
        const float rest = s - unpack2<bf16>(high).x;
        low = pack2<bf16>(rest, rest);
    }
    __device__ uint32_t times(uint32_t codes) const {
        return multiply_add2(bf16(), codes, high, multiply2(bf16(), codes, low));
    }
};

// The left operands of the two products of a half, 32 of K: what is multiplied as it is.
template <class T, class Weight>
__device__ __forceinline__ void operands_of(uint32_t (&a)[2][4], const Weight &weight, int half) {
    weight.fragments(a, half);
    if constexpr (Weight::kPowers) {
#pragma unroll
        for (int row = 0; row < 2; row++) {
            const uint32_t scale = weight.scale_pair(half, row);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                uint32_t &pair = a[i / 2][i % 2 * 2 + row];
                pair = multiply2(T(), pair, scale);
            }
        }
    } else if constexpr (Weight::kGroupScales) {
#pragma unroll
        for (int row = 0; row < 2; row++) {
            const GroupScale<T> scale(weight.scale(half, row));
#pragma unroll
            for (int i = 0; i < 4; i++) a[i / 2][i % 2 * 2 + row] = scale.times(a[i / 2][i % 2 * 2 + row]);
        }
    }
}

// Scales of a thread's rows 8h + g in a stretch's tile; 1 where the weight has none.
template <class Tiling>
struct RowScales {
    using Weight = typename Tiling::L::Weight;

    float scales[2] = {1, 1};

    __device__ RowScales(const void *weight, const Place &place, const Warpgroup &group) {
        if constexpr (Weight::kRowScales) {
            const int own = Tiling::kAlong ? 0 : group.part;  // of the tile's rows of W's tiles
            if (own >= Tiling::tile_rows_at(place)) return;
            const unsigned char *behind =
                static_cast<const unsigned char *>(weight) + int64_t(Tiling::n_tile_rows) * Tiling::n_columns * Tiling::kGroupBytes;
            if constexpr (Tiling::kOfExperts) behind += Tiling::expert_offset(place);
            const int row = (place.tile_row + own) * kTile + group.thread / 32 * kStripRows + lane_index() / 4;
#pragma unroll
            for (int h = 0; h < 2; h++) scales[h] = reinterpret_cast<const float *>(behind)[row + 8 * h];
        }
    }

    __device__ void apply(float (&sums)[Tiling::kRowSums]) const {
        if constexpr (Weight::kRowScales) {
#pragma unroll
            for (int i = 0; i < Tiling::kRowSums; i++) sums[i] *= scales[i / 2 % 2];
        }
    }
};
