/* read_bandwidth.c - how fast this machine reads memory: the limit of decode.
 *
 * double read_bandwidth(n_threads, n_bytes): seconds that n_threads take to read a buffer of n_bytes once, summing it,
 * each its contiguous share. The buffer is made at the first call, in huge pages where the system gives them.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

typedef struct share {
    const uint64_t *words; /* [n] */
    size_t n;
    uint64_t sum;
} share;

static void *read_share(void *argument) {
    share *part = argument;
    uint64_t sums[16] = {0};
    for (size_t i = 0; i + 16 <= part->n; i += 16) {
        __builtin_prefetch(part->words + i + 256);
        for (size_t lane = 0; lane < 16; lane++) sums[lane] += part->words[i + lane];
    }
    for (size_t lane = 0; lane < 16; lane++) part->sum += sums[lane];
    return NULL;
}

double read_seconds(int n_threads, size_t n_bytes) {
    static uint64_t *buffer;
    static size_t size;
    share parts[64] = {{0}};
    pthread_t threads[64];
    if (n_threads < 1 || n_threads > 64) return -1;
    if (size != n_bytes) {
        if (buffer) munmap(buffer, size);
        buffer = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (buffer == MAP_FAILED) return -1;
        madvise(buffer, n_bytes, MADV_HUGEPAGE);
        memset(buffer, 1, n_bytes);
        size = n_bytes;
    }
    struct timespec began, ended;
    clock_gettime(CLOCK_MONOTONIC, &began);
    size_t words = n_bytes / 8 / (size_t)n_threads;
    for (int i = 0; i < n_threads; i++) parts[i] = (share){buffer + words * (size_t)i, words, 0};
    for (int i = 1; i < n_threads; i++) pthread_create(&threads[i], NULL, read_share, &parts[i]);
    read_share(&parts[0]);
    for (int i = 1; i < n_threads; i++) pthread_join(threads[i], NULL);
    clock_gettime(CLOCK_MONOTONIC, &ended);
    uint64_t sum = 0;
    for (int i = 0; i < n_threads; i++) sum += parts[i].sum;
    if (sum == 42) return -1; /* the sum is used, so that it is computed */
    return (double)(ended.tv_sec - began.tv_sec) + 1e-9 * (double)(ended.tv_nsec - began.tv_nsec);
}
