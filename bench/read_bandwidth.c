/* read_bandwidth.c - how fast this machine reads memory: the limit of decode.
 *
 * double read_seconds(n_threads, n_bytes): seconds that n_threads take to read a buffer of n_bytes once, summing it,
 * each its contiguous share. The buffer is made at the first call, in huge pages where the system gives them.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

typedef uint64_t vector __attribute__((vector_size(64)));

enum { AHEAD = 16 }; /* vectors: what the kernels ask for ahead of time too */

typedef struct share {
    const vector *vectors; /* [n] */
    size_t n;
    uint64_t sum;
} share;

/* Four streams a thread, as a kernel over four panels of a weight reads. */
static void *read_share(void *argument) {
    share *part = argument;
    const size_t quarter = part->n / 4;
    const vector *streams[4];
    vector sums[4] = {{0}};
    for (size_t s = 0; s < 4; s++) streams[s] = part->vectors + quarter * s;
    for (size_t i = 0; i < quarter; i++)
        for (size_t s = 0; s < 4; s++) {
            __builtin_prefetch(streams[s] + i + AHEAD);
            sums[s] += streams[s][i];
        }
    for (size_t s = 0; s < 4; s++) part->sum += sums[s][0] + sums[s][7];
    return NULL;
}

double read_seconds(int n_threads, size_t n_bytes) {
    static vector *buffer;
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
    const size_t n = n_bytes / sizeof(vector) / (size_t)n_threads;
    for (int i = 0; i < n_threads; i++) parts[i] = (share){buffer + n * (size_t)i, n, 0};
    for (int i = 1; i < n_threads; i++) pthread_create(&threads[i], NULL, read_share, &parts[i]);
    read_share(&parts[0]);
    for (int i = 1; i < n_threads; i++) pthread_join(threads[i], NULL);
    clock_gettime(CLOCK_MONOTONIC, &ended);
    uint64_t sum = 0;
    for (int i = 0; i < n_threads; i++) sum += parts[i].sum;
    if (sum == 42) return -1; /* the sum is used, so that it is computed */
    return (double)(ended.tv_sec - began.tv_sec) + 1e-9 * (double)(ended.tv_nsec - began.tv_nsec);
}
