/* pool.c - threads, and the bell that they wait on. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "runtime.h"

/* A wait within a step is a few microseconds when every thread has a core: spin. When it has none, the spinning thread
 * must hand over the core that another one needs: yield. Between steps the host may be gone for long: sleep. Waking a
 * sleeping thread takes up to 0.5 ms on a virtual machine, so a thread yields for longer than a host usually needs
 * between two steps. */
enum { SPINS = 2000, YIELDING_NS = 1000 * 1000, STACK_BYTES = 4 << 20 };

/* -- bell --------------------------------------------------------------------------------------------------------- */

static void relax(void)
{
#ifdef __x86_64__
    __builtin_ia32_pause();
#elif defined __aarch64__
    __asm__ volatile("isb");
#endif
}

uint64_t now_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static int is_still(bell *bell, uint64_t old)
{
    return atomic_load_explicit(&bell->value, memory_order_acquire) == old;
}

/* Either the ringer sees that somebody sleeps, or the sleeper sees the new value before it sleeps: both sides first
 * write and then read, in one order that all threads agree on (memory_order_seq_cst). */
void bell_ring(bell *bell, uint64_t value)
{
    atomic_store(&bell->value, value);
    if (atomic_load(&bell->n_sleeping) == 0) return;
    atomic_fetch_add(&bell->epoch, 1);
    syscall(SYS_futex, &bell->epoch, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

static void sleep_until_rung(bell *bell, uint64_t old)
{
    atomic_fetch_add(&bell->n_sleeping, 1);
    for (;;) {
        uint32_t epoch = atomic_load(&bell->epoch);
        if (atomic_load(&bell->value) != old) break;
        syscall(SYS_futex, &bell->epoch, FUTEX_WAIT_PRIVATE, epoch, NULL, NULL, 0);
    }
    atomic_fetch_sub(&bell->n_sleeping, 1);
}

void bell_wait(bell *bell, uint64_t old)
{
    for (int i = 0; i < SPINS; i++, relax())
        if (!is_still(bell, old)) return;
    for (uint64_t start = now_ns(); now_ns() - start < YIELDING_NS; sched_yield())
        if (!is_still(bell, old)) return;
    sleep_until_rung(bell, old);
}

/* -- threads ------------------------------------------------------------------------------------------------------ */

struct pool_thread {
    pthread_t handle;
    void (*work)(void *context, int32_t thread);
    void *context;
    int32_t number;
};

static void *run_thread(void *argument)
{
    struct pool_thread *thread = argument;
    thread->work(thread->context, thread->number);
    return NULL;
}

llmc_status pool_start(pool *pool, int32_t n_threads, void (*work)(void *context, int32_t thread), void *context)
{
    pthread_attr_t attributes;
    sigset_t all, before;
    int failed = 0;
    pool->n_threads = n_threads;
    pool->n_started = 0;
    pool->process = getpid();
    pool->threads = calloc((size_t)n_threads, sizeof *pool->threads);
    if (!pool->threads || pthread_attr_init(&attributes) != 0) {
        free(pool->threads);
        pool->threads = NULL;
        return fail(LLMC_ERROR_MEMORY, NULL, NULL, "there is no memory for %d threads", n_threads);
    }
    pthread_attr_setstacksize(&attributes, STACK_BYTES); /* musl's default is too small for kernels */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals belong to the host's own threads */
    for (int32_t i = 1; i < n_threads && !failed; i++) {
        struct pool_thread *thread = pool->threads + pool->n_started;
        *thread = (struct pool_thread){.work = work, .context = context, .number = i};
        failed = pthread_create(&thread->handle, &attributes, run_thread, thread);
        if (!failed) pool->n_started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    if (!failed) return LLMC_OK;
    return fail(LLMC_ERROR_MEMORY, NULL, "ask for fewer threads", "thread %d of %d could not be started: %s",
                pool->n_started + 2, n_threads, strerror(failed));
}

int pool_alive(const pool *pool)
{
    return pool->n_threads == 1 || pool->process == getpid();
}

void pool_join(pool *pool)
{
    if (pool->threads && pool_alive(pool))
        for (int32_t i = 0; i < pool->n_started; i++) pthread_join(pool->threads[i].handle, NULL);
    free(pool->threads);
    pool->threads = NULL;
}
