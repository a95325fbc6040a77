// Products of a warpgroup (128 threads) on Hopper's tensor cores. Included by device.cuh.
//
// D[64,N] (+)= A[64,16] B[N,16]^T, asynchronous: D is undefined from the first wgmma() to the wgmma_wait() that covers
// it, and so must A and B stay in shared memory. With w = warp % 4, g = lane / 4, t = lane % 4 a thread holds
//   d[4j + 0, 1] = D[16w + g][8j + 2t, +1]      d[4j + 2, 3] = D[16w + g + 8][8j + 2t, +1]
// The order of calls: wgmma_fence(); wgmma(...) as often as needed; wgmma_commit(); …; wgmma_wait<kPending>(d).
#pragma once

// ---- descriptors of matrices in shared memory, 9.7.15.5.1 ------------------------------------------------------------

// K contiguous: rows of 64 elements (128 bytes), chunk c (16 bytes) of row r at position c ^ (r % 8); eight rows are
// 1024 bytes, and start at a multiple of that. The next 16 of k: `k_step` up to 3. Reads as many rows as the product.
__device__ __forceinline__ uint64_t k_major_descriptor(const void *shared, int k_step = 0) {
    const uint64_t address = (shared_address(shared) + 32 * k_step) & 0x3ffff;
    return (address >> 4) | (1ull << 16) | (uint64_t(1024 >> 4) << 32) | (1ull << 62);
}

// N contiguous (B only, with kTransposeB): one row of 64 n (128 bytes) for each k, chunk c of row k at c ^ (k % 8);
// eight k are 1024 bytes. N above 64: the next 64 n lie `group_bytes` further. The next 16 of k: + 2048 bytes.
__device__ __forceinline__ uint64_t n_major_descriptor(const void *shared, int group_bytes, int k_step = 0) {
    const uint64_t address = (shared_address(shared) + 2048 * k_step) & 0x3ffff;
    return (address >> 4) | (uint64_t(group_bytes >> 4) << 16) | (uint64_t(1024 >> 4) << 32) | (1ull << 62);
}

// No swizzle: 8x8 matrices of 128 bytes, each eight rows of 16 bytes; rows are those of N where K is contiguous, of K
// where N is (kTransposeB). The next 8 of k lie `k_bytes` further, the next 8 of n `n_bytes`.
__device__ __forceinline__ uint64_t plain_descriptor(const void *shared, int k_bytes, int n_bytes) {
    const uint64_t address = shared_address(shared) & 0x3ffff;
    return (address >> 4) | (uint64_t(k_bytes >> 4) << 16) | (uint64_t(n_bytes >> 4) << 32);
}

// The same matrix so many bytes further on, within shared memory.
__device__ __forceinline__ uint64_t further(uint64_t descriptor, int bytes) {
    return descriptor & ~0xffffffffull | uint32_t(uint32_t(descriptor) + (bytes >> 4));  // the address cannot carry
}

#ifdef LLMC_EMULATE
#include "emulated_wgmma.h"
#else

// ---- order, 9.7.15.7 ------------------------------------------------------------------------------------------------

// Keeps the compiler from moving what it does to these registers across this point; no instruction.
template <int R>
__device__ __forceinline__ void pin_registers(float (&d)[R]) {
#pragma unroll
    for (int i = 0; i < R; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// The same of an A: behind the wgmma_wait() of a product that reads it, it keeps those registers from other use till then.
template <int R>
__device__ __forceinline__ void pin_registers(uint32_t (&a)[R]) {
#pragma unroll
    for (int i = 0; i < R; i++) asm volatile("" : "+r"(a[i])::"memory");
}

// Before the first wgmma(), and whenever registers that the next one takes (d, or a from registers) were written.
template <int... R>
__device__ __forceinline__ void wgmma_fence(float (&...d)[R]) {
    (pin_registers(d), ...);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Closes the group of products since the last commit.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending groups are under way. Pass every d whose value is used from here on.
template <int kPending, int... R>
__device__ __forceinline__ void wgmma_wait(float (&...d)[R]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
    (pin_registers(d), ...);
}

// Registers a thread of this warpgroup may hold from here on, 24..256, a multiple of 8. The kernel must say how many
// blocks share a multiprocessor, __launch_bounds__(n_threads, 1), or this does nothing. 9.7.20.5 setmaxnreg
template <int kCount>
__device__ __forceinline__ void set_max_registers_up() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
__device__ __forceinline__ void set_max_registers_down() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- the product, 9.7.15.5.2 wgmma.mma_async -------------------------------------------------------------------------

template <typename T>
struct is_bf16 {
    static constexpr bool value = false;
};
template <>
struct is_bf16<bf16> {
    static constexpr bool value = true;
};

// An instruction names all its registers, so every N needs its own text: %0, %1, … and the operands that they stand for.
#define LLMC_FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LLMC_NAMES_4 "%0, %1, %2, %3"
#define LLMC_REGISTERS_4 LLMC_FOUR(0)
#define LLMC_NAMES_8 LLMC_NAMES_4 ", %4, %5, %6, %7"
#define LLMC_REGISTERS_8 LLMC_REGISTERS_4, LLMC_FOUR(4)
#define LLMC_NAMES_12 LLMC_NAMES_8 ", %8, %9, %10, %11"
#define LLMC_REGISTERS_12 LLMC_REGISTERS_8, LLMC_FOUR(8)
#define LLMC_NAMES_16 LLMC_NAMES_12 ", %12, %13, %14, %15"
#define LLMC_REGISTERS_16 LLMC_REGISTERS_12, LLMC_FOUR(12)
#define LLMC_NAMES_20 LLMC_NAMES_16 ", %16, %17, %18, %19"
#define LLMC_REGISTERS_20 LLMC_REGISTERS_16, LLMC_FOUR(16)
#define LLMC_NAMES_24 LLMC_NAMES_20 ", %20, %21, %22, %23"
#define LLMC_REGISTERS_24 LLMC_REGISTERS_20, LLMC_FOUR(20)
#define LLMC_NAMES_28 LLMC_NAMES_24 ", %24, %25, %26, %27"
#define LLMC_REGISTERS_28 LLMC_REGISTERS_24, LLMC_FOUR(24)
#define LLMC_NAMES_32 LLMC_NAMES_28 ", %28, %29, %30, %31"
#define LLMC_REGISTERS_32 LLMC_REGISTERS_28, LLMC_FOUR(28)
#define LLMC_NAMES_36 LLMC_NAMES_32 ", %32, %33, %34, %35"
#define LLMC_REGISTERS_36 LLMC_REGISTERS_32, LLMC_FOUR(32)
#define LLMC_NAMES_40 LLMC_NAMES_36 ", %36, %37, %38, %39"
#define LLMC_REGISTERS_40 LLMC_REGISTERS_36, LLMC_FOUR(36)
#define LLMC_NAMES_44 LLMC_NAMES_40 ", %40, %41, %42, %43"
#define LLMC_REGISTERS_44 LLMC_REGISTERS_40, LLMC_FOUR(40)
#define LLMC_NAMES_48 LLMC_NAMES_44 ", %44, %45, %46, %47"
#define LLMC_REGISTERS_48 LLMC_REGISTERS_44, LLMC_FOUR(44)
#define LLMC_NAMES_52 LLMC_NAMES_48 ", %48, %49, %50, %51"
#define LLMC_REGISTERS_52 LLMC_REGISTERS_48, LLMC_FOUR(48)
#define LLMC_NAMES_56 LLMC_NAMES_52 ", %52, %53, %54, %55"
#define LLMC_REGISTERS_56 LLMC_REGISTERS_52, LLMC_FOUR(52)
#define LLMC_NAMES_60 LLMC_NAMES_56 ", %56, %57, %58, %59"
#define LLMC_REGISTERS_60 LLMC_REGISTERS_56, LLMC_FOUR(56)
#define LLMC_NAMES_64 LLMC_NAMES_60 ", %60, %61, %62, %63"
#define LLMC_REGISTERS_64 LLMC_REGISTERS_60, LLMC_FOUR(60)
#define LLMC_NAMES_68 LLMC_NAMES_64 ", %64, %65, %66, %67"
#define LLMC_REGISTERS_68 LLMC_REGISTERS_64, LLMC_FOUR(64)
#define LLMC_NAMES_72 LLMC_NAMES_68 ", %68, %69, %70, %71"
#define LLMC_REGISTERS_72 LLMC_REGISTERS_68, LLMC_FOUR(68)
#define LLMC_NAMES_76 LLMC_NAMES_72 ", %72, %73, %74, %75"
#define LLMC_REGISTERS_76 LLMC_REGISTERS_72, LLMC_FOUR(72)
#define LLMC_NAMES_80 LLMC_NAMES_76 ", %76, %77, %78, %79"
#define LLMC_REGISTERS_80 LLMC_REGISTERS_76, LLMC_FOUR(76)
#define LLMC_NAMES_84 LLMC_NAMES_80 ", %80, %81, %82, %83"
#define LLMC_REGISTERS_84 LLMC_REGISTERS_80, LLMC_FOUR(80)
#define LLMC_NAMES_88 LLMC_NAMES_84 ", %84, %85, %86, %87"
#define LLMC_REGISTERS_88 LLMC_REGISTERS_84, LLMC_FOUR(84)
#define LLMC_NAMES_92 LLMC_NAMES_88 ", %88, %89, %90, %91"
#define LLMC_REGISTERS_92 LLMC_REGISTERS_88, LLMC_FOUR(88)
#define LLMC_NAMES_96 LLMC_NAMES_92 ", %92, %93, %94, %95"
#define LLMC_REGISTERS_96 LLMC_REGISTERS_92, LLMC_FOUR(92)
#define LLMC_NAMES_100 LLMC_NAMES_96 ", %96, %97, %98, %99"
#define LLMC_REGISTERS_100 LLMC_REGISTERS_96, LLMC_FOUR(96)
#define LLMC_NAMES_104 LLMC_NAMES_100 ", %100, %101, %102, %103"
#define LLMC_REGISTERS_104 LLMC_REGISTERS_100, LLMC_FOUR(100)
#define LLMC_NAMES_108 LLMC_NAMES_104 ", %104, %105, %106, %107"
#define LLMC_REGISTERS_108 LLMC_REGISTERS_104, LLMC_FOUR(104)
#define LLMC_NAMES_112 LLMC_NAMES_108 ", %108, %109, %110, %111"
#define LLMC_REGISTERS_112 LLMC_REGISTERS_108, LLMC_FOUR(108)
#define LLMC_NAMES_116 LLMC_NAMES_112 ", %112, %113, %114, %115"
#define LLMC_REGISTERS_116 LLMC_REGISTERS_112, LLMC_FOUR(112)
#define LLMC_NAMES_120 LLMC_NAMES_116 ", %116, %117, %118, %119"
#define LLMC_REGISTERS_120 LLMC_REGISTERS_116, LLMC_FOUR(116)
#define LLMC_NAMES_124 LLMC_NAMES_120 ", %120, %121, %122, %123"
#define LLMC_REGISTERS_124 LLMC_REGISTERS_120, LLMC_FOUR(120)
#define LLMC_NAMES_128 LLMC_NAMES_124 ", %124, %125, %126, %127"
#define LLMC_REGISTERS_128 LLMC_REGISTERS_124, LLMC_FOUR(124)

// Operand `p` says whether to add to d; `t` whether B is transposed.
#define LLMC_WGMMA_TEXT(n, type, names, a, b, p, ta, t)                                                \
    "{ .reg .pred p; setp.ne.b32 p, %" #p ", 0;\n"                                                     \
    "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" names "}, " a ", %" #b ", p, " \
    "1, 1, " ta "%" #t "; }"

#define LLMC_WGMMA_SHARED(n, names, registers, a_, b_, p, t)                                              \
    if constexpr (N == n && is_bf16<T>::value)                                                            \
        asm volatile(LLMC_WGMMA_TEXT(n, "bf16", names, "%" #a_, b_, p, "0, ", t)                          \
                     : registers                                                                          \
                     : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kTransposeB)));                      \
    if constexpr (N == n && !is_bf16<T>::value)                                                           \
        asm volatile(LLMC_WGMMA_TEXT(n, "f16", names, "%" #a_, b_, p, "0, ", t)                           \
                     : registers                                                                          \
                     : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kTransposeB)))

#define LLMC_WGMMA_REGISTERS(n, names, registers, a0, a1, a2, a3, b_, p, t)                                       \
    if constexpr (N == n && is_bf16<T>::value)                                                                    \
        asm volatile(LLMC_WGMMA_TEXT(n, "bf16", names, "{%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}", b_, p, "", t)  \
                     : registers                                                                                  \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)),                  \
                       "n"(int(kTransposeB)));                                                                    \
    if constexpr (N == n && !is_bf16<T>::value)                                                                   \
        asm volatile(LLMC_WGMMA_TEXT(n, "f16", names, "{%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}", b_, p, "", t)   \
                     : registers                                                                                  \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)),                  \
                       "n"(int(kTransposeB)))

// d (+)= A B^T with both from shared memory, by k_major_descriptor (or n_major_descriptor for B with kTransposeB).
// N: a multiple of 8 up to 256. T: bf16, f16. Without `accumulate` the old d is ignored.
template <int N, typename T, bool kTransposeB = false>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate = true) {
    static_assert(N % 8 == 0 && 8 <= N && N <= 256, "N is a multiple of 8 up to 256");
    LLMC_WGMMA_SHARED(8, LLMC_NAMES_4, LLMC_REGISTERS_4, 4, 5, 6, 7);
    LLMC_WGMMA_SHARED(16, LLMC_NAMES_8, LLMC_REGISTERS_8, 8, 9, 10, 11);
    LLMC_WGMMA_SHARED(24, LLMC_NAMES_12, LLMC_REGISTERS_12, 12, 13, 14, 15);
    LLMC_WGMMA_SHARED(32, LLMC_NAMES_16, LLMC_REGISTERS_16, 16, 17, 18, 19);
    LLMC_WGMMA_SHARED(40, LLMC_NAMES_20, LLMC_REGISTERS_20, 20, 21, 22, 23);
    LLMC_WGMMA_SHARED(48, LLMC_NAMES_24, LLMC_REGISTERS_24, 24, 25, 26, 27);
    LLMC_WGMMA_SHARED(56, LLMC_NAMES_28, LLMC_REGISTERS_28, 28, 29, 30, 31);
    LLMC_WGMMA_SHARED(64, LLMC_NAMES_32, LLMC_REGISTERS_32, 32, 33, 34, 35);
    LLMC_WGMMA_SHARED(72, LLMC_NAMES_36, LLMC_REGISTERS_36, 36, 37, 38, 39);
    LLMC_WGMMA_SHARED(80, LLMC_NAMES_40, LLMC_REGISTERS_40, 40, 41, 42, 43);
    LLMC_WGMMA_SHARED(88, LLMC_NAMES_44, LLMC_REGISTERS_44, 44, 45, 46, 47);
    LLMC_WGMMA_SHARED(96, LLMC_NAMES_48, LLMC_REGISTERS_48, 48, 49, 50, 51);
    LLMC_WGMMA_SHARED(104, LLMC_NAMES_52, LLMC_REGISTERS_52, 52, 53, 54, 55);
    LLMC_WGMMA_SHARED(112, LLMC_NAMES_56, LLMC_REGISTERS_56, 56, 57, 58, 59);
    LLMC_WGMMA_SHARED(120, LLMC_NAMES_60, LLMC_REGISTERS_60, 60, 61, 62, 63);
    LLMC_WGMMA_SHARED(128, LLMC_NAMES_64, LLMC_REGISTERS_64, 64, 65, 66, 67);
    LLMC_WGMMA_SHARED(136, LLMC_NAMES_68, LLMC_REGISTERS_68, 68, 69, 70, 71);
    LLMC_WGMMA_SHARED(144, LLMC_NAMES_72, LLMC_REGISTERS_72, 72, 73, 74, 75);
    LLMC_WGMMA_SHARED(152, LLMC_NAMES_76, LLMC_REGISTERS_76, 76, 77, 78, 79);
    LLMC_WGMMA_SHARED(160, LLMC_NAMES_80, LLMC_REGISTERS_80, 80, 81, 82, 83);
    LLMC_WGMMA_SHARED(168, LLMC_NAMES_84, LLMC_REGISTERS_84, 84, 85, 86, 87);
    LLMC_WGMMA_SHARED(176, LLMC_NAMES_88, LLMC_REGISTERS_88, 88, 89, 90, 91);
    LLMC_WGMMA_SHARED(184, LLMC_NAMES_92, LLMC_REGISTERS_92, 92, 93, 94, 95);
    LLMC_WGMMA_SHARED(192, LLMC_NAMES_96, LLMC_REGISTERS_96, 96, 97, 98, 99);
    LLMC_WGMMA_SHARED(200, LLMC_NAMES_100, LLMC_REGISTERS_100, 100, 101, 102, 103);
    LLMC_WGMMA_SHARED(208, LLMC_NAMES_104, LLMC_REGISTERS_104, 104, 105, 106, 107);
    LLMC_WGMMA_SHARED(216, LLMC_NAMES_108, LLMC_REGISTERS_108, 108, 109, 110, 111);
    LLMC_WGMMA_SHARED(224, LLMC_NAMES_112, LLMC_REGISTERS_112, 112, 113, 114, 115);
    LLMC_WGMMA_SHARED(232, LLMC_NAMES_116, LLMC_REGISTERS_116, 116, 117, 118, 119);
    LLMC_WGMMA_SHARED(240, LLMC_NAMES_120, LLMC_REGISTERS_120, 120, 121, 122, 123);
    LLMC_WGMMA_SHARED(248, LLMC_NAMES_124, LLMC_REGISTERS_124, 124, 125, 126, 127);
    LLMC_WGMMA_SHARED(256, LLMC_NAMES_128, LLMC_REGISTERS_128, 128, 129, 130, 131);
}

// The same with A from registers, as mma_16816's a: warp w's are rows 16(w % 4) and on.
template <int N, typename T, bool kTransposeB = false>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate = true) {
    static_assert(N % 8 == 0 && 8 <= N && N <= 256, "N is a multiple of 8 up to 256");
    LLMC_WGMMA_REGISTERS(8, LLMC_NAMES_4, LLMC_REGISTERS_4, 4, 5, 6, 7, 8, 9, 10);
    LLMC_WGMMA_REGISTERS(16, LLMC_NAMES_8, LLMC_REGISTERS_8, 8, 9, 10, 11, 12, 13, 14);
    LLMC_WGMMA_REGISTERS(24, LLMC_NAMES_12, LLMC_REGISTERS_12, 12, 13, 14, 15, 16, 17, 18);
    LLMC_WGMMA_REGISTERS(32, LLMC_NAMES_16, LLMC_REGISTERS_16, 16, 17, 18, 19, 20, 21, 22);
    LLMC_WGMMA_REGISTERS(40, LLMC_NAMES_20, LLMC_REGISTERS_20, 20, 21, 22, 23, 24, 25, 26);
    LLMC_WGMMA_REGISTERS(48, LLMC_NAMES_24, LLMC_REGISTERS_24, 24, 25, 26, 27, 28, 29, 30);
    LLMC_WGMMA_REGISTERS(56, LLMC_NAMES_28, LLMC_REGISTERS_28, 28, 29, 30, 31, 32, 33, 34);
    LLMC_WGMMA_REGISTERS(64, LLMC_NAMES_32, LLMC_REGISTERS_32, 32, 33, 34, 35, 36, 37, 38);
    LLMC_WGMMA_REGISTERS(72, LLMC_NAMES_36, LLMC_REGISTERS_36, 36, 37, 38, 39, 40, 41, 42);
    LLMC_WGMMA_REGISTERS(80, LLMC_NAMES_40, LLMC_REGISTERS_40, 40, 41, 42, 43, 44, 45, 46);
    LLMC_WGMMA_REGISTERS(88, LLMC_NAMES_44, LLMC_REGISTERS_44, 44, 45, 46, 47, 48, 49, 50);
    LLMC_WGMMA_REGISTERS(96, LLMC_NAMES_48, LLMC_REGISTERS_48, 48, 49, 50, 51, 52, 53, 54);
    LLMC_WGMMA_REGISTERS(104, LLMC_NAMES_52, LLMC_REGISTERS_52, 52, 53, 54, 55, 56, 57, 58);
    LLMC_WGMMA_REGISTERS(112, LLMC_NAMES_56, LLMC_REGISTERS_56, 56, 57, 58, 59, 60, 61, 62);
    LLMC_WGMMA_REGISTERS(120, LLMC_NAMES_60, LLMC_REGISTERS_60, 60, 61, 62, 63, 64, 65, 66);
    LLMC_WGMMA_REGISTERS(128, LLMC_NAMES_64, LLMC_REGISTERS_64, 64, 65, 66, 67, 68, 69, 70);
    LLMC_WGMMA_REGISTERS(136, LLMC_NAMES_68, LLMC_REGISTERS_68, 68, 69, 70, 71, 72, 73, 74);
    LLMC_WGMMA_REGISTERS(144, LLMC_NAMES_72, LLMC_REGISTERS_72, 72, 73, 74, 75, 76, 77, 78);
    LLMC_WGMMA_REGISTERS(152, LLMC_NAMES_76, LLMC_REGISTERS_76, 76, 77, 78, 79, 80, 81, 82);
    LLMC_WGMMA_REGISTERS(160, LLMC_NAMES_80, LLMC_REGISTERS_80, 80, 81, 82, 83, 84, 85, 86);
    LLMC_WGMMA_REGISTERS(168, LLMC_NAMES_84, LLMC_REGISTERS_84, 84, 85, 86, 87, 88, 89, 90);
    LLMC_WGMMA_REGISTERS(176, LLMC_NAMES_88, LLMC_REGISTERS_88, 88, 89, 90, 91, 92, 93, 94);
    LLMC_WGMMA_REGISTERS(184, LLMC_NAMES_92, LLMC_REGISTERS_92, 92, 93, 94, 95, 96, 97, 98);
    LLMC_WGMMA_REGISTERS(192, LLMC_NAMES_96, LLMC_REGISTERS_96, 96, 97, 98, 99, 100, 101, 102);
    LLMC_WGMMA_REGISTERS(200, LLMC_NAMES_100, LLMC_REGISTERS_100, 100, 101, 102, 103, 104, 105, 106);
    LLMC_WGMMA_REGISTERS(208, LLMC_NAMES_104, LLMC_REGISTERS_104, 104, 105, 106, 107, 108, 109, 110);
    LLMC_WGMMA_REGISTERS(216, LLMC_NAMES_108, LLMC_REGISTERS_108, 108, 109, 110, 111, 112, 113, 114);
    LLMC_WGMMA_REGISTERS(224, LLMC_NAMES_112, LLMC_REGISTERS_112, 112, 113, 114, 115, 116, 117, 118);
    LLMC_WGMMA_REGISTERS(232, LLMC_NAMES_116, LLMC_REGISTERS_116, 116, 117, 118, 119, 120, 121, 122);
    LLMC_WGMMA_REGISTERS(240, LLMC_NAMES_120, LLMC_REGISTERS_120, 120, 121, 122, 123, 124, 125, 126);
    LLMC_WGMMA_REGISTERS(248, LLMC_NAMES_124, LLMC_REGISTERS_124, 124, 125, 126, 127, 128, 129, 130);
    LLMC_WGMMA_REGISTERS(256, LLMC_NAMES_128, LLMC_REGISTERS_128, 128, 129, 130, 131, 132, 133, 134);
}

#endif  // LLMC_EMULATE
