// Codes of 8 bits as numbers of T, two at a time, exactly: signed bytes, and floats (e4m3).
//
// An integer in the low mantissa bits of 128 (bf16) or 1024 (f16) is an integer there; taking the offset away again is
// exact. The seven bits of an e4m3 code, put where T has the low bits of its exponent and the high ones of its mantissa,
// are the code times 2^(7 - T's bias), subnormal codes too; multiplying that away is exact.
#pragma once

#include "device.cuh"

constexpr uint8_t kAndOr = (0xf0 & 0xcc) | 0xaa, kAndXor = (0xf0 & 0xcc) ^ 0xaa,
                  kXorAnd = (0xf0 ^ 0xcc) & 0xaa;  // of bits_of()

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
    const uint32_t low = bits_of<kAndOr>(word, 0x007f007f, 0x43004300);
    return subtract2(type, low, bits_of<kAndOr>(word, 0x00800080, 0x43004300));
}

// f16 holds 8 bits below 1024: v = (1024 + 128 + v) - 1152.
__device__ __forceinline__ uint32_t signed_bytes(f16 type, uint32_t word) {
    return subtract2(type, bits_of<kAndXor>(word, 0x00ff00ff, 0x64806480), 0x64806480);
}

// Two elements of T in a register each: a * b, subnormal numbers too. (sm_80 does it by a multiply-add.)
__device__ __forceinline__ uint32_t multiply2(bf16, uint32_t a, uint32_t b) {
    const auto d = __hmul2(*reinterpret_cast<const __nv_bfloat162 *>(&a), *reinterpret_cast<const __nv_bfloat162 *>(&b));
    return *reinterpret_cast<const uint32_t *>(&d);
}

__device__ __forceinline__ uint32_t multiply2(f16, uint32_t a, uint32_t b) {
    const auto d = __hmul2(*reinterpret_cast<const __half2 *>(&a), *reinterpret_cast<const __half2 *>(&b));
    return *reinterpret_cast<const uint32_t *>(&d);
}

// What a word of weights in 8 bits holds: the first two codes, 16 bits apart, and the second two, as elements of T.
struct Int8Codes {
    template <class T>
    static __device__ __forceinline__ uint32_t first(T type, uint32_t word) { return signed_bytes(type, word); }
    template <class T>
    static __device__ __forceinline__ uint32_t second(T type, uint32_t word) { return signed_bytes(type, word >> 8); }
};

// Floats: the first two lie as T wants them, the second two (in capitals) around them (schedules/fp8_words.py). Sign,
// exponent and mantissa in each half of a word, from bit 15 down:
//
//     bf16    s EEE S eeee mmm E MMM    times 2^120: the exponent's bias is 127, not 7
//     f16     s S eeee mmm EEEE MMM     times 2^8: it is 15
struct Fp8Codes {
    static __device__ __forceinline__ uint32_t first(bf16 type, uint32_t word) {
        return multiply2(type, word & 0x87f087f0, 0x7b807b80);
    }
    static __device__ __forceinline__ uint32_t second(bf16 type, uint32_t word) {
        return multiply2(type, (word << 4 & 0x80f080f0) | (word >> 4 & 0x07000700), 0x7b807b80);
    }
    static __device__ __forceinline__ uint32_t first(f16 type, uint32_t word) {
        return multiply2(type, word & 0xbf80bf80, 0x5c005c00);
    }
    static __device__ __forceinline__ uint32_t second(f16 type, uint32_t word) {
        return multiply2(type, (word << 7 & 0x3f803f80) | (word << 1 & 0x80008000), 0x5c005c00);
    }
};
