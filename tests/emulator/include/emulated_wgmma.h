// The twins of wgmma.cuh's functions: the same names and meanings, described there.
#pragma once

template <int R>
inline void pin_registers(uint32_t (&)[R]) {}
template <int R>
inline void pin_registers(float (&)[R]) {}

template <int... R>
inline void wgmma_fence(float (&...d)[R]) { ((void)d, ...), emulated::wgmma_fence(); }
inline void wgmma_commit() { emulated::wgmma_commit(); }
template <int kPending, int... R>
inline void wgmma_wait(float (&...d)[R]) { ((void)d, ...), emulated::wgmma_wait(kPending); }

template <int kCount>
inline void set_max_registers_up() { static_assert(kCount % 8 == 0 && 24 <= kCount && kCount <= 256, "24..256"); }
template <int kCount>
inline void set_max_registers_down() { static_assert(kCount % 8 == 0 && 24 <= kCount && kCount <= 256, "24..256"); }

template <int N, typename T, bool kTransposeB = false>
inline void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate = true) {
    static_assert(N % 8 == 0 && 8 <= N && N <= 256, "N is a multiple of 8 up to 256");
    emulated::wgmma({N, std::is_same_v<T, bf16>, kTransposeB, accumulate, nullptr, a, b, d});
}
template <int N, typename T, bool kTransposeB = false>
inline void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate = true) {
    static_assert(N % 8 == 0 && 8 <= N && N <= 256, "N is a multiple of 8 up to 256");
    emulated::wgmma({N, std::is_same_v<T, bf16>, kTransposeB, accumulate, a, 0, b, d});
}
