/* bench.c - times kernels on the runtime's own threads; `llmc tune` links it with the runtime.
 *
 * A measurement is one plan, run as the runtime runs it: one parallel region with a barrier after each call. Between
 * the calls to be timed stand calls of measure_stamp, which has one task and so runs while every thread waits.
 * The limits of the machine are kernels too, so they are measured in the same region: measure_read, measure_fma, ...
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "runtime.h"

#define SHOWN __attribute__((visibility("default")))

typedef struct launch {
    int32_t (*function)(void);
    uint32_t n_pointers; /* 1 ... LLMC_MAX_POINTERS */
    uint32_t grid;
    char *const *pointers;     /* [n_pointers], for thread 0 */
    const uint64_t *strides;   /* [n_pointers] bytes to the next thread's */
} launch;

typedef struct stamp {
    int64_t time_ns;
    int64_t busy_ns; /* processor time that the threads of this process have had so far */
} stamp;

/* -- threads and memory ------------------------------------------------------------------------------------------- */

SHOWN engine *measure_open(int32_t n_threads)
{
    engine *threads = aligned_alloc(LLMC_ALIGNMENT, sizeof *threads);
    if (!threads) return NULL;
    memset(threads, 0, sizeof *threads);
    if (engine_start(threads, n_threads > 0 ? n_threads : cpu_count(), "llmc tune") == LLMC_OK) return threads;
    free(threads);
    return NULL;
}

SHOWN int32_t measure_threads(const engine *threads)
{
    return threads->pool.n_threads;
}

SHOWN void measure_close(engine *threads)
{
    if (!threads) return;
    engine_stop(threads);
    free(threads);
}

/* Zeroed, in huge pages where the system has them; NULL when there is none. */
SHOWN void *measure_map(uint64_t n_bytes)
{
    return memory_map(n_bytes);
}

SHOWN void measure_unmap(void *bytes, uint64_t n_bytes)
{
    memory_unmap(bytes, n_bytes);
}

/* Run launches [n] in order. 0: all kernels succeeded; 1: one failed; 2: there is no memory. */
SHOWN int32_t measure_run(engine *threads, uint32_t n, const launch *launches)
{
    uint32_t n_arguments = 0;
    for (uint32_t i = 0; i < n; i++) n_arguments += launches[i].n_pointers;
    plans bound = {0};
    bound.calls = calloc(n, sizeof *bound.calls);
    bound.arguments = calloc(n_arguments, sizeof *bound.arguments);
    llmc_kernel_entry *kernels = calloc(n, sizeof *kernels);
    int32_t status = 2;
    if (bound.calls && bound.arguments && kernels) {
        char nothing = 0;
        spaces spaces = {0};
        for (uint32_t i = 0; i < LLMC_N_SPACES; i++) spaces.base[i] = &nothing;
        bound.header.n_calls = n;
        bound.header.n_arguments = n_arguments;
        for (uint32_t i = 0; i < n; i++) bound.calls[i].grid = launches[i].grid;
        plans_bind(&bound, &spaces, threads->pool.n_threads); /* how many tasks: as the runtime decides */
        argument *next = bound.arguments;
        for (uint32_t i = 0; i < n; i++) {
            const launch *l = launches + i;
            kernels[i] = (llmc_kernel_entry){"kernel", l->function, l->n_pointers};
            bound.calls[i].kernel = kernels + i;
            bound.calls[i].arguments = next;
            for (uint32_t p = 0; p < l->n_pointers; p++, next++) {
                next->pointer = l->pointers[p];
                next->thread_stride = l->strides[p];
            }
        }
        const plan plan = {1, n, bound.calls};
        status = engine_run(threads, &plan) == LLMC_OK ? 0 : 1;
    }
    free(kernels);
    free(bound.arguments);
    free(bound.calls);
    return status;
}

/* -- kernels ------------------------------------------------------------------------------------------------------ */

static int64_t clock_ns(clockid_t clock)
{
    struct timespec time;
    clock_gettime(clock, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* out: where the stamp goes */
SHOWN int32_t measure_stamp(stamp *out, int32_t task, int32_t n_tasks)
{
    (void)task, (void)n_tasks;
    out->busy_ns = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    out->time_ns = clock_ns(CLOCK_MONOTONIC);
    return 0;
}

typedef int64_t vector __attribute__((vector_size(32)));
enum { READ_BYTES = 1 << 16, ROUNDS = 4096, CHAINS = 12 };

#ifdef __x86_64__
#define AVX2 __attribute__((target("avx2")))
#else
#define AVX2
#endif

/* bytes [grid * READ_BYTES]; four streams a task, as a kernel over four panels of a weight reads. */
AVX2 SHOWN int32_t measure_read(const vector *bytes, const int32_t *grid, int32_t task, int32_t n_tasks)
{
    const int64_t first = (int64_t)*grid * task / n_tasks, last = (int64_t)*grid * (task + 1) / n_tasks;
    const int64_t quarter = (last - first) * (READ_BYTES / (int64_t)sizeof(vector) / 4);
    const vector *v = bytes + first * (READ_BYTES / (int64_t)sizeof(vector));
    vector a = {0}, b = {0}, c = {0}, d = {0};
    for (int64_t i = 0; i < quarter; i += 2) { /* a cache line of each stream */
        a ^= v[i] ^ v[i + 1];
        b ^= v[i + quarter] ^ v[i + quarter + 1];
        c ^= v[i + 2 * quarter] ^ v[i + 2 * quarter + 1];
        d ^= v[i + 3 * quarter] ^ v[i + 3 * quarter + 1];
    }
    const vector sum = a ^ b ^ c ^ d;
    return sum[0] == 42 && sum[1] == 43 && sum[2] == 44 ? -1 : 0; /* used, so that it is computed */
}

/* Multiply-adds: units of ROUNDS * CHAINS instructions each, in chains that do not wait for each other. The assembly
 * keeps the compiler from seeing that nothing changes. Declares measure_NAME(unused, grid, task, n_tasks). */
#define PEAK(name, features, type, instruction)                                                            \
    __attribute__((target(features))) SHOWN int32_t measure_##name(const void *unused, const int32_t *grid, \
                                                                   int32_t task, int32_t n_tasks)          \
    {                                                                                                       \
        const int32_t n = (int32_t)((int64_t)*grid * (task + 1) / n_tasks - (int64_t)*grid * task / n_tasks); \
        type a[CHAINS] = {{0}}, x = {0}, y = {0};                                                           \
        (void)unused;                                                                                       \
        for (int64_t i = 0; i < (int64_t)n * ROUNDS; i++)                                                   \
            __asm__ volatile(ALL(instruction)                                                               \
                             : "+v"(a[0]), "+v"(a[1]), "+v"(a[2]), "+v"(a[3]), "+v"(a[4]), "+v"(a[5]),      \
                               "+v"(a[6]), "+v"(a[7]), "+v"(a[8]), "+v"(a[9]), "+v"(a[10]), "+v"(a[11])     \
                             : "v"(x), "v"(y));                                                             \
        return 0;                                                                                           \
    }
#define ALL(instruction)                                                                                     \
    ONE(instruction, 0) ONE(instruction, 1) ONE(instruction, 2) ONE(instruction, 3) ONE(instruction, 4)      \
    ONE(instruction, 5) ONE(instruction, 6) ONE(instruction, 7) ONE(instruction, 8) ONE(instruction, 9)      \
    ONE(instruction, 10) ONE(instruction, 11)
#define ONE(instruction, chain) instruction " %13, %12, %" #chain "\n\t"

#ifdef __x86_64__
typedef float floats8 __attribute__((vector_size(32)));
typedef float floats16 __attribute__((vector_size(64)));

PEAK(fma256, "avx2,fma", floats8, "vfmadd231ps")
PEAK(fma512, "avx512f", floats16, "vfmadd231ps")
PEAK(dpbf16, "avx512f,avx512bf16", floats16, "vdpbf16ps")
PEAK(vpdpbusd, "avx512f,avx512vnni", floats16, "vpdpbusd")

/* AMX: four sums from two tiles of each side, with numbers in them: zeros would be faster, as they take less power. An
 * instruction does sixteen rows, and counts as sixteen. */
#define TILES_PEAK(name, instruction)                                                                        \
    SHOWN int32_t measure_##name(const void *unused, const int32_t *grid, int32_t task, int32_t n_tasks)    \
    {                                                                                                       \
        const int32_t n = (int32_t)((int64_t)*grid * (task + 1) / n_tasks - (int64_t)*grid * task / n_tasks); \
        struct { uint8_t palette, nothing[15]; uint16_t row_bytes[16]; uint8_t rows[16]; } shapes = {1, {0}, {0}, {0}}; \
        uint16_t numbers[16][32];                                                                           \
        (void)unused;                                                                                       \
        for (int i = 0; i < 8; i++) shapes.row_bytes[i] = 64, shapes.rows[i] = 16;                          \
        for (int i = 0; i < 16 * 32; i++) numbers[i / 32][i % 32] = 0x3f3e; /* bf16 0.74 */                  \
        __asm__ volatile("ldtilecfg %0" : : "m"(shapes)); /* and zeroes the tiles */                        \
        __asm__ volatile("tileloadd (%0, %1), %%tmm4\n\ttileloadd (%0, %1), %%tmm5\n\t"                    \
                         "tileloadd (%0, %1), %%tmm6\n\ttileloadd (%0, %1), %%tmm7"                          \
                         : : "r"(numbers), "r"((int64_t)64), "m"(numbers));                                 \
        for (int64_t i = 0; i < (int64_t)n * ROUNDS * CHAINS / 16 / 4; i++)                                 \
            __asm__ volatile(instruction " %tmm6, %tmm4, %tmm0\n\t" instruction " %tmm7, %tmm4, %tmm1\n\t" \
                             instruction " %tmm6, %tmm5, %tmm2\n\t" instruction " %tmm7, %tmm5, %tmm3\n\t"); \
        __asm__ volatile("tilerelease");                                                                    \
        return 0;                                                                                           \
    }

TILES_PEAK(tdpbf16ps, "tdpbf16ps")
TILES_PEAK(tdpbsud, "tdpbsud")
#endif
