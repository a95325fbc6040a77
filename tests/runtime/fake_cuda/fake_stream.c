/* fake_stream.c - kernels, streams, graphs and events. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../emulator/core/buffers.h"
#include "fake.h"

enum { MOST_LIBRARIES = 16, USUAL_SHARED = 48 << 10, MOST_SHARED = 227 << 10 };

struct CUfunc_st {
    const emulated_kernel *kernel;
    void *library;
    int most_shared, carveout;
    CUfunction next; /* all functions found so far */
};

struct CUmod_st {
    char magic[4];
};

typedef struct operations {
    operation *items;
    size_t n, capacity;
} operations;

struct CUstream_st {
    operations waiting;
    size_t n_done; /* operations that have happened: the first that waits has this number */
    operations captured;
    int is_capturing;
};

struct CUgraph_st {
    operations launches;
};

struct CUgraphExec_st {
    operations launches;
};

struct CUevent_st {
    CUstream stream; /* that it was recorded in last, or NULL */
    size_t after;    /* the number of the first operation behind it */
    double time_ms;
};

static CUfunction functions;
static CUstream capturing;
static double clock_ms; /* a launch takes a millisecond */

int fake_is_capturing(void)
{
    return capturing != NULL;
}

/* -- lists -------------------------------------------------------------------------------------------------------- */

static void append(operations *list, const operation *item)
{
    if (list->n == list->capacity) {
        list->capacity = 2 * list->capacity + 16;
        list->items = realloc(list->items, list->capacity * sizeof *list->items);
        if (!list->items) abort();
    }
    list->items[list->n++] = *item;
}

static void clear(operations *list)
{
    free(list->items);
    *list = (operations){0};
}

/* -- kernels ------------------------------------------------------------------------------------------------------ */

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

static CUresult check_launch(const CUlaunchConfig *c, CUfunction function)
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

CUresult fake_cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra)
{
    CUresult result = fake_enter("cuLaunchKernelEx", 1);
    CUstream stream = config->hStream;
    operation item = {.kind = LAUNCH, .function = function, .grid = (int)config->gridDimX};
    if (!result) result = check_launch(config, function);
    if (result) return result;
    if (extra) return fake_misuse("%s: extra parameters", function->kernel->name);
    for (int i = 0; i < function->kernel->n_pointers; i++) {
        memcpy(&item.arguments[i], parameters[i], sizeof(void *));
        if (!fake_is_device(item.arguments[i], 0))
            return fake_misuse("%s: argument %d is not in the GPU's memory", function->kernel->name, i);
    }
    fake_log("%s %s %d%s", stream->is_capturing ? "capture" : "launch", function->kernel->name, item.grid,
             config->numAttrs ? " dependent" : "");
    if (!stream->is_capturing) return fake_enqueue(stream, &item);
    append(&stream->captured, &item);
    return CUDA_SUCCESS;
}

static CUresult run(const operation *item)
{
    const emulated_kernel *kernel = item->function->kernel;
    char error[2000] = "";
    clock_ms += 1;
    fake_show_buffers(item->function->library);
    int failed = strcmp(kernel->name, fake_settings.kernel) == 0 ||
                 kernel->run(item->grid, (void **)item->arguments, error, sizeof error) != 0;
    if (!failed) return CUDA_SUCCESS;
    fake_log("kernel %s failed: %s", kernel->name, error);
    fake_is_lost = 1;
    return LAUNCH_FAILED;
}

/* -- streams ------------------------------------------------------------------------------------------------------ */

CUresult fake_enqueue(CUstream stream, const operation *item)
{
    if (stream->is_capturing) return fake_misuse("a copy during a capture");
    append(&stream->waiting, item);
    return CUDA_SUCCESS;
}

/* Let the first n of what waits happen; after a failure nothing will. */
static CUresult happen(CUstream stream, size_t n)
{
    CUresult result = CUDA_SUCCESS;
    operations *waiting = &stream->waiting;
    for (size_t i = 0; i < n && !result; i++) {
        const operation *item = waiting->items + i;
        if (item->kind == COPY) memmove(item->to, item->from, item->n_bytes);
        else if (item->kind == FILL) memset(item->to, item->value, item->n_bytes);
        else result = run(item);
    }
    if (result) n = waiting->n;
    if (n) memmove(waiting->items, waiting->items + n, (waiting->n - n) * sizeof *waiting->items);
    waiting->n -= n;
    stream->n_done += n;
    return result;
}

CUresult fake_flush(CUstream stream)
{
    return happen(stream, stream->waiting.n);
}

CUresult fake_cuStreamCreate(CUstream *stream, unsigned flags)
{
    CUresult result = fake_enter("cuStreamCreate", 1);
    if (result) return result;
    if (flags != CU_STREAM_NON_BLOCKING) return fake_misuse("a stream that waits for others");
    *stream = calloc(1, sizeof **stream);
    fake_count(STREAMS, 1);
    return CUDA_SUCCESS;
}

CUresult fake_cuStreamDestroy(CUstream stream)
{
    fake_enter("cuStreamDestroy", 1);
    clear(&stream->waiting);
    clear(&stream->captured);
    if (capturing == stream) capturing = NULL;
    free(stream);
    fake_count(STREAMS, -1);
    return CUDA_SUCCESS;
}

CUresult fake_cuStreamSynchronize(CUstream stream)
{
    CUresult result = fake_enter("cuStreamSynchronize", 1);
    if (result) return result;
    if (stream->is_capturing) return fake_misuse("waiting for a stream during its capture");
    fake_log("wait");
    return fake_is_deaf("cuStreamSynchronize") ? CUDA_SUCCESS : fake_flush(stream);
}

/* -- graphs ------------------------------------------------------------------------------------------------------- */

CUresult fake_cuStreamBeginCapture(CUstream stream, int mode)
{
    CUresult result = fake_enter("cuStreamBeginCapture", 1);
    if (result) return result;
    if (capturing || mode != CU_STREAM_CAPTURE_MODE_THREAD_LOCAL) return fake_misuse("a capture in mode %d", mode);
    capturing = stream;
    stream->is_capturing = 1;
    return CUDA_SUCCESS;
}

CUresult fake_cuStreamEndCapture(CUstream stream, CUgraph *graph)
{
    CUresult result = fake_enter("cuStreamEndCapture", 1);
    operations launches = stream->captured;
    if (!stream->is_capturing) return fake_misuse("the end of no capture");
    stream->is_capturing = 0;
    stream->captured = (operations){0};
    capturing = NULL;
    *graph = NULL;
    if (result) {
        clear(&launches);
        return result;
    }
    *graph = calloc(1, sizeof **graph);
    (*graph)->launches = launches;
    fake_count(GRAPHS, 1);
    return CUDA_SUCCESS;
}

CUresult fake_cuGraphInstantiateWithFlags(CUgraphExec *executable, CUgraph graph, unsigned long long flags)
{
    CUresult result = fake_enter("cuGraphInstantiateWithFlags", 1);
    if (result) return result;
    if (flags) return fake_misuse("flags of a graph");
    *executable = calloc(1, sizeof **executable);
    for (size_t i = 0; i < graph->launches.n; i++) append(&(*executable)->launches, graph->launches.items + i);
    fake_log("instantiate %zu", graph->launches.n);
    fake_count(GRAPHS, 1);
    return CUDA_SUCCESS;
}

CUresult fake_cuGraphUpload(CUgraphExec executable, CUstream stream)
{
    (void)executable, (void)stream;
    return fake_enter("cuGraphUpload", 1);
}

CUresult fake_cuGraphLaunch(CUgraphExec executable, CUstream stream)
{
    CUresult result = fake_enter("cuGraphLaunch", 1);
    if (result) return result;
    fake_log("graph %zu", executable->launches.n);
    for (size_t i = 0; i < executable->launches.n; i++) append(&stream->waiting, executable->launches.items + i);
    return CUDA_SUCCESS;
}

CUresult fake_cuGraphExecDestroy(CUgraphExec executable)
{
    fake_enter("cuGraphExecDestroy", 1);
    clear(&executable->launches);
    free(executable);
    fake_count(GRAPHS, -1);
    return CUDA_SUCCESS;
}

CUresult fake_cuGraphDestroy(CUgraph graph)
{
    fake_enter("cuGraphDestroy", 1);
    clear(&graph->launches);
    free(graph);
    fake_count(GRAPHS, -1);
    return CUDA_SUCCESS;
}

/* -- events ------------------------------------------------------------------------------------------------------- */

CUresult fake_cuEventCreate(CUevent *event, unsigned flags)
{
    CUresult result = fake_enter("cuEventCreate", 1);
    if (result) return result;
    if (flags != CU_EVENT_DEFAULT && flags != CU_EVENT_DISABLE_TIMING) return fake_misuse("event flags %u", flags);
    *event = calloc(1, sizeof **event);
    fake_count(EVENTS, 1);
    return CUDA_SUCCESS;
}

CUresult fake_cuEventDestroy(CUevent event)
{
    fake_enter("cuEventDestroy", 1);
    free(event);
    fake_count(EVENTS, -1);
    return CUDA_SUCCESS;
}

CUresult fake_cuEventRecord(CUevent event, CUstream stream)
{
    CUresult result = fake_enter("cuEventRecord", 1);
    if (result) return result;
    event->stream = stream;
    event->after = stream->n_done + stream->waiting.n;
    event->time_ms = clock_ms;
    for (size_t i = 0; i < stream->waiting.n; i++) event->time_ms += stream->waiting.items[i].kind == LAUNCH;
    return CUDA_SUCCESS;
}

CUresult fake_cuEventSynchronize(CUevent event)
{
    CUresult result = fake_enter("cuEventSynchronize", 1);
    if (result || !event->stream) return result;
    fake_log("wait for an event");
    if (event->after <= event->stream->n_done || fake_is_deaf("cuEventSynchronize")) return CUDA_SUCCESS;
    return happen(event->stream, event->after - event->stream->n_done);
}

CUresult fake_cuEventElapsedTime(float *milliseconds, CUevent start, CUevent end)
{
    CUresult result = fake_enter("cuEventElapsedTime", 1);
    if (result) return result;
    if (!start->stream || !end->stream) return fake_misuse("the time of an event that was not recorded");
    *milliseconds = (float)(end->time_ms - start->time_ms);
    return CUDA_SUCCESS;
}
