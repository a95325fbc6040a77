/* cpu.c - which instructions this machine has, and how many threads to run. */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "runtime.h"

/* -- instructions ------------------------------------------------------------------------------------------------- */

/* Names as in /proc/cpuinfo, in the order of the bits LLMC_CPU_*. */
static const char *const NAMES[] = {
    "avx2",     "fma",      "f16c",     "bmi1",        "bmi2",        "movbe",    "avx512f",  "avx512bw",
    "avx512cd", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8",
    "asimd",    "asimddp",  "i8mm",
};
enum {
    N_NAMES = sizeof NAMES / sizeof *NAMES,
    LEVEL_3 = LLMC_CPU_AVX2 | LLMC_CPU_FMA | LLMC_CPU_F16C | LLMC_CPU_BMI1 | LLMC_CPU_BMI2 | LLMC_CPU_MOVBE,
    LEVEL_4 = LEVEL_3 | LLMC_CPU_AVX512F | LLMC_CPU_AVX512BW | LLMC_CPU_AVX512CD | LLMC_CPU_AVX512DQ |
              LLMC_CPU_AVX512VL,
    LEVEL_4_BF16 = LEVEL_4 | LLMC_CPU_AVX512_BF16 | LLMC_CPU_AVX512_VNNI,
    LEVEL_4_AMX = LEVEL_4_BF16 | LLMC_CPU_AMX_TILE | LLMC_CPU_AMX_BF16 | LLMC_CPU_AMX_INT8,
    LEVEL_ARM = LLMC_CPU_ASIMD | LLMC_CPU_ASIMDDP,
    LEVEL_ARM_I8MM = LEVEL_ARM | LLMC_CPU_I8MM,
};
/* Of cpuid's leaf 7, in edx; older compilers' cpuid.h does not name them. */
enum { EDX_AMX_BF16 = 1 << 22, EDX_AMX_TILE = 1 << 24, EDX_AMX_INT8 = 1 << 25 };
/* Requests to arch_prctl, and the part of a thread's state that tiles are; older kernels' headers lack them. */
enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };

#ifdef __x86_64__
#include <cpuid.h>

/* Which register files the operating system saves: bits 1, 2 for ymm, bits 5, 6, 7 for zmm and masks, 17, 18 for
 * tiles. */
static uint32_t saved_registers(void)
{
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

uint32_t cpu_features(void)
{
    unsigned a, b, c, d, a1 = 0, features = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    uint32_t saved = c & bit_OSXSAVE ? saved_registers() : 0;
    int ymm = (saved & 0x06) == 0x06, zmm = (saved & 0xe6) == 0xe6, tiles = (saved & 0x60000) == 0x60000;
    if (c & bit_MOVBE) features |= LLMC_CPU_MOVBE;
    if (ymm && c & bit_FMA) features |= LLMC_CPU_FMA;
    if (ymm && c & bit_F16C) features |= LLMC_CPU_F16C;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return features;
    if (a >= 1) {
        unsigned b1, c1, d1;
        __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1);
    }
    if (b & bit_BMI) features |= LLMC_CPU_BMI1;
    if (b & bit_BMI2) features |= LLMC_CPU_BMI2;
    if (ymm && b & bit_AVX2) features |= LLMC_CPU_AVX2;
    if (zmm && b & bit_AVX512F) features |= LLMC_CPU_AVX512F;
    if (zmm && b & bit_AVX512BW) features |= LLMC_CPU_AVX512BW;
    if (zmm && b & bit_AVX512CD) features |= LLMC_CPU_AVX512CD;
    if (zmm && b & bit_AVX512DQ) features |= LLMC_CPU_AVX512DQ;
    if (zmm && b & bit_AVX512VL) features |= LLMC_CPU_AVX512VL;
    if (zmm && c & bit_AVX512VNNI) features |= LLMC_CPU_AVX512_VNNI;
    if (zmm && a1 & bit_AVX512BF16) features |= LLMC_CPU_AVX512_BF16;
    if (tiles && d & EDX_AMX_TILE) features |= LLMC_CPU_AMX_TILE;
    if (tiles && d & EDX_AMX_BF16) features |= LLMC_CPU_AMX_BF16;
    if (tiles && d & EDX_AMX_INT8) features |= LLMC_CPU_AMX_INT8;
    return features;
}

/* 0, or an error number. */
static int ask_for_tiles(void)
{
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0 ? 0 : errno;
}
#else
#ifdef __aarch64__
#include <sys/auxv.h>

/* Bits that Linux gives for AT_HWCAP and AT_HWCAP2; older kernels' headers lack them. */
enum { HAS_ASIMD = 1 << 1, HAS_ASIMDDP = 1 << 20, HAS_I8MM = 1 << 13 };

uint32_t cpu_features(void)
{
    unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
    return (first & HAS_ASIMD ? LLMC_CPU_ASIMD : 0) | (first & HAS_ASIMDDP ? LLMC_CPU_ASIMDDP : 0) |
           (second & HAS_I8MM ? LLMC_CPU_I8MM : 0);
}
#else
uint32_t cpu_features(void)
{
    return 0;
}
#endif

static int ask_for_tiles(void)
{
    return ENOSYS;
}
#endif

llmc_status cpu_check(uint32_t needed, uint32_t present, const char *path)
{
    uint32_t missing = needed & ~present;
    char names[256] = "";
    int n_missing = 0;
    if (!missing) return LLMC_OK;
    for (uint32_t bit = 0; bit < 32; bit++) {
        size_t n = strlen(names);
        if (!(missing >> bit & 1)) continue;
        const char *separator = n_missing++ ? ", " : "";
        if (bit < N_NAMES) snprintf(names + n, sizeof names - n, "%s%s", separator, NAMES[bit]);
        else snprintf(names + n, sizeof names - n, "%sunknown bit %u", separator, bit);
    }
    const char *hint = (present & LEVEL_4_BF16) == LEVEL_4_BF16 ? "compile with --target cpu:x86-64-v4+bf16"
                       : (present & LEVEL_4) == LEVEL_4         ? "compile with --target cpu:x86-64-v4"
                       : (present & LEVEL_3) == LEVEL_3         ? "compile with --target cpu:x86-64-v3"
                       : (present & LEVEL_ARM) == LEVEL_ARM     ? "compile with --target cpu:aarch64"
                       : present & LLMC_CPU_ASIMD ? "run it on a machine with ARMv8.2's dot products"
                                                  : "run it on a machine with AVX2 or better";
    return fail(LLMC_ERROR_TARGET, path, hint, "this artifact needs the CPU feature%s %s, which this machine lacks",
                n_missing > 1 ? "s" : "", names);
}

/* Linux gives a process tiles when it asks for them, and to all its threads, unless one of these has an alternate stack
 * for signals that is too small to save them on. */
llmc_status cpu_allow(uint32_t needed, const char *path)
{
    int refused = needed & LLMC_CPU_AMX_TILE ? ask_for_tiles() : 0;
    if (!refused) return LLMC_OK;
    return fail(LLMC_ERROR_TARGET, path, "compile with --target cpu:x86-64-v4+bf16",
                "the system does not let this process use AMX, which this artifact needs: %s",
                refused == ENOSPC ? "a thread's stack for signals is too small" : strerror(refused));
}

const char *cpu_level(uint32_t features)
{
    return features == LEVEL_3        ? "x86-64-v3"
           : features == LEVEL_4      ? "x86-64-v4"
           : features == LEVEL_4_BF16 ? "x86-64-v4+bf16"
           : features == LEVEL_4_AMX  ? "x86-64-v4+amx"
           : features == LEVEL_ARM      ? "aarch64"
           : features == LEVEL_ARM_I8MM ? "aarch64+i8mm"
                                        : NULL;
}

/* -- threads ------------------------------------------------------------------------------------------------------ */

/* values [n_wanted] from the first line of a file, "max" counting as -1; 0 when they are not there. */
static int read_numbers(const char *path, int n_wanted, long long *values)
{
    char line[128] = "", *end;
    FILE *file = fopen(path, "re");
    if (!file) return 0;
    int read = fgets(line, sizeof line, file) != NULL;
    fclose(file);
    if (!read) return 0;
    char *at = line;
    for (int i = 0; i < n_wanted; i++, at = end) {
        values[i] = strtoll(at, &end, 10);
        if (end == at && strncmp(at, "max", 3) == 0) values[i] = -1, end = at + 3;
        if (end == at) return 0;
    }
    return 1;
}

/* The quota of one group, in CPUs rounded up; `most` when it sets none. folder: "/sys/fs/cgroup/…" */
static int32_t group_quota(const char *folder, int version, int32_t most)
{
    char path[4400];
    long long quota[2] = {-1, -1};
    if (version == 2) {
        snprintf(path, sizeof path, "%s/cpu.max", folder);
        if (!read_numbers(path, 2, quota)) return most;
    } else {
        snprintf(path, sizeof path, "%s/cpu.cfs_quota_us", folder);
        if (!read_numbers(path, 1, quota)) return most;
        snprintf(path, sizeof path, "%s/cpu.cfs_period_us", folder);
        if (!read_numbers(path, 1, quota + 1)) return most;
    }
    if (quota[0] <= 0 || quota[1] <= 0) return most;
    long long n = (quota[0] - 1) / quota[1] + 1;
    return n < most ? (int32_t)n : most;
}

/* The least quota of a group and those above it: each limits all below. Inside a container the path of the group
 * may not exist; its own limits are then those of the root that the container sees. */
static int32_t quota_upwards(const char *root, char *group, int version, int32_t most)
{
    char folder[4200];
    for (;;) {
        snprintf(folder, sizeof folder, "%s%s", root, group);
        most = group_quota(folder, version, most);
        char *slash = strrchr(group, '/');
        if (!slash) return most;
        *slash = '\0';
    }
}

/* /proc/self/cgroup has lines "0::/group" (version 2) and "4:cpu,cpuacct:/group" (version 1). */
static int32_t quota_cpus(int32_t most)
{
    char line[4096];
    FILE *file = fopen("/proc/self/cgroup", "re");
    if (!file) return most;
    while (fgets(line, sizeof line, file)) {
        char *controllers = strchr(line, ':'), *group = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!group) continue;
        *group++ = '\0';
        group[strcspn(group, "\n")] = '\0';
        controllers++;
        if (!*controllers) most = quota_upwards("/sys/fs/cgroup", group, 2, most);
        for (char *rest = controllers; *rest; rest += strcspn(rest, ","), rest += *rest == ',')
            if (strcspn(rest, ",") == 3 && strncmp(rest, "cpu", 3) == 0)
                most = quota_upwards("/sys/fs/cgroup/cpu", group, 1, most);
    }
    fclose(file);
    return most;
}

int32_t cpu_count(void)
{
    cpu_set_t *set = NULL;
    int32_t n = 1;
    for (int n_bits = 1024; n_bits <= 1 << 18; n_bits *= 4) { /* the kernel refuses a set smaller than its own */
        size_t n_bytes = CPU_ALLOC_SIZE(n_bits);
        set = CPU_ALLOC(n_bits);
        if (!set) break;
        int known = sched_getaffinity(0, n_bytes, set) == 0;
        if (known) n = CPU_COUNT_S(n_bytes, set);
        CPU_FREE(set);
        if (known) break;
    }
    return quota_cpus(n < 1 ? 1 : n);
}
