// Signed bytes as numbers of T, two at a time, exactly.
//
// A code in the low mantissa bits of 128 (bf16) or 1024 (f16) is an integer there; taking the offset away again is exact.
#pragma once

#include "device.cuh"

// Two elements of T in a register each: a - b.
__device__ __forceinline__ uint32_t subtract2(bf16, uint32_t a, uint32_t b) {
    const auto d = __hsub2(*reinterpret_cast<const __nv_bfloat162 *>(&a), *reinterpret_cast<const __nv_bfloat162 *>(&b));
    return *reinterpret_cast<const uint32_t *>(&d);
}

__device__ __forceinline__ uint32_t subtract2(f16, uint32_t a, uint32_t b) {
    const auto d = __hsub2(*reinterpret_cast<const __half2 *>(&a), *reinterpret_cast<const __half2 *>(&b));
    return *reinterpret_cast<const uint32_t *>(&d);
}

// The signed bytes 0 and 2 of a word. bf16 holds 7 bits below 128: v = (128 + its low 7 bits) - (128, or 256 if negative).
__device__ __forceinline__ uint32_t signed_bytes(bf16 type, uint32_t word) {
    return subtract2(type, (word & 0x007f007f) | 0x43004300, (word & 0x00800080) | 0x43004300);
}

// f16 holds 8 bits below 1024: v = (1024 + 128 + v) - 1152.
__device__ __forceinline__ uint32_t signed_bytes(f16 type, uint32_t word) {
    return subtract2(type, (word & 0x00ff00ff) ^ 0x64806480, 0x64806480);
}
