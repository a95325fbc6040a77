/* cuda_driver.c - the driver's functions, each in the version pinned in the header, and its words for errors. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_driver.h"
#include "runtime.h"

/* -- the library -------------------------------------------------------------------------------------------------- */

/* Both forms of cuGetProcAddress: the second, of CUDA 12, also says why a function was not found. */
typedef CUresult (*find_function)(const char *name, void **function, int version, uint64_t flags);
typedef CUresult (*find_function_v2)(const char *name, void **function, int version, uint64_t flags, int *found);

/* The address of a function in the form of that version, or NULL. */
static void *find(void *library, const char *name, int version)
{
    void *function = NULL, *finder = dlsym(library, "cuGetProcAddress_v2");
    if (finder) {
        find_function_v2 call;
        memcpy(&call, &finder, sizeof call);
        return call(name, &function, version, 0, NULL) ? NULL : function;
    }
    finder = dlsym(library, "cuGetProcAddress");
    if (!finder) return NULL;
    find_function call;
    memcpy(&call, &finder, sizeof call);
    return call(name, &function, version, 0) ? NULL : function;
}

static llmc_status too_old(const cuda_driver *driver, const char *path, const char *name, int needed)
{
    int version = 0;
    char has[64] = "is older than CUDA 11.3";
    if (driver->cuDriverGetVersion && driver->cuDriverGetVersion(&version) == CUDA_SUCCESS)
        snprintf(has, sizeof has, "is for CUDA %d.%d", version / 1000, version % 1000 / 10);
    return fail(LLMC_ERROR_TARGET, path, "update the NVIDIA driver, or compile with --target cpu",
                "the NVIDIA driver %s and lacks %s, which came with CUDA %d.%d", has, name, needed / 1000,
                needed % 1000 / 10);
}

llmc_status cuda_load_driver(cuda_driver *driver, const char *path)
{
    const char *named = getenv("LLMC_CUDA_DRIVER");
    /* Never unloaded: the driver has threads of its own. */
    driver->library = dlopen(named ? named : "libcuda.so.1", RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (!driver->library)
        return fail(LLMC_ERROR_TARGET, path, "run it on a machine with an NVIDIA GPU, or compile with --target cpu",
                    "this machine has no NVIDIA driver (%s)", named ? named : "libcuda.so.1");
    void *function;
#define FIND(name, version, parameters)                                \
    function = find(driver->library, #name, version);                  \
    if (!function) return too_old(driver, path, #name, version < 11030 ? 11030 : version); \
    memcpy(&driver->name, &function, sizeof function);
    driver->cuDriverGetVersion = NULL;
    function = find(driver->library, "cuDriverGetVersion", 2020); /* first: too_old asks it */
    memcpy(&driver->cuDriverGetVersion, &function, sizeof function);
    LLMC_CUDA_FUNCTIONS(FIND)
#undef FIND
    return LLMC_OK;
}

/* -- errors ------------------------------------------------------------------------------------------------------- */

const char *cuda_error(const cuda_driver *driver, CUresult result, char *text, size_t n)
{
    const char *name = NULL, *words = NULL;
    if (driver->cuGetErrorName(result, &name) || !name) name = "unknown error";
    if (driver->cuGetErrorString(result, &words) || !words) words = "the driver has no words for it";
    snprintf(text, n, "%s (%d: %s)", name, result, words);
    return text;
}
