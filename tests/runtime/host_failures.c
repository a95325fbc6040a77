/* host failures ARTIFACT - make the n-th allocation fail, for every n: an error each time, and nothing leaks.
 *
 * Linked with --wrap for each of these functions. A step allocates nothing, so it never fails. */
#include <errno.h>
#include <pthread.h>
#include <sys/mman.h>

#include "host.h"

static int n_left = -1; /* calls until one fails; below 0: none does */

static int fails(void)
{
    return n_left >= 0 && n_left-- == 0;
}

void *__real_calloc(size_t n, size_t size);
void *__real_aligned_alloc(size_t alignment, size_t size);
void *__real_mmap(void *at, size_t n, int protection, int flags, int file, off_t offset);
int __real_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *argument);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_aligned_alloc(size_t alignment, size_t size);
void *__wrap_mmap(void *at, size_t n, int protection, int flags, int file, off_t offset);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *argument);

void *__wrap_calloc(size_t n, size_t size)
{
    return fails() ? NULL : __real_calloc(n, size);
}

void *__wrap_aligned_alloc(size_t alignment, size_t size)
{
    return fails() ? NULL : __real_aligned_alloc(alignment, size);
}

void *__wrap_mmap(void *at, size_t n, int protection, int flags, int file, off_t offset)
{
    if (!fails()) return __real_mmap(at, n, protection, flags, file, offset);
    errno = ENOMEM;
    return MAP_FAILED;
}

int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *argument)
{
    return fails() ? EAGAIN : __real_pthread_create(thread, attributes, run, argument);
}

/* Open, feed, fork, feed. Returns the first failure. */
static llmc_status live(const char *path)
{
    const llmc_options options = {.size = sizeof options, .n_threads = 3};
    const int32_t tokens[] = {3, 1, 4, 1, 5};
    llmc_model *model = NULL;
    llmc_sequence *sequence = NULL, *fork = NULL;
    llmc_status status = model_open(path, &options, &model);
    if (!status) status = api->sequence_new(model, &sequence);
    if (!status) status = api->feed(sequence, tokens, 5);
    if (!status) status = api->sequence_fork(sequence, &fork);
    if (!status) status = api->feed(fork, tokens, 5);
    REQUIRE(!status || api->last_error()[0]);
    api->sequence_free(fork);
    api->sequence_free(sequence);
    api->close(model);
    return status;
}

int host_failures(int argc, char **argv)
{
    if (argc != 1) return 2;
    int n_failures = 0;
    for (int n = 0;; n++) {
        n_left = n;
        llmc_status status = live(argv[0]);
        if (n_left >= 0) { /* fewer than n allocations: none failed */
            REQUIRE(!status);
            break;
        }
        REQUIRE(status == LLMC_ERROR_MEMORY || status == LLMC_ERROR_IO); /* IO: the file could not be mapped */
        n_failures++;
    }
    n_left = -1;
    printf("ok, %d failures\n", n_failures);
    return 0;
}
