// The machine, as functions: every PTX instruction that kernels use, and nothing else. Those of bulk copies and clusters
// are in bulk_copy.cuh, those of products of a warpgroup in wgmma.cuh, both of which come with this header.
//
// Kernels include this header and its siblings, and hold no inline assembly themselves. Compiled with -DLLMC_EMULATE
// the same names come from tests/emulator/include/emulated_device.h, which runs them on a CPU and checks their use.
// Section numbers are those of the PTX ISA 8.x/9.x manual. `shared` pointers are ordinary (generic) pointers into
// shared memory. Functions that only Hopper has are absent below sm_90; wgmma and set_max_registers need sm_90a itself.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifdef __CUDACC_RTC__
using int32_t = int;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)
#else
#include <stdint.h>
#endif

using bf16 = __nv_bfloat16;
using f16 = __half;

// What this architecture has.
#if defined(LLMC_EMULATE) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
#define LLMC_HAS_BULK_COPY 1
#endif
#if defined(LLMC_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LLMC_HAS_WGMMA 1
#endif

#ifdef LLMC_EMULATE
#include "emulated_device.h"
#else

// ---- threads -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int lane_index() { return threadIdx.x & 31; }

// The same in all lanes, and known to be so; all lanes of the warp ask together, as in __shfl_sync.
__device__ __forceinline__ int warp_index() { return __shfl_sync(0xffffffffu, int(threadIdx.x) >> 5, 0); }

// The launch's dynamic shared memory, 1024-byte aligned. (Fixed-size `__shared__` variables are fine too.)
__device__ __forceinline__ unsigned char *dynamic_shared() {
    extern __shared__ __align__(1024) unsigned char llmc_dynamic_shared[];
    return llmc_dynamic_shared;
}

// The 32-bit address within the shared window of a generic pointer to shared memory.
__device__ __forceinline__ uint32_t shared_address(const void *shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Waits until n_threads threads (a multiple of 32) have come to barrier `id`, 1..15; 0 is __syncthreads'. 9.7.13.1 bar
__device__ __forceinline__ void named_barrier(int id, int n_threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
}

// Counts as having come to barrier `id`, without waiting. 9.7.13.1 bar
__device__ __forceinline__ void named_barrier_arrive(int id, int n_threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
}

// One thread of a converged warp: true in exactly one lane. 9.7.13.15 elect
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ bool elect_one() {
    uint32_t chosen;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(chosen));
    return chosen != 0;
}
#else
__device__ __forceinline__ bool elect_one() { return lane_index() == 0; }
#endif

// ---- programmatic dependent launch ---------------------------------------------------------------------------------

// Waits until the launches before this one have finished and their writes are visible. 9.7.13.14 griddepcontrol
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next launch's blocks start once all blocks of this one have said so. 9.7.13.14 griddepcontrol
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- global memory -------------------------------------------------------------------------------------------------

// 16 bytes that are read once and never written while the kernel runs, past L1. May move across wait_for_previous().
// 9.7.9.9 ld.global.nc
__device__ __forceinline__ uint4 load_streaming_16(const void *global) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(global));
    return v;
}

// 16 bytes of any memory, through L1: what several warps of a block read. 9.7.9.8 ld
__device__ __forceinline__ uint4 load_16(const void *memory) { return *static_cast<const uint4 *>(memory); }

__device__ __forceinline__ void store_16(void *memory, uint4 v) { *static_cast<uint4 *>(memory) = v; }

// Brings a cache line's worth at this address to L2. 9.7.9.15 prefetch
__device__ __forceinline__ void prefetch_l2(const void *global) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// A counter in global memory shared by blocks: adds, and gives what was there. What this thread wrote before is visible
// to whoever sees the new count, and the other way round. 9.7.13.5 atom.acq_rel
__device__ __forceinline__ uint32_t count_up(uint32_t *counter, uint32_t step = 1) {
    uint32_t old;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(step) : "memory");
    return old;
}

// 9.7.9.8 ld.acquire
__device__ __forceinline__ uint32_t load_acquire(const uint32_t *counter) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    return value;
}

// ---- asynchronous copies of 16 and 4 bytes (sm_80 and up) ----------------------------------------------------------------

// shared[0..16) = global[0..16), some time before the wait; zeros instead where `valid` is false. Past L1.
// 9.7.9.25.3.1 cp.async
__device__ __forceinline__ void cp_async_16(void *shared, const void *global, bool valid = true) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

// The same of 4 bytes, by way of L1.
__device__ __forceinline__ void cp_async_4(void *shared, const void *global, bool valid = true) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 4 : 0)
                 : "memory");
}

// Closes this thread's group of copies. 9.7.9.25.3.2
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups are under way. Others see the data after a barrier. 9.7.9.25.3.3
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#ifdef LLMC_HAS_BULK_COPY
#include "bulk_copy.cuh"
#endif

// ---- products of a warp --------------------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit elements: lane 8i + r gives the address of row r (16 bytes) of matrix i; in register i
// lane l gets elements 2(l%4), 2(l%4)+1 of row l/4 of matrix i. 9.7.14.5.15 ldmatrix
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], const void *shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
}

// The same with each matrix transposed: lane l gets elements of column l/4, rows 2(l%4) and 2(l%4)+1.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&d)[4], const void *shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
}

// Two matrices: the addresses are those of lanes 0..15.
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&d)[2], const void *shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(d[0]), "=r"(d[1])
                 : "r"(shared_address(shared_row))
                 : "memory");
}

// D[16,8] += A[16,16] B[8,16]^T by a warp, f32 sums. With g = lane/4, t = lane%4:
//   d = D[g][2t], D[g][2t+1], D[g+8][2t], D[g+8][2t+1]
//   a = A[g][2t..], A[g+8][2t..], A[g][2t+8..], A[g+8][2t+8..]      (two elements a register, the lower k lower)
//   b = B[g][2t..], B[g][2t+8..]                                     (B by rows of N: k is contiguous)
// 9.7.14.5.8 mma.m16n8k16
template <typename T>
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma_16816<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma_16816<f16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// D = A B^T + C, the rest as above; of f16 alone.
template <typename T>
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]);

template <>
__device__ __forceinline__ void mma_16816<f16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                               const float (&c)[4]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// D[16,8] += A[16,32] B[8,32]^T of signed bytes. d as above; with four elements a register:
//   a = A[g][4t..], A[g+8][4t..], A[g][4t+16..], A[g+8][4t+16..]
//   b = B[g][4t..], B[g][4t+16..]
// 9.7.14.5.10 mma.m16n8k32
__device__ __forceinline__ void mma_16832(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- arithmetic ----------------------------------------------------------------------------------------------------

// 2^x to about 2 ulp, denormal results as zero. 9.7.3.21 ex2.approx
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1/x to 1 ulp, denormal numbers as zero. 9.7.3.13 rcp.approx
__device__ __forceinline__ float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Bit by bit any function of three in one instruction: kTable is the function of 0xf0, 0xcc and 0xaa. (From `a & b | c`
// with two constants the compiler makes two instructions.) 9.7.8.6 lop3
template <uint8_t kTable>
__device__ __forceinline__ uint32_t bits_of(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(int(kTable)));
    return d;
}

#endif  // LLMC_EMULATE

// ---- the same on both ----------------------------------------------------------------------------------------------

// The sum over a warp's lanes, in all of them; the same order of additions always.
__device__ __forceinline__ float warp_sum(float x) {
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
    for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}

// Two elements of T in a register, the first in the lower half, rounded to nearest even; and back.
template <typename T>
__device__ __forceinline__ uint32_t pack2(float first, float second);

template <>
__device__ __forceinline__ uint32_t pack2<bf16>(float first, float second) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const uint32_t *>(&pair);
}

template <>
__device__ __forceinline__ uint32_t pack2<f16>(float first, float second) {
    const __half2 pair = __floats2half2_rn(first, second);
    return *reinterpret_cast<const uint32_t *>(&pair);
}

template <typename T>
__device__ __forceinline__ float2 unpack2(uint32_t pair);

template <>
__device__ __forceinline__ float2 unpack2<bf16>(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

template <>
__device__ __forceinline__ float2 unpack2<f16>(uint32_t pair) {
    return __half22float2(*reinterpret_cast<const __half2 *>(&pair));
}

template <typename T>
__device__ __forceinline__ T round_to(float x);
template <>
__device__ __forceinline__ bf16 round_to<bf16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ f16 round_to<f16>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ float round_to<float>(float x) { return x; }

__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(float x) { return x; }

#ifdef LLMC_HAS_WGMMA
#include "wgmma.cuh"
#endif
