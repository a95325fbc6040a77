/* host quota FOLDER - print how many CPUs a process may use that sees 16, with /proc and /sys as they lie in FOLDER. */
#define _GNU_SOURCE
#include <sched.h>
#include <string.h>

#include "host.h"

static const char *root; /* NULL: the real files */

FILE *__real_fopen(const char *path, const char *mode);
FILE *__wrap_fopen(const char *path, const char *mode);
int __real_sched_getaffinity(pid_t process, size_t n_bytes, cpu_set_t *set);
int __wrap_sched_getaffinity(pid_t process, size_t n_bytes, cpu_set_t *set);

FILE *__wrap_fopen(const char *path, const char *mode)
{
    char moved[4096];
    if (!root) return __real_fopen(path, mode);
    snprintf(moved, sizeof moved, "%s%s", root, path);
    return __real_fopen(moved, mode);
}

int __wrap_sched_getaffinity(pid_t process, size_t n_bytes, cpu_set_t *set)
{
    if (!root) return __real_sched_getaffinity(process, n_bytes, set);
    CPU_ZERO_S(n_bytes, set);
    for (size_t i = 0; i < 16; i++) CPU_SET_S(i, n_bytes, set);
    return 0;
}

int host_quota(int argc, char **argv)
{
    if (argc != 1) return 2;
    root = argv[0];
    printf("%d\n", (int)cpu_count());
    return 0;
}
