/* fake.c - log, settings, and the driver's functions that are about neither memory nor streams. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fake.h"

#define EXPORT __attribute__((visibility("default")))

settings fake_settings;
int fake_is_lost;
static int is_initialized, n_calls; /* calls of the function that is to fail */
static int counts[N_KINDS];
static _Thread_local int n_pushed;
static const char *const KINDS[N_KINDS] = {
    "contexts", "allocations", "pinned", "modules", "streams", "events", "graphs",
};

/* -- log ---------------------------------------------------------------------------------------------------------- */

static void write_line(const char *before, const char *format, va_list arguments)
{
    const char *path = getenv("LLMC_FAKE_CUDA_LOG");
    FILE *file = path ? fopen(path, "ae") : NULL;
    if (!file) return;
    fputs(before, file);
    vfprintf(file, format, arguments);
    fputc('\n', file);
    fclose(file);
}

void fake_log(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    write_line("", format, arguments);
    va_end(arguments);
}

CUresult fake_misuse(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    write_line("error: ", format, arguments);
    va_end(arguments);
    return INVALID_VALUE;
}

void fake_count(int kind, int change)
{
    counts[kind] += change;
    if (counts[kind] < 0) fake_misuse("more %s given back than taken", KINDS[kind]);
}

__attribute__((destructor)) static void report_leaks(void)
{
    for (int i = 0; i < N_KINDS; i++)
        if (counts[i]) fake_log("leak: %d %s", counts[i], KINDS[i]);
    if (n_pushed) fake_log("leak: %d contexts left current", n_pushed);
}

/* What is taken and not given back, contexts that are current among it. */
EXPORT int fake_cuda_live(void);

int fake_cuda_live(void)
{
    int n = n_pushed;
    for (int i = 0; i < N_KINDS; i++) n += counts[i];
    return n;
}

/* -- settings ----------------------------------------------------------------------------------------------------- */

void fake_configure(void)
{
    char text[512] = "", *rest = NULL;
    const char *given = getenv("LLMC_FAKE_CUDA");
    settings *s = &fake_settings;
    *s = (settings){.devices = 1, .capability = 90, .version = 13000, .n_free = 64ull << 30};
    n_calls = fake_is_lost = 0;
    if (given) snprintf(text, sizeof text, "%s", given);
    for (char *word = strtok_r(text, " ", &rest); word; word = strtok_r(NULL, " ", &rest)) {
        int known = sscanf(word, "devices=%d", &s->devices) == 1 ||
                    sscanf(word, "capability=%d", &s->capability) == 1 ||
                    sscanf(word, "version=%d", &s->version) == 1 || sscanf(word, "hasty=%d", &s->hasty) == 1 ||
                    sscanf(word, "free=%zu", &s->n_free) == 1 || sscanf(word, "node=%zu", &s->node_bytes) == 1 ||
                    sscanf(word, "lacks=%63s", s->lacks) == 1 || sscanf(word, "kernel=%127s", s->kernel) == 1 ||
                    sscanf(word, "hangs=%127s", s->hangs) == 1 || sscanf(word, "deaf=%63s", s->deaf) == 1 ||
                    sscanf(word, "fail=%63[^:]:%d:%d", s->fail, &s->fail_at, &s->fail_code) == 3;
        if (!known) fake_misuse("setting %s", word);
    }
}

int fake_is_deaf(const char *name)
{
    return strcmp(name, fake_settings.deaf) == 0;
}

CUresult fake_enter(const char *name, int needs_context)
{
    if (strcmp(name, fake_settings.fail) == 0 && ++n_calls == fake_settings.fail_at) {
        fake_log("%s fails with %d", name, fake_settings.fail_code);
        return fake_settings.fail_code;
    }
    if (!is_initialized && needs_context >= 0) {
        fake_misuse("%s before cuInit", name);
        return NOT_INITIALIZED;
    }
    if (needs_context > 0 && !n_pushed) {
        fake_misuse("%s without a context", name);
        return INVALID_CONTEXT;
    }
    return fake_is_lost && needs_context > 0 ? LAUNCH_FAILED : CUDA_SUCCESS;
}

/* -- finding functions -------------------------------------------------------------------------------------------- */

EXPORT CUresult cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *found);

CUresult cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *found)
{
    *function = NULL;
    if (found) *found = 0;
    if (flags) return fake_misuse("cuGetProcAddress with flags");
    if (strcmp(name, "cuDriverGetVersion") == 0) fake_configure();
    if (strcmp(name, fake_settings.lacks) == 0) return NOT_FOUND;
#define FIND(known, pinned, parameters)                                                          \
    if (strcmp(name, #known) == 0 && version == pinned) {                                        \
        CUresult(*fake) parameters = fake_##known;                                               \
        memcpy(function, &fake, sizeof fake);                                                    \
        return CUDA_SUCCESS;                                                                     \
    }
    LLMC_CUDA_FUNCTIONS(FIND)
#undef FIND
    fake_misuse("there is no %s of version %d", name, version);
    return NOT_FOUND;
}

/* -- the driver and its devices ----------------------------------------------------------------------------------- */

CUresult fake_cuInit(unsigned flags)
{
    CUresult result = fake_enter("cuInit", -1);
    if (result) return result;
    if (flags) return fake_misuse("cuInit with flags");
    if (fake_settings.devices == 0) return CUDA_ERROR_NO_DEVICE;
    is_initialized = 1;
    return CUDA_SUCCESS;
}

CUresult fake_cuDriverGetVersion(int *version)
{
    *version = fake_settings.version;
    return CUDA_SUCCESS;
}

CUresult fake_cuGetErrorName(CUresult error, const char **name)
{
    *name = error == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY"
            : error == LAUNCH_FAILED          ? "CUDA_ERROR_LAUNCH_FAILED"
            : error == INVALID_IMAGE          ? "CUDA_ERROR_INVALID_IMAGE"
                                              : NULL;
    return *name ? CUDA_SUCCESS : INVALID_VALUE;
}

CUresult fake_cuGetErrorString(CUresult error, const char **text)
{
    *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory"
            : error == LAUNCH_FAILED          ? "unspecified launch failure"
            : error == INVALID_IMAGE          ? "device kernel image is invalid"
                                              : NULL;
    return *text ? CUDA_SUCCESS : INVALID_VALUE;
}

CUresult fake_cuDeviceGetCount(int *count)
{
    *count = 0;
    CUresult result = fake_enter("cuDeviceGetCount", 0);
    if (!result) *count = fake_settings.devices;
    return result;
}

CUresult fake_cuDeviceGet(CUdevice *device, int ordinal)
{
    CUresult result = fake_enter("cuDeviceGet", 0);
    if (result) return result;
    if (ordinal < 0 || ordinal >= fake_settings.devices) return fake_misuse("device %d", ordinal);
    fake_log("device %d", ordinal);
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUresult fake_cuDeviceGetName(char *name, int length, CUdevice device)
{
    CUresult result = fake_enter("cuDeviceGetName", 0);
    if (!result) snprintf(name, (size_t)length, "Fake GPU %d", device);
    return result;
}

CUresult fake_cuDeviceGetAttribute(int *value, int attribute, CUdevice device)
{
    CUresult result = fake_enter("cuDeviceGetAttribute", 0);
    if (result) return result;
    int capability = fake_settings.capability;
    if (attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) *value = capability / 10;
    else if (attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR) *value = capability % 10;
    else if (attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
        *value = (capability >= 90 ? 227 : capability == 80 ? 163 : 99) << 10;
    else return fake_misuse("attribute %d of device %d", attribute, device);
    return CUDA_SUCCESS;
}

/* The compiler asks for these two by their plain names, before it opens anything. */
EXPORT CUresult cuInit(unsigned flags);
EXPORT CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device);

CUresult cuInit(unsigned flags)
{
    fake_configure();
    return fake_cuInit(flags);
}

CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device)
{
    return fake_cuDeviceGetAttribute(value, attribute, device);
}

/* -- contexts ----------------------------------------------------------------------------------------------------- */

CUresult fake_cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device)
{
    CUresult result = fake_enter("cuDevicePrimaryCtxRetain", 0);
    if (result) return result;
    fake_count(CONTEXTS, 1);
    *context = (CUcontext)(uintptr_t)(0x1000 + device);
    return CUDA_SUCCESS;
}

CUresult fake_cuDevicePrimaryCtxRelease(CUdevice device)
{
    CUresult result = fake_enter("cuDevicePrimaryCtxRelease", 0);
    if (result) return result;
    fake_count(CONTEXTS, -1);
    fake_log("release %d", device);
    return CUDA_SUCCESS;
}

CUresult fake_cuCtxPushCurrent(CUcontext context)
{
    CUresult result = fake_enter("cuCtxPushCurrent", 0);
    if (result) return result;
    if (!context || !counts[CONTEXTS]) return fake_misuse("a context that was not retained is made current");
    n_pushed++;
    return CUDA_SUCCESS;
}

CUresult fake_cuCtxPopCurrent(CUcontext *context)
{
    if (!n_pushed) return fake_misuse("no context to take away");
    n_pushed--;
    *context = NULL;
    return CUDA_SUCCESS;
}
