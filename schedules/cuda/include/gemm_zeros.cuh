// Left operands of a GEMM, of int4 whose groups have zeros: (code - zero) * scale, what the weight would be if it were
// stored in T (gemm_codes.cuh).
//
// The whole part of a zero is taken away with the offset that codes are raised by, exactly and for nothing. The rest of it,
// at most a half, times the scale is what the code's product is added to: the same multiply-adds as without zeros. A weight
// is off by its own rounding, and by 2^-9 of a step (bf16; f16: 2^-12); where zeros are whole, by its rounding alone.
// (Zeros are at most 72, compiler/quantization/zeros.py: 136 and that is a number of bf16.)
#pragma once

#include "gemm_codes.cuh"
#include "gemv_zeros.cuh"

// Two of f16 each: a b + c, rounded once.
__device__ __forceinline__ uint32_t multiply_add2(f16, uint32_t a, uint32_t b, uint32_t c) {
    const auto d = __hfma2(*reinterpret_cast<const __half2 *>(&a), *reinterpret_cast<const __half2 *>(&b),
                           *reinterpret_cast<const __half2 *>(&c));
    return *reinterpret_cast<const uint32_t *>(&d);
}

__device__ __forceinline__ uint32_t scaled_and_moved(const GroupScale<f16> &scale, uint32_t codes, uint32_t moved) {
    return multiply_add2(f16(), codes, scale.scale, moved);
}

__device__ __forceinline__ uint32_t scaled_and_moved(const GroupScale<bf16> &scale, uint32_t codes, uint32_t moved) {
    return multiply_add2(bf16(), codes, scale.high, multiply_add2(bf16(), codes, scale.low, moved));
}

template <class T, int kGroup>
__device__ __forceinline__ void operands_of(uint32_t (&a)[2][4], const Int4ZerosWeight<T, kGroup> &weight, int half) {
    weight.raised_fragments(a, half);
#pragma unroll
    for (int row = 0; row < 2; row++) {
        const float scale = weight.scale(half, row), zero = weight.zero(half, row), whole = rintf(zero);
        const GroupScale<T> group(scale);
        const uint32_t raised = pack2<T>(kOffset<T> + whole, kOffset<T> + whole);
        const float rest = (whole - zero) * scale;
        const uint32_t moved = pack2<T>(rest, rest);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t &pair = a[i / 2][i % 2 * 2 + row];
            pair = scaled_and_moved(group, subtract2(T(), pair, raised), moved);
        }
    }
}
