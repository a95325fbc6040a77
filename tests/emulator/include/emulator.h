// CUDA on a CPU: what the twins of CUDA's and device.cuh's functions ask of the emulator's core (../core/*.cpp).
//
// Threads are fibers of one OS thread; whatever waits (a barrier, a shuffle, an mbarrier) lets another fiber run. The
// blocks of a cluster run together, others one after another. Asynchronous things happen as late as they are allowed to: a copy poisons its
// destination when it is asked for, and lands when somebody has waited for it and nobody else can go on.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace emulated {

struct Index {
    unsigned x, y, z;
};
extern Index thread_index, block_index, block_size, grid_size;

// Ends the launch with this text, to which block and thread are added.
[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

// ---- waiting (core/synchronize.cpp)

// Barrier 0..15 of the block; n_threads 0 means all of them.
void arrive_at_barrier(int id, int n_threads, bool wait, const char *what);
// Lets the other fibers run; for loops that wait for something in memory.
void spin(const char *what);

// What a warp does together: every lane of `mask` gives a value, and gets those of all 32 (good until the warp's next
// collective). `complete`, if given, is called once, by whoever comes last, before anyone goes on.
using Complete = void (*)(const uint64_t *values, uint32_t mask);
const uint64_t *warp_collective(const char *what, uint32_t mask, uint64_t value, Complete complete = nullptr);
// The one of them that orders memory: what a lane did before is seen by the others after.
void sync_warp(uint32_t mask);
// The same for the 128 threads of a warpgroup; `values` are in the order of threads.
void warpgroup_collective(const char *what, uint64_t value, Complete complete);

// ---- shared memory and asynchronous copies (core/memory.cpp, core/copies.cpp)

unsigned char *dynamic_shared();
uint32_t shared_address(const void *shared);        // fails when it isn't a pointer to shared memory
unsigned char *shared_pointer(uint32_t address, uint32_t n_bytes, const char *what);
void check_global(const void *global, size_t n_bytes, size_t alignment, const char *what);

void mbarrier_init(uint64_t *barrier, uint32_t n_arrivals);
void mbarrier_arrive(uint64_t *barrier, uint32_t n_bytes);
void mbarrier_wait(uint64_t *barrier, uint32_t parity);
void bulk_copy(void *shared, const void *global, uint32_t n_bytes, uint64_t *barrier);
void cp_async(void *shared, const void *global, uint32_t n_bytes, bool valid, const char *what);
void cp_async_commit();
void cp_async_wait(int n_pending);
void fence_async_shared();

// ---- clusters (core/clusters.cpp, core/copies.cpp)

int cluster_rank();
void cluster_arrive();
void cluster_wait();
void mbarrier_arrive_in(uint64_t *barrier, int rank);
void store_in(void *shared, const void *value, uint64_t *barrier, int rank);  // 16 bytes
void bulk_copy_multicast(void *shared, const void *global, uint32_t n_bytes, uint64_t *barrier, uint32_t ranks);

// ---- tensor cores (core/tensor.cpp)

void ldmatrix(uint32_t *d, const void *shared_row, int n_matrices, bool transposed);
void mma_16816(float *d, const uint32_t *a, const uint32_t *b, bool is_bf16);
void mma_16832(int *d, const uint32_t *a, const uint32_t *b);

struct Product {  // one thread's part of a wgmma
    int n;
    bool is_bf16, transpose_b, accumulate;
    const uint32_t *a_registers;  // or null
    uint64_t a, b;
    float *d;
};
void wgmma(const Product &product);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int n_pending);

// ---- atomics on any memory: one fiber runs at a time, so that only their checks differ from plain reads and writes
void wait_for_previous();
void synchronise_blocks(const void *counter, bool acquires, bool releases);
void check_atomic(const void *memory, size_t n_bytes, const char *what);
uint64_t load(const void *memory, size_t n_bytes);  // past the race detector
void store(void *memory, uint64_t value, size_t n_bytes);

// ---- kernels (core/launch.cpp)

using Body = void (*)(void **arguments);
struct Kernel {
    const char *name;
    int n_pointers;
    int n_threads;
    uint32_t shared_bytes;
    int cluster;  // blocks of a cluster
    int (*run)(int grid, void **arguments, char *error, size_t error_bytes);
    void *(*variables)();  // a place among the library's `__shared__` variables
    bool checked;
};
int launch(const Kernel &kernel, Body body, int grid, void **arguments, char *error, size_t error_bytes);

// ---- of the library itself (core/table.cpp)
__attribute__((visibility("hidden"))) void enrol(const Kernel &kernel);
__attribute__((visibility("hidden"))) void *variables_of_library();

// Calls a kernel with its pointers.
template <auto kFunction>
struct Call;
template <typename... P, void (*kFunction)(P...)>
struct Call<kFunction> {
    static constexpr int n_pointers = sizeof...(P);
    struct InOrder {  // an initialiser in braces is evaluated from left to right
        InOrder(P... pointers) { kFunction(pointers...); }
    };
    static void body(void **arguments) {
        int next = 0;
        (void)next, (void)arguments;
        (void)InOrder{static_cast<P>(arguments[next++])...};
    }
};

}  // namespace emulated

#ifndef LLMC_EMULATE_CHECKED
#define LLMC_EMULATE_CHECKED false
#endif

// Makes a kernel of this translation unit known as emulate_<name>.
#define LLMC_EMULATED_KERNEL(name, n_threads, shared_bytes, cluster)                                      \
    static int name##_run(int grid, void **arguments, char *error, size_t error_bytes);                  \
    static const emulated::Kernel name##_kernel = {#name, emulated::Call<name>::n_pointers, n_threads,   \
                                                   shared_bytes, cluster, name##_run,                    \
                                                   emulated::variables_of_library, LLMC_EMULATE_CHECKED}; \
    static int name##_run(int grid, void **arguments, char *error, size_t error_bytes) {                 \
        return emulated::launch(name##_kernel, emulated::Call<name>::body, grid, arguments, error,       \
                                error_bytes);                                                            \
    }                                                                                                    \
    extern "C" int emulate_##name(int grid, void **arguments, char *error, size_t error_bytes) {         \
        return name##_run(grid, arguments, error, error_bytes);                                          \
    }                                                                                                    \
    __attribute__((constructor)) static void name##_enrol() { emulated::enrol(name##_kernel); }
