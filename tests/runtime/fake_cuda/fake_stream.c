/* fake_stream.c - streams, launches, graphs and events. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "fake.h"

typedef struct operations {
    operation *items;
    size_t n, capacity;
} operations;

struct CUstream_st {
    char name[24]; /* in the log */
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
    int64_t n_bytes;
};

struct CUevent_st {
    CUstream stream; /* that it was recorded in last, or NULL */
    size_t after;    /* the number of the first operation behind it */
    double time_ms;
};

static CUstream capturing;
static int n_streams;
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

/* -- launches ----------------------------------------------------------------------------------------------------- */

CUresult fake_cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra)
{
    CUresult result = fake_enter("cuLaunchKernelEx", 1);
    CUstream stream = config->hStream;
    operation item = {.kind = LAUNCH, .function = function, .grid = (int)config->gridDimX};
    if (!result) result = fake_check_launch(config, function);
    if (result) return result;
    if (extra) return fake_misuse("%s: extra parameters", function->kernel->name);
    for (int i = 0; i < function->kernel->n_pointers; i++) {
        memcpy(&item.arguments[i], parameters[i], sizeof(void *));
        if (!fake_is_device(item.arguments[i], 0) && !fake_is_mapped(item.arguments[i], 0))
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
    while (strcmp(kernel->name, fake_settings.hangs) == 0) pause();
    int failed = strcmp(kernel->name, fake_settings.kernel) == 0 ||
                 kernel->run(item->grid, (void **)item->arguments, error, sizeof error) != 0;
    if (!failed) return CUDA_SUCCESS;
    fake_log("kernel %s failed: %s", kernel->name, error);
    fake_is_lost = 1;
    return LAUNCH_FAILED;
}

/* -- streams ------------------------------------------------------------------------------------------------------ */

const char *fake_stream_name(CUstream stream)
{
    return stream->name;
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

CUresult fake_enqueue(CUstream stream, const operation *item)
{
    if (stream->is_capturing) return fake_misuse("a copy during a capture");
    append(&stream->waiting, item);
    return fake_settings.hasty ? fake_flush(stream) : CUDA_SUCCESS;
}

CUresult fake_cuStreamCreate(CUstream *stream, unsigned flags)
{
    CUresult result = fake_enter("cuStreamCreate", 1);
    if (result) return result;
    if (flags != CU_STREAM_NON_BLOCKING) return fake_misuse("a stream that waits for others");
    *stream = calloc(1, sizeof **stream);
    if (n_streams++) snprintf((*stream)->name, sizeof (*stream)->name, " (stream %d)", n_streams);
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
    n_streams--;
    fake_count(STREAMS, -1);
    return CUDA_SUCCESS;
}

CUresult fake_cuStreamSynchronize(CUstream stream)
{
    CUresult result = fake_enter("cuStreamSynchronize", 1);
    if (result) return result;
    if (stream->is_capturing) return fake_misuse("waiting for a stream during its capture");
    fake_log("wait%s", stream->name);
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
    const int64_t n_bytes = (int64_t)(graph->launches.n * fake_settings.node_bytes);
    if (!fake_use(n_bytes)) return CUDA_ERROR_OUT_OF_MEMORY;
    *executable = calloc(1, sizeof **executable);
    (*executable)->n_bytes = n_bytes;
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
    return fake_settings.hasty ? fake_flush(stream) : CUDA_SUCCESS;
}

CUresult fake_cuGraphExecDestroy(CUgraphExec executable)
{
    fake_enter("cuGraphExecDestroy", 1);
    fake_use(-executable->n_bytes);
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
