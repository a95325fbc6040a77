// Of device.cuh, what Hopper brought: bulk copies, the barriers that count them, and clusters (sm_90 and up).
#pragma once

// ---- bulk copies and their barriers ----------------------------------------------------------------------------------

// A barrier in shared memory, 8-byte aligned: a phase ends when `n_arrivals` arrivals and all expected bytes have come.
// One thread initialises; then fence_mbarrier_init() and a __syncthreads() before anyone uses it. 9.7.13.16 mbarrier
__device__ __forceinline__ void mbarrier_init(uint64_t *barrier, uint32_t n_arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(n_arrivals) : "memory");
}

__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and makes the phase wait for n_bytes of bulk copies too.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t *barrier, uint32_t n_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(n_bytes)
                 : "memory");
}

// Waits until the phase of this parity has ended: 0 for the first, 1 for the second, 0 for the third … A fresh barrier
// lets parity 1 through at once.
__device__ __forceinline__ void mbarrier_wait(uint64_t *barrier, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(shared_address(barrier)), "r"(parity)
                     : "memory");
    } while (!done);
}

// shared[0..n_bytes) = global[0..n_bytes): one thread asks, `barrier` counts the bytes as they land. Both ends 16-byte
// aligned, n_bytes a multiple of 16. 9.7.9.25.4.1 cp.async.bulk
__device__ __forceinline__ void bulk_copy(void *shared, const void *global, uint32_t n_bytes, uint64_t *barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(n_bytes), "r"(shared_address(barrier))
                 : "memory");
}

// The same for data that is read once: leaves L2 first. 9.7.9.17 createpolicy
__device__ __forceinline__ void bulk_copy_streaming(void *shared, const void *global, uint32_t n_bytes,
                                                    uint64_t *barrier) {
    asm volatile(
        "{ .reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], policy; }" ::
            "r"(shared_address(shared)),
        "l"(global), "r"(n_bytes), "r"(shared_address(barrier))
        : "memory");
}

// Brings n_bytes (a multiple of 16, aligned so) to L2. 9.7.9.25.4.4 cp.async.bulk.prefetch
__device__ __forceinline__ void bulk_prefetch_l2(const void *global, uint32_t n_bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(n_bytes) : "memory");
}

// What this thread wrote to shared memory is visible to later wgmma (the async proxy). 9.7.13.4 fence
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- clusters: blocks beside each other that reach into one another's shared memory --------------------------------

// Which block of its cluster this is. 10.16 %cluster_ctarank
__device__ __forceinline__ int cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return int(rank);
}

// All threads of all blocks of the cluster that have not ended meet: each arrives, and waits later; a warp's lanes
// together. Others' barriers are ready then, if fence_mbarrier_init() came before; other writes need not be visible.
// 9.7.13.3 barrier.cluster
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Arrives at the barrier that lies in block `rank` of the cluster where `barrier` lies in this one. 9.7.9.23 mapa,
// 9.7.13.16.13 mbarrier.arrive
__device__ __forceinline__ void mbarrier_arrive_in(uint64_t *barrier, int rank) {
    asm volatile(
        "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(shared_address(barrier)),
        "r"(rank)
        : "memory");
}

// Stores 16 bytes, aligned so, in block `rank` of the cluster where `shared` lies in this one, some time later; the barrier
// that lies there where `barrier` lies in this one counts them. It publishes nothing else. 9.7.9.12 st.async
__device__ __forceinline__ void store_in(void *shared, float4 value, uint64_t *barrier, int rank) {
    asm volatile(
        "{ .reg .b32 there, counts; mapa.shared::cluster.u32 there, %0, %6; mapa.shared::cluster.u32 counts, %1, %6;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%2, %3, %4, %5}, [counts]; }" ::"r"(
            shared_address(shared)),
        "r"(shared_address(barrier)), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(rank)
        : "memory");
}

// bulk_copy() to all blocks of the cluster whose bit is set in `ranks`: each gets the bytes, and its own barrier counts
// them, at the places that `shared` and `barrier` have in this one. 9.7.9.25.4.1 cp.async.bulk
__device__ __forceinline__ void bulk_copy_multicast(void *shared, const void *global, uint32_t n_bytes,
                                                    uint64_t *barrier, uint32_t ranks) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::
            "r"(shared_address(shared)),
        "l"(global), "r"(n_bytes), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>(ranks))
        : "memory");
}
