/* fake_kernel.c - modules, and the kernels that stand for a GPU's. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fake.h"

enum { USUAL_SHARED = 48 << 10, MOST_SHARED = 227 << 10 };

struct CUmod_st {
    char magic[4];
};

static CUfunction functions;

/* The kernel of this name in the libraries of the environment. */
static CUfunction search(const char *name)
{
    char paths[8192] = "", *rest = NULL;
    const char *given = getenv("LLMC_FAKE_CUDA_KERNELS");
    if (given) snprintf(paths, sizeof paths, "%s", given);
    for (char *path = strtok_r(paths, ":", &rest); path; path = strtok_r(NULL, ":", &rest)) {
        void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        void *symbol = library ? dlsym(library, "emulated_kernels") : NULL;
        const emulated_kernel *(*list)(int *count);
        int n = 0;
        if (!symbol) {
            fake_misuse("no kernels in %s", path);
            continue;
        }
        for (CUfunction known = functions; known; known = known->next)
            if (known->library == library && strcmp(known->kernel->name, name) == 0) return known;
        memcpy(&list, &symbol, sizeof list);
        const emulated_kernel *kernels = list(&n);
        for (int i = 0; i < n; i++) {
            if (strcmp(kernels[i].name, name) != 0) continue;
            CUfunction found = calloc(1, sizeof *found);
            *found = (struct CUfunc_st){kernels + i, library, USUAL_SHARED, 0, functions};
            return functions = found;
        }
    }
    return NULL;
}

CUresult fake_cuModuleLoadData(CUmodule *module, const void *image)
{
    CUresult result = fake_enter("cuModuleLoadData", 1);
    if (result) return result;
    if (memcmp(image, "\177ELF", 4) != 0) return INVALID_IMAGE;
    *module = calloc(1, sizeof **module);
    memcpy((*module)->magic, image, 4);
    fake_count(MODULES, 1);
    return CUDA_SUCCESS;
}

CUresult fake_cuModuleUnload(CUmodule module)
{
    fake_enter("cuModuleUnload", 1);
    fake_count(MODULES, -1);
    free(module);
    return CUDA_SUCCESS;
}

CUresult fake_cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name)
{
    CUresult result = fake_enter("cuModuleGetFunction", 1);
    if (result) return result;
    if (memcmp(module->magic, "\177ELF", 4) != 0) return fake_misuse("a function of no module");
    *function = search(name);
    return *function ? CUDA_SUCCESS : NOT_FOUND;
}

CUresult fake_cuFuncGetAttribute(int *value, int attribute, CUfunction function)
{
    CUresult result = fake_enter("cuFuncGetAttribute", 1);
    if (result) return result;
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK) return fake_misuse("function attribute %d", attribute);
    *value = function->kernel->n_threads;
    return CUDA_SUCCESS;
}

CUresult fake_cuFuncSetAttribute(CUfunction function, int attribute, int value)
{
    CUresult result = fake_enter("cuFuncSetAttribute", 1);
    if (result) return result;
    if (attribute == CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT && value <= 100) {
        function->carveout = value;
        return CUDA_SUCCESS;
    }
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value > MOST_SHARED)
        return fake_misuse("function attribute %d is set to %d", attribute, value);
    function->most_shared = value;
    return CUDA_SUCCESS;
}

CUresult fake_check_launch(const CUlaunchConfig *c, CUfunction function)
{
    const emulated_kernel *kernel = function->kernel;
    if (!c->gridDimX || c->gridDimY != 1 || c->gridDimZ != 1 || c->blockDimY != 1 || c->blockDimZ != 1)
        return fake_misuse("%s: a grid or blocks of more than one dimension", kernel->name);
    if ((int)c->gridDimX % kernel->cluster)
        return fake_misuse("%s: a grid of %u blocks; its clusters have %d", kernel->name, c->gridDimX, kernel->cluster);
    if ((int)c->blockDimX != kernel->n_threads || c->sharedMemBytes != kernel->shared_bytes)
        return fake_misuse("%s: blocks of %u threads with %u shared bytes; it is made for %d with %u", kernel->name,
                           c->blockDimX, c->sharedMemBytes, kernel->n_threads, kernel->shared_bytes);
    if ((int)c->sharedMemBytes > function->most_shared)
        return fake_misuse("%s: its shared memory was not allowed", kernel->name);
    if (c->numAttrs > 1 || (c->numAttrs && c->attrs->id != CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION))
        return fake_misuse("%s: unknown launch attributes", kernel->name);
    if (c->numAttrs && fake_settings.version < 12030) return fake_misuse("%s: too old for such graphs", kernel->name);
    if (c->numAttrs && fake_settings.capability < 90) return fake_misuse("%s: too old a GPU to overlap", kernel->name);
    if (c->numAttrs && function->carveout != CU_SHAREDMEM_CARVEOUT_MAX_SHARED)
        return fake_misuse("%s: it would wait for another division of L1 and shared memory", kernel->name);
    return CUDA_SUCCESS;
}
