// CUDA C++'s own words, for g++: qualifiers, indices, vector types, the intrinsics that kernels use.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <type_traits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)  // build.py reads it
#define __align__(n) alignas(n)
#define __restrict__ __restrict
#define __grid_constant__
#define __constant__ static
#define __shared__ static thread_local  // one copy for all fibers, and a segment that can be found and poisoned

#define threadIdx emulated::thread_index
#define blockIdx emulated::block_index
#define blockDim emulated::block_size
#define gridDim emulated::grid_size
constexpr int warpSize = 32;

using uint = unsigned int;
using uchar = unsigned char;
using ushort = unsigned short;

struct alignas(4) char4 { signed char x, y, z, w; };
struct alignas(4) uchar4 { unsigned char x, y, z, w; };
struct alignas(4) short2 { short x, y; };
struct alignas(4) ushort2 { unsigned short x, y; };
struct alignas(8) ushort4 { unsigned short x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct uint3 { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct float3 { float x, y, z; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) longlong2 { long long x, y; };
struct alignas(16) ulonglong2 { unsigned long long x, y; };
struct alignas(16) double2 { double x, y; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };

inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline ulonglong2 make_ulonglong2(unsigned long long x, unsigned long long y) { return {x, y}; }

// ---- numbers

template <typename To, typename From>
inline To emulated_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}
inline float __uint_as_float(unsigned x) { return emulated_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return emulated_bits<unsigned>(x); }
inline float __int_as_float(int x) { return emulated_bits<float>(x); }
inline int __float_as_int(float x) { return emulated_bits<int>(x); }

template <typename A, typename B, typename = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
inline std::common_type_t<A, B> max(A a, B b) { return std::common_type_t<A, B>(a) > std::common_type_t<A, B>(b) ? a : b; }
template <typename A, typename B, typename = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
inline std::common_type_t<A, B> min(A a, B b) { return std::common_type_t<A, B>(a) < std::common_type_t<A, B>(b) ? a : b; }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return exp10f(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __tanhf(float x) { return tanhf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __saturatef(float x) { return x < 0 ? 0 : x > 1 ? 1 : x; }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline int __float2int_rn(float x) { return int(rintf(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
    unsigned y = 0;
    for (int i = 0; i < 32; i++) y |= ((x >> i) & 1u) << (31 - i);
    return y;
}
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned((uint64_t(x) * y) >> 32); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t both = uint64_t(y) << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        const unsigned choice = selector >> (4 * i) & 15;
        unsigned byte = unsigned(both >> (8 * (choice & 7))) & 255;
        if (choice & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << (8 * i);
    }
    return result;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return unsigned((uint64_t(high) << 32 | low) << (shift & 31) >> 32);
}
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += int(int8_t(a >> 8 * i)) * int(int8_t(b >> 8 * i));
    return c;
}

// ---- memory

template <typename T>
inline T __ldg(const T *p) { return *p; }
template <typename T>
inline T __ldcg(const T *p) { return *p; }
template <typename T>
inline T __ldcs(const T *p) { return *p; }
template <typename T>
inline void __stcs(T *p, T value) { *p = value; }
template <typename T>
inline void __stcg(T *p, T value) { *p = value; }
inline size_t __cvta_generic_to_shared(const void *p) { return emulated::shared_address(p); }

template <typename T, typename F>
inline T emulated_atomic(T *p, const char *what, F change) {
    emulated::check_atomic(p, sizeof(T), what);
    const uint64_t bits = emulated::load(p, sizeof(T));
    T old;
    memcpy(&old, &bits, sizeof(T));
    const T changed = change(old);
    uint64_t to = 0;
    memcpy(&to, &changed, sizeof(T));
    emulated::store(p, to, sizeof(T));
    return old;
}
template <typename T, typename V>
inline T atomicAdd(T *p, V v) { return emulated_atomic(p, "atomicAdd", [=](T x) { return T(x + T(v)); }); }
template <typename T, typename V>
inline T atomicSub(T *p, V v) { return emulated_atomic(p, "atomicSub", [=](T x) { return T(x - T(v)); }); }
template <typename T, typename V>
inline T atomicMax(T *p, V v) { return emulated_atomic(p, "atomicMax", [=](T x) { return x > T(v) ? x : T(v); }); }
template <typename T, typename V>
inline T atomicMin(T *p, V v) { return emulated_atomic(p, "atomicMin", [=](T x) { return x < T(v) ? x : T(v); }); }
template <typename T, typename V>
inline T atomicExch(T *p, V v) { return emulated_atomic(p, "atomicExch", [=](T) { return T(v); }); }
template <typename T, typename V>
inline T atomicOr(T *p, V v) { return emulated_atomic(p, "atomicOr", [=](T x) { return T(x | T(v)); }); }
template <typename T, typename V>
inline T atomicAnd(T *p, V v) { return emulated_atomic(p, "atomicAnd", [=](T x) { return T(x & T(v)); }); }
template <typename T, typename U, typename V>
inline T atomicCAS(T *p, U compare, V v) {
    return emulated_atomic(p, "atomicCAS", [=](T x) { return x == T(compare) ? T(v) : x; });
}
inline unsigned atomicInc(unsigned *p, unsigned limit) {
    return emulated_atomic(p, "atomicInc", [=](unsigned x) { return x >= limit ? 0 : x + 1; });
}

// ---- threads together

inline void __syncthreads() { emulated::arrive_at_barrier(0, 0, true, "__syncthreads"); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulated::sync_warp(mask); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { emulated::spin("__nanosleep"); }
inline unsigned __activemask() { return 0xffffffffu; }

inline int emulated_lane() { return int(threadIdx.x & 31); }

template <typename T>
inline T emulated_shuffle(const char *what, unsigned mask, T value, int source) {
    static_assert(sizeof(T) <= 8, "shuffles move 4 or 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    const uint64_t *all = emulated::warp_collective(what, mask, bits);
    if (!(mask >> source & 1)) emulated::fail("%s from lane %d, which is not in the mask %#x", what, source, mask);
    memcpy(&value, &all[source], sizeof(T));
    return value;
}
template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    const int lane = emulated_lane();
    return emulated_shuffle("__shfl_sync", mask, value, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int change, int width = 32) {
    const int lane = emulated_lane(), source = lane ^ change;
    const bool inside = (source & ~(width - 1)) <= (lane & ~(width - 1));
    return emulated_shuffle("__shfl_xor_sync", mask, value, inside ? source & 31 : lane);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const int lane = emulated_lane(), source = lane + int(delta);
    return emulated_shuffle("__shfl_down_sync", mask, value, (lane & (width - 1)) + int(delta) < width ? source : lane);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const int lane = emulated_lane(), source = lane - int(delta);
    return emulated_shuffle("__shfl_up_sync", mask, value, (lane & (width - 1)) >= int(delta) ? source : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const uint64_t *all = emulated::warp_collective("__ballot_sync", mask, predicate != 0);
    unsigned result = 0;
    for (int lane = 0; lane < 32; lane++) result |= unsigned(mask >> lane & all[lane] & 1) << lane;
    return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
inline int __syncthreads_or(int predicate) {
    __shared__ int found;
    if (threadIdx.x == 0) found = 0;
    __syncthreads();
    if (predicate) atomicOr(&found, 1);
    __syncthreads();
    const int result = found;
    __syncthreads();
    return result;
}
template <typename T, typename F>
inline T emulated_reduce(const char *what, unsigned mask, T value, F join) {
    const uint64_t *all = emulated::warp_collective(what, mask, uint64_t(uint32_t(value)));
    bool first = true;
    T result = value;
    for (int lane = 0; lane < 32; lane++)
        if (mask >> lane & 1) {
            result = first ? T(uint32_t(all[lane])) : join(result, T(uint32_t(all[lane])));
            first = false;
        }
    return result;
}
template <typename T>
inline T __reduce_add_sync(unsigned mask, T v) { return emulated_reduce("__reduce_add_sync", mask, v, [](T a, T b) { return T(a + b); }); }
template <typename T>
inline T __reduce_max_sync(unsigned mask, T v) { return emulated_reduce("__reduce_max_sync", mask, v, [](T a, T b) { return a > b ? a : b; }); }
template <typename T>
inline T __reduce_min_sync(unsigned mask, T v) { return emulated_reduce("__reduce_min_sync", mask, v, [](T a, T b) { return a < b ? a : b; }); }

#include "cuda_bf16.h"
#include "cuda_fp16.h"
