/* arithmetic_peak.c - how many operations a second this machine's multiply-add units do: the limit of prefill.
 *
 * double operations_per_second(n_threads, kind, seconds): of n_threads doing nothing but independent multiply-adds for
 * about so long; a multiply-add counts as two. kind 0: float32, 1: bfloat16 (tdpbf16ps of AMX, else vdpbf16ps), 2: bytes
 * (tdpbsud of AMX, else vpdpbusd). 0 where the machine has no such instruction.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

enum { FLOAT32, BFLOAT16, BYTES, CHAINS = 12, ROUNDS = 100000 };

#define KEPT_IN_REGISTERS _Pragma("GCC unroll 12")

typedef float vector __attribute__((vector_size(64)));
typedef struct work {
    double seconds, operations, took;
    float result;
    int kind;
} work;

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* Each returns the operations it did; the sum is used, so that it is computed. */
static double multiply_floats(float *result)
{
    vector sums[CHAINS], x, y;
    for (int i = 0; i < 16; i++) x[i] = *result + 0.999f, y[i] = 1e-3f;
    for (int c = 0; c < CHAINS; c++) sums[c] = y * (float)c; /* equal ones would be computed once */
    for (int round = 0; round < ROUNDS; round++)
        KEPT_IN_REGISTERS for (int c = 0; c < CHAINS; c++) sums[c] = sums[c] * x + y;
    for (int c = 0; c < CHAINS; c++) *result += 1e-9f * sums[c][c];
    return 2.0 * 16 * CHAINS * ROUNDS;
}

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
/* A thread's tiles of 16 rows of 64 bytes, with numbers in those that are multiplied: zeros would be faster, as they take
 * less power. 0 where the system does not let the process use tiles. */
static int open_tiles(void)
{
    uint8_t numbers[16 * 64];
    struct {
        uint8_t palette, nothing[15];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shapes = {.palette = 1};
    const long request_permission = 0x1023, tile_data = 18;
    if (syscall(SYS_arch_prctl, request_permission, tile_data) != 0) return 0;
    for (int i = 0; i < 8; i++) shapes.row_bytes[i] = 64, shapes.rows[i] = 16;
    for (int i = 0; i < 16 * 64; i++) numbers[i] = (uint8_t)(0x3e + i % 2); /* bf16 0.186 */
    __asm__ volatile("" : : "r"(&shapes), "r"(numbers) : "memory"); /* both are written, though gcc sees nobody read them */
    _tile_loadconfig(&shapes);
    _tile_loadd(4, numbers, 64);
    _tile_loadd(5, numbers, 64);
    _tile_loadd(6, numbers, 64);
    _tile_loadd(7, numbers, 64);
    return 1;
}

/* Four sums, from two tiles of each side. */
#define MULTIPLY_TILES(instruction)                     \
    for (int round = 0; round < ROUNDS; round++) {      \
        instruction(0, 4, 6);                           \
        instruction(1, 4, 7);                           \
        instruction(2, 5, 6);                           \
        instruction(3, 5, 7);                           \
    }                                                   \
    _tile_release();
#else
static int open_tiles(void)
{
    return 0;
}
#define MULTIPLY_TILES(instruction)
#endif

static double multiply_bfloats(float *result)
{
    if (open_tiles()) {
        MULTIPLY_TILES(_tile_dpbf16ps)
        return 2.0 * 16 * 16 * 32 * 4 * ROUNDS;
    }
#ifdef __AVX512BF16__
    __m512 sums[CHAINS];
    __m512bh x = _mm512_cvtne2ps_pbh(_mm512_set1_ps(*result + 0.5f), _mm512_set1_ps(0.25f));
    for (int c = 0; c < CHAINS; c++) sums[c] = _mm512_set1_ps((float)c);
    for (int round = 0; round < ROUNDS; round++)
        KEPT_IN_REGISTERS for (int c = 0; c < CHAINS; c++) sums[c] = _mm512_dpbf16_ps(sums[c], x, x);
    for (int c = 0; c < CHAINS; c++) *result += 1e-20f * _mm512_reduce_add_ps(sums[c]);
    return 2.0 * 32 * CHAINS * ROUNDS;
#else
    (void)result;
    return 0;
#endif
}

static double multiply_bytes(float *result)
{
    if (open_tiles()) {
        MULTIPLY_TILES(_tile_dpbsud)
        return 2.0 * 16 * 16 * 64 * 4 * ROUNDS;
    }
#ifdef __AVX512VNNI__
    __m512i sums[CHAINS], x = _mm512_set1_epi8((char)(3 + (*result > 1)));
    for (int c = 0; c < CHAINS; c++) sums[c] = _mm512_set1_epi32(c);
    for (int round = 0; round < ROUNDS; round++)
        KEPT_IN_REGISTERS for (int c = 0; c < CHAINS; c++) sums[c] = _mm512_dpbusd_epi32(sums[c], x, x);
    for (int c = 0; c < CHAINS; c++) *result += 1e-20f * (float)_mm512_reduce_add_epi32(sums[c]);
    return 2.0 * 64 * CHAINS * ROUNDS;
#else
    (void)result;
    return 0;
#endif
}

static void *run(void *argument)
{
    work *mine = argument;
    double began = now();
    do {
        double did = mine->kind == FLOAT32    ? multiply_floats(&mine->result)
                     : mine->kind == BFLOAT16 ? multiply_bfloats(&mine->result)
                                              : multiply_bytes(&mine->result);
        if (!did) break;
        mine->operations += did;
        mine->took = now() - began;
    } while (mine->took < mine->seconds);
    return 0;
}

double operations_per_second(int n_threads, int kind, double seconds)
{
    work works[64];
    pthread_t threads[64];
    double rate = 0;
    if (n_threads < 1 || n_threads > 64) return 0;
    for (int i = 0; i < n_threads; i++) works[i] = (work){.seconds = seconds, .kind = kind};
    for (int i = 1; i < n_threads; i++) pthread_create(&threads[i], 0, run, &works[i]);
    run(&works[0]);
    for (int i = 1; i < n_threads; i++) pthread_join(threads[i], 0);
    for (int i = 0; i < n_threads; i++) {
        if (!works[i].operations || works[i].result == 42) return 0;
        rate += works[i].operations / works[i].took;
    }
    return rate;
}
