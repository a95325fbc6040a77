// The twins of device.cuh's functions: the same names and meanings, described there.
#pragma once

inline int lane_index() { return int(threadIdx.x & 31); }
inline int warp_index() {
    emulated::warp_collective("warp_index", 0xffffffffu, 0);
    return int(threadIdx.x >> 5);
}
inline unsigned char *dynamic_shared() { return emulated::dynamic_shared(); }
inline uint32_t shared_address(const void *shared) { return emulated::shared_address(shared); }
inline void named_barrier(int id, int n_threads) { emulated::arrive_at_barrier(id, n_threads, true, "named_barrier"); }
inline void named_barrier_arrive(int id, int n_threads) {
    emulated::arrive_at_barrier(id, n_threads, false, "named_barrier_arrive");
}
inline bool elect_one() {
    emulated::warp_collective("elect_one", 0xffffffffu, 0);
    return lane_index() == 0;
}

inline void wait_for_previous() { emulated::wait_for_previous(); }
inline void let_next_start() {}

inline uint4 load_streaming_16(const void *global) {
    emulated::check_global(global, 16, 16, "load_streaming_16");
    return *static_cast<const uint4 *>(global);
}
inline uint4 load_16(const void *memory) { return *static_cast<const uint4 *>(memory); }
inline void store_16(void *memory, uint4 v) { *static_cast<uint4 *>(memory) = v; }
inline void prefetch_l2(const void *) {}

inline uint32_t count_up(uint32_t *counter, uint32_t step = 1) {
    emulated::synchronise_blocks(counter, true, true);
    return atomicAdd(counter, step);
}
inline uint32_t load_acquire(const uint32_t *counter) {
    emulated::check_atomic(counter, 4, "load_acquire");
    emulated::spin("load_acquire");
    emulated::synchronise_blocks(counter, true, false);
    return uint32_t(emulated::load(counter, 4));
}

inline void cp_async_16(void *shared, const void *global, bool valid = true) {
    emulated::cp_async(shared, global, 16, valid, "cp_async_16");
}
inline void cp_async_4(void *shared, const void *global, bool valid = true) {
    emulated::cp_async(shared, global, 4, valid, "cp_async_4");
}
inline void cp_async_commit() { emulated::cp_async_commit(); }
template <int kPending>
inline void cp_async_wait() { emulated::cp_async_wait(kPending); }

inline void mbarrier_init(uint64_t *barrier, uint32_t n_arrivals) { emulated::mbarrier_init(barrier, n_arrivals); }
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(uint64_t *barrier) { emulated::mbarrier_arrive(barrier, 0); }
inline void mbarrier_arrive_expect(uint64_t *barrier, uint32_t n_bytes) { emulated::mbarrier_arrive(barrier, n_bytes); }
inline void mbarrier_wait(uint64_t *barrier, uint32_t parity) { emulated::mbarrier_wait(barrier, parity); }
inline void bulk_copy(void *shared, const void *global, uint32_t n_bytes, uint64_t *barrier) {
    emulated::bulk_copy(shared, global, n_bytes, barrier);
}
inline void bulk_copy_streaming(void *shared, const void *global, uint32_t n_bytes, uint64_t *barrier) {
    emulated::bulk_copy(shared, global, n_bytes, barrier);
}
inline void bulk_prefetch_l2(const void *global, uint32_t n_bytes) {
    emulated::check_global(global, n_bytes, 16, "bulk_prefetch_l2");
    if (n_bytes % 16) emulated::fail("bulk_prefetch_l2 of %u bytes: not a multiple of 16", n_bytes);
}
inline int cluster_rank() { return emulated::cluster_rank(); }
inline void cluster_arrive() { emulated::cluster_arrive(); }
inline void cluster_wait() { emulated::cluster_wait(); }
inline void mbarrier_arrive_in(uint64_t *barrier, int rank) { emulated::mbarrier_arrive_in(barrier, rank); }
inline void store_in(void *shared, float4 value, uint64_t *barrier, int rank) {
    emulated::store_in(shared, &value, barrier, rank);
}
inline void bulk_copy_multicast(void *shared, const void *global, uint32_t n_bytes, uint64_t *barrier, uint32_t ranks) {
    emulated::bulk_copy_multicast(shared, global, n_bytes, barrier, ranks);
}
inline void fence_async_shared() { emulated::fence_async_shared(); }

inline void ldmatrix_x4(uint32_t (&d)[4], const void *row) { emulated::ldmatrix(d, row, 4, false); }
inline void ldmatrix_x4_trans(uint32_t (&d)[4], const void *row) { emulated::ldmatrix(d, row, 4, true); }
inline void ldmatrix_x2(uint32_t (&d)[2], const void *row) { emulated::ldmatrix(d, row, 2, false); }

template <typename T>
inline void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulated::mma_16816(d, a, b, std::is_same_v<T, bf16>);
}

template <typename T>
inline void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
    for (int i = 0; i < 4; i++) d[i] = c[i];
    mma_16816<T>(d, a, b);
}

inline void mma_16832(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { emulated::mma_16832(d, a, b); }

inline float exp2_approx(float x) { return exp2f(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }

template <uint8_t kTable>
inline uint32_t bits_of(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d = 0;
    for (int i = 0; i < 8; i++)
        if (kTable >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return d;
}
