/* fake_memory.c - a GPU's memory and pinned memory: blocks of the host's, with a guard behind each. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include "fake.h"

enum { MOST_BLOCKS = 256, GUARD_BYTES = 64, POISON = 0xff, ALIGNMENT = 512 };

typedef struct block {
    char *at; /* NULL: a free place in the list */
    size_t n_bytes;
    int is_pinned, may_map, is_mapped; /* mapped: kernels may touch it, at the host's address, as all are one space */
} block;

static block blocks[MOST_BLOCKS];
static size_t n_used;

static const block *find(const void *at, size_t n_bytes, int is_pinned)
{
    const char *first = at;
    for (int i = 0; i < MOST_BLOCKS; i++) {
        const block *b = blocks + i;
        if (b->at && b->is_pinned == is_pinned && first >= b->at && first <= b->at + b->n_bytes &&
            n_bytes <= (size_t)(b->at + b->n_bytes - first))
            return b;
    }
    return NULL;
}

int fake_is_device(const void *at, size_t n_bytes)
{
    return find(at, n_bytes, 0) != NULL;
}

int fake_is_pinned(const void *at, size_t n_bytes)
{
    return find(at, n_bytes, 1) != NULL;
}

int fake_is_mapped(const void *at, size_t n_bytes)
{
    const block *b = find(at, n_bytes, 1);
    return b && b->is_mapped;
}

void fake_show_buffers(void *library)
{
    void (*set)(const emulated_buffer *, int);
    void *symbol = dlsym(library, "emulated_set_buffers");
    emulated_buffer buffers[MOST_BLOCKS];
    int n = 0;
    if (!symbol) return;
    memcpy(&set, &symbol, sizeof set);
    for (int i = 0; i < MOST_BLOCKS; i++)
        if (blocks[i].at && (!blocks[i].is_pinned || blocks[i].is_mapped))
            buffers[n++] = (emulated_buffer){blocks[i].at, blocks[i].n_bytes, GUARD_BYTES,
                                             blocks[i].is_pinned ? "mapped memory" : "device memory"};
    set(buffers, n);
}

/* -- taking and giving back --------------------------------------------------------------------------------------- */

int fake_use(int64_t n_bytes)
{
    if (n_bytes > 0 && (size_t)n_bytes > fake_settings.n_free - n_used) return 0;
    n_used += (size_t)n_bytes;
    return 1;
}

static CUresult take(char **at, size_t n_bytes, int is_pinned)
{
    size_t rounded = (n_bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    int place = 0;
    while (place < MOST_BLOCKS && blocks[place].at) place++;
    if (!n_bytes || place == MOST_BLOCKS) return fake_misuse("%zu bytes are asked for", n_bytes);
    if (fake_is_capturing()) return fake_misuse("memory is taken during a capture");
    if (!is_pinned && (n_bytes > fake_settings.n_free || n_used > fake_settings.n_free - n_bytes))
        return CUDA_ERROR_OUT_OF_MEMORY;
    *at = aligned_alloc(ALIGNMENT, rounded + ALIGNMENT);
    if (!*at) return CUDA_ERROR_OUT_OF_MEMORY;
    memset(*at, POISON, rounded + ALIGNMENT);
    blocks[place] = (block){.at = *at, .n_bytes = n_bytes, .is_pinned = is_pinned};
    if (!is_pinned) n_used += n_bytes;
    fake_count(is_pinned ? PINNED : ALLOCATIONS, 1);
    fake_log("%s %zu", is_pinned ? "pin" : "alloc", n_bytes);
    return CUDA_SUCCESS;
}

static CUresult give_back(void *at, int is_pinned)
{
    block *b = (block *)find(at, 0, is_pinned);
    if (!b || b->at != at) return fake_misuse("memory is given back that was not taken");
    for (size_t i = 0; i < GUARD_BYTES; i++)
        if ((unsigned char)b->at[b->n_bytes + i] != POISON) fake_misuse("memory behind a block was written");
    if (!is_pinned) n_used -= b->n_bytes;
    fake_count(is_pinned ? PINNED : ALLOCATIONS, -1);
    free(b->at);
    *b = (block){0};
    return CUDA_SUCCESS;
}

CUresult fake_cuMemGetInfo(size_t *n_free, size_t *n_bytes)
{
    CUresult result = fake_enter("cuMemGetInfo", 1);
    if (result) return result;
    *n_bytes = fake_settings.n_free;
    *n_free = fake_settings.n_free - n_used;
    return CUDA_SUCCESS;
}

CUresult fake_cuMemAlloc(CUdeviceptr *at, size_t n_bytes)
{
    char *bytes = NULL;
    CUresult result = fake_enter("cuMemAlloc", 1);
    if (!result) result = take(&bytes, n_bytes, 0);
    if (!result) *at = (uintptr_t)bytes;
    return result;
}

CUresult fake_cuMemFree(CUdeviceptr at)
{
    fake_enter("cuMemFree", 1); /* works for what is lost too, so that leaks of ours show */
    return give_back((void *)(uintptr_t)at, 0);
}

CUresult fake_cuMemAllocHost(void **at, size_t n_bytes)
{
    char *bytes = NULL;
    CUresult result = fake_enter("cuMemAllocHost", 1);
    if (!result) result = take(&bytes, n_bytes, 1);
    if (!result) *at = bytes;
    return result;
}

CUresult fake_cuMemHostAlloc(void **at, size_t n_bytes, unsigned flags)
{
    char *bytes = NULL;
    CUresult result = fake_enter("cuMemHostAlloc", 1);
    if (!result && flags != CU_MEMHOSTALLOC_DEVICEMAP) return fake_misuse("pinned memory with flags %u", flags);
    if (!result) result = take(&bytes, n_bytes, 1);
    if (result) return result;
    ((block *)find(bytes, 0, 1))->may_map = 1;
    *at = bytes;
    return CUDA_SUCCESS;
}

CUresult fake_cuMemHostGetDevicePointer(CUdeviceptr *at, void *host, unsigned flags)
{
    CUresult result = fake_enter("cuMemHostGetDevicePointer", 1);
    block *b = (block *)find(host, 0, 1);
    if (result) return result;
    if (flags || !b || !b->may_map) return fake_misuse("memory that is not to be mapped");
    b->is_mapped = 1;
    *at = (uintptr_t)host;
    return CUDA_SUCCESS;
}

CUresult fake_cuMemFreeHost(void *at)
{
    fake_enter("cuMemFreeHost", 1);
    return give_back(at, 1);
}

/* -- copies ------------------------------------------------------------------------------------------------------- */

/* With memory of the host that is not pinned, the driver copies before it returns. */
static CUresult copy(void *to, const void *from, size_t n_bytes, const void *host, CUstream stream)
{
    const operation operation = {.kind = COPY, .to = to, .from = from, .n_bytes = n_bytes};
    CUresult result = fake_enqueue(stream, &operation);
    if (!result && host && !fake_is_pinned(host, n_bytes)) result = fake_flush(stream);
    return result;
}

CUresult fake_cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t n_bytes, CUstream stream)
{
    CUresult result = fake_enter("cuMemcpyHtoDAsync", 1);
    void *device = (void *)(uintptr_t)to;
    if (result) return result;
    if (!fake_is_device(device, n_bytes)) return fake_misuse("%zu bytes are copied outside the GPU's memory", n_bytes);
    fake_log("h2d %zu%s%s", n_bytes, fake_is_pinned(from, n_bytes) ? "" : " unpinned", fake_stream_name(stream));
    return copy(device, from, n_bytes, from, stream);
}

CUresult fake_cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t n_bytes, CUstream stream)
{
    CUresult result = fake_enter("cuMemcpyDtoHAsync", 1);
    const void *device = (const void *)(uintptr_t)from;
    if (result) return result;
    if (!fake_is_device(device, n_bytes)) return fake_misuse("%zu bytes are copied outside the GPU's memory", n_bytes);
    fake_log("d2h %zu%s%s", n_bytes, fake_is_pinned(to, n_bytes) ? "" : " unpinned", fake_stream_name(stream));
    return copy(to, device, n_bytes, to, stream);
}

CUresult fake_cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t n_bytes, CUstream stream)
{
    CUresult result = fake_enter("cuMemcpyDtoDAsync", 1);
    void *target = (void *)(uintptr_t)to;
    const void *source = (const void *)(uintptr_t)from;
    if (result) return result;
    if (!fake_is_device(target, n_bytes) || !fake_is_device(source, n_bytes))
        return fake_misuse("%zu bytes are copied outside the GPU's memory", n_bytes);
    fake_log("d2d %zu%s", n_bytes, fake_stream_name(stream));
    return copy(target, source, n_bytes, NULL, stream);
}

CUresult fake_cuMemsetD8Async(CUdeviceptr at, unsigned char value, size_t n_bytes, CUstream stream)
{
    CUresult result = fake_enter("cuMemsetD8Async", 1);
    const operation operation = {.kind = FILL, .to = (void *)(uintptr_t)at, .n_bytes = n_bytes, .value = value};
    if (result) return result;
    if (!fake_is_device(operation.to, n_bytes)) return fake_misuse("%zu bytes are filled outside", n_bytes);
    fake_log("fill %zu", n_bytes);
    return fake_enqueue(stream, &operation);
}
