/* host failures ARTIFACT - make the n-th allocation fail, for every n: an error each time, and nothing leaks.
 *
 * Linked with --wrap for each of these functions. A step allocates nothing, so it never fails. A file that cannot be
 * written leaves what was there before, and nothing beside it. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

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

int __real_mkostemp(char *name, int flags);
ssize_t __real_pwrite(int file, const void *bytes, size_t n, off_t offset);
ssize_t __real_read(int file, void *bytes, size_t n);
int __real_fsync(int file);
int __real_rename(const char *from, const char *to);
int __wrap_mkostemp(char *name, int flags);
ssize_t __wrap_pwrite(int file, const void *bytes, size_t n, off_t offset);
ssize_t __wrap_read(int file, void *bytes, size_t n);
int __wrap_fsync(int file);
int __wrap_rename(const char *from, const char *to);

static int refused(int reason)
{
    errno = reason;
    return -1;
}

int __wrap_mkostemp(char *name, int flags)
{
    return fails() ? refused(EACCES) : __real_mkostemp(name, flags);
}

/* Half of what is asked for, as a disk does that is nearly full. */
ssize_t __wrap_pwrite(int file, const void *bytes, size_t n, off_t offset)
{
    return fails() ? refused(ENOSPC) : __real_pwrite(file, bytes, n > 300 ? n / 2 : n, offset);
}

ssize_t __wrap_read(int file, void *bytes, size_t n)
{
    return fails() ? refused(EIO) : __real_read(file, bytes, n > 300 ? n / 2 : n);
}

/* That of a folder may fail: some file systems have none. */
int __wrap_fsync(int file)
{
    struct stat about;
    return fstat(file, &about) == 0 && S_ISREG(about.st_mode) && fails() ? refused(ENOSPC) : __real_fsync(file);
}

int __wrap_rename(const char *from, const char *to)
{
    return fails() ? refused(EACCES) : __real_rename(from, to);
}

static char saved[4096];

static llmc_status save_and_restore(llmc_model *model, const llmc_sequence *sequence)
{
    llmc_sequence *back = NULL;
    llmc_status status = api->sequence_save(sequence, saved, "a note", 6);
    if (!status) status = api->sequence_restore(model, saved, &back);
    REQUIRE(!status == (back != NULL));
    api->sequence_free(back);
    return status;
}

/* Keep many rows where they may stand for tokens; close gives them back. */
static llmc_status keep_rows(llmc_model *model)
{
    const float numbers[2 * 16] = {0};
    llmc_info info = {.size = sizeof info};
    int32_t first;
    llmc_status status = api->info(model, &info);
    for (int i = 0; i < 40 && info.n_row && !status; i++) status = api->rows_new(model, numbers, 2, &first);
    REQUIRE(info.n_row <= 16);
    return status;
}

/* Open, feed, fork, feed, save, restore, keep rows. Returns the first failure. */
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
    if (!status) status = save_and_restore(model, fork);
    if (!status) status = keep_rows(model);
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
    snprintf(saved, sizeof saved, "%s.seq", argv[0]);
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
