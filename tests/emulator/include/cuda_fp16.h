// NVIDIA's cuda_fp16.h, as far as kernels use it. Arithmetic rounds each operation to f16, as the hardware does.
#pragma once

#include "emulated_cuda.h"

struct __half {
    _Float16 value;

    __half() = default;
    template <typename N, typename = std::enable_if_t<std::is_arithmetic_v<N>>>
    __half(N x) : value(static_cast<_Float16>(x)) {}
    operator float() const { return float(value); }
};
using half = __half;

struct alignas(4) __half2 {
    __half x, y;
    __half2() = default;
    __half2(__half x, __half y) : x(x), y(y) {}
};
using half2 = __half2;

#define LLMC_F16_OPERATOR(op)                                                                \
    inline __half operator op(__half a, __half b) { return float(a) op float(b); }           \
    inline __half &operator op##=(__half &a, __half b) { return a = a op b; }
LLMC_F16_OPERATOR(+)
LLMC_F16_OPERATOR(-)
LLMC_F16_OPERATOR(*)
LLMC_F16_OPERATOR(/)
#undef LLMC_F16_OPERATOR
inline __half operator-(__half a) { return -float(a); }

inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline float __half2float(__half x) { return x; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float22half2_rn(float2 v) { return {v.x, v.y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline float __low2float(__half2 v) { return v.x; }
inline float __high2float(__half2 v) { return v.y; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __half2half2(__half x) { return {x, x}; }
inline __half __ushort_as_half(unsigned short u) { return emulated_bits<__half>(u); }
inline unsigned short __half_as_ushort(__half x) { return emulated_bits<unsigned short>(x); }
inline bool __hgt(__half a, __half b) { return float(a) > float(b); }
inline bool __hlt(__half a, __half b) { return float(a) < float(b); }
inline __half __hmax(__half a, __half b) { return float(a) > float(b) ? a : b; }
inline __half __hmin(__half a, __half b) { return float(a) < float(b) ? a : b; }
inline __half __hfma(__half a, __half b, __half c) { return fmaf(a, b, c); }
inline __half __hadd(__half a, __half b) { return a + b; }
inline __half __hsub(__half a, __half b) { return a - b; }
inline __half __hmul(__half a, __half b) { return a * b; }
inline __half hexp(__half x) { return expf(x); }
inline __half hsqrt(__half x) { return sqrtf(x); }
inline __half htanh(__half x) { return tanhf(x); }
inline __half2 __hadd2(__half2 a, __half2 b) { return {a.x + b.x, a.y + b.y}; }
inline __half2 __hsub2(__half2 a, __half2 b) { return {a.x - b.x, a.y - b.y}; }
inline __half2 __hmul2(__half2 a, __half2 b) { return {a.x * b.x, a.y * b.y}; }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }
