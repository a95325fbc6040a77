/* cuda_memory.c - what a model needs of a GPU's memory, and the way of the weights from the file to there.
 *
 * Pieces are taken for weights, KV cache, states if there are any, and one for all else on the GPU; and one of the host
 * that the driver has pinned so that copies run by themselves. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "cuda_graph.h"
#include "cuda_memory.h"

enum {
    SPARE_BYTES = 64 << 20,  /* left free: what the driver takes as it goes */
    NODE_BYTES = 8 << 10,    /* and that for each launch in a graph: an estimate, see cuda_shrink_cache */
    BOUNCE_BYTES = 32 << 20, /* of each of the two buffers that weights pass through */
};

/* -- room --------------------------------------------------------------------------------------------------------- */

typedef struct needs {
    uint64_t weights, page, slot, activations, spare, n_free;
    uint64_t kv_tokens;
    uint32_t n_slots;
    int is_asked;        /* that many tokens, and not as many as fit */
    int slots_are_asked; /* so many slots, likewise */
} needs;

static uint64_t pages_of(const llmc_model *model, uint64_t n_tokens)
{
    uint64_t page_tokens = model->plans.header.page_tokens;
    return n_tokens / page_tokens + (n_tokens % page_tokens != 0);
}

static uint64_t fixed_bytes(const needs *needs)
{
    return needs->weights + needs->activations + needs->spare;
}

/* Pages that there is room for beside all else; 0 also where the rest has none. */
static uint64_t pages_that_fit(const needs *needs)
{
    const uint64_t fixed = fixed_bytes(needs), left = needs->n_free > fixed ? needs->n_free - fixed : 0;
    if (needs->n_free < fixed || (needs->slot && needs->n_slots > left / needs->slot)) return 0;
    return needs->page ? (left - needs->n_slots * needs->slot) / needs->page : UINT64_MAX;
}

/* As many slots as there is room for beside tokens that were asked for, or in half of what is left; but one at least. */
static void settle_slots(needs *needs, uint64_t n_pages)
{
    const uint64_t fixed = fixed_bytes(needs), left = needs->n_free > fixed ? needs->n_free - fixed : 0;
    const int is_full = needs->page && n_pages > left / needs->page;
    const uint64_t room = !needs->is_asked ? left / 2 : is_full ? 0 : left - n_pages * needs->page;
    const uint64_t most = room / needs->slot;
    if (needs->n_slots > most) needs->n_slots = most ? (uint32_t)most : 1;
}

/* Where pages fit, but not all that were asked for; or none. */
static llmc_status no_room(const llmc_model *model, const needs *needs, uint64_t n_pages, int some_fit)
{
    const double gb = 1e9, cache = (double)n_pages * (double)needs->page;
    const double states = (double)needs->n_slots * (double)needs->slot, fixed = (double)fixed_bytes(needs);
    const int fewer_fit = needs->n_slots > 1 && (double)needs->n_free >= fixed + (double)needs->slot + (double)needs->page;
    char of_states[64] = "";
    if (needs->slot)
        snprintf(of_states, sizeof of_states, "states of %u sequences %.2f, ", needs->n_slots, states / gb);
    return fail(LLMC_ERROR_MEMORY, model->file.path,
                some_fit                   ? "ask for room for fewer tokens (kv_tokens)"
                : needs->slot && fewer_fit ? "ask for fewer slots"
                                           : "free memory on the GPU, or take a larger one",
                "the model needs %.2f GB on %s (weights %.2f, KV cache of %llu tokens %.2f, %sactivations %.2f), and "
                "%.2f GB are free",
                (fixed + cache + states) / gb, model->cuda->name, (double)needs->weights / gb,
                (unsigned long long)needs->kv_tokens, cache / gb, of_states, (double)needs->activations / gb,
                (double)needs->n_free / gb);
}

/* Settle for less than the defaults when memory is short: for fewer slots, then for fewer tokens, but for one page at
 * least. */
static llmc_status check_room(const llmc_model *model, needs *needs)
{
    uint64_t n_pages = pages_of(model, needs->kv_tokens), most = pages_that_fit(needs);
    if (n_pages > most && needs->slot && !needs->slots_are_asked) {
        settle_slots(needs, n_pages);
        most = pages_that_fit(needs);
    }
    if (n_pages <= most) return LLMC_OK;
    if (needs->is_asked || !most) return no_room(model, needs, n_pages, most != 0);
    needs->kv_tokens = most * model->plans.header.page_tokens;
    return LLMC_OK;
}

/* -- taking it ---------------------------------------------------------------------------------------------------- */

static llmc_status take(const llmc_model *model, CUdeviceptr *at, uint64_t n_bytes, const char *doing)
{
    const cuda *cuda = model->cuda;
    if (!n_bytes) n_bytes = LLMC_ALIGNMENT;
    CUresult result = cuda->driver.cuMemAlloc(at, n_bytes);
    if (result) *at = 0;
    return result ? cuda_failed(model, result, doing) : LLMC_OK;
}

static char *address(CUdeviceptr at)
{
    return (char *)(uintptr_t)at;
}

/* The parts of a step's input lie in this order on the host and on the GPU, so that one copy brings them all, or all but
 * the tokens; the page table is last, as a small body needs little of it. */
enum { N_INPUT = 6, N_HOST = N_INPUT + 3, N_GPU = N_INPUT + 6 };

static uint64_t larger(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

/* Rows that a head or a sampler may choose tokens for. */
static uint64_t most_chosen(const plans *plans)
{
    return larger(plans->max_head_rows, plans->max_sampler_rows);
}

static void measure_input(llmc_model *model, memory_part parts[N_INPUT])
{
    const uint64_t m = model->plans.max_body_rows, r = model->plans.max_head_rows;
    const uint64_t n_columns = model->plans.header.pages_per_sequence;
    parts[0] = (memory_part){larger(m, most_chosen(&model->plans)) * sizeof *model->tokens, &model->tokens};
    parts[1] = (memory_part){r * sizeof *model->rows, &model->rows};
    parts[2] = (memory_part){m * sizeof *model->positions, &model->positions};
    parts[3] = (memory_part){model->plans.states.slot_bytes ? m * sizeof *model->slots : 0, &model->slots};
    parts[4] = (memory_part){model->plans.n_adapters ? m * sizeof *model->adapters : 0, &model->adapters};
    parts[5] = (memory_part){m * n_columns * sizeof *model->page_table, &model->page_table};
}

static uint64_t measure_gpu(llmc_model *model, memory_part parts[N_GPU])
{
    const llmc_plan_header *h = &model->plans.header;
    const uint64_t r = model->plans.max_head_rows, s = model->plans.max_sampler_rows, n = most_chosen(&model->plans);
    char **base = model->spaces.base;
    measure_input(model, parts);
    model->cuda->input_bytes = memory_measure(parts, N_INPUT);
    parts[0].at = &base[LLMC_SPACE_TOKENS];
    parts[1].at = &base[LLMC_SPACE_ROWS];
    parts[2].at = &base[LLMC_SPACE_POSITIONS];
    parts[3].at = &base[LLMC_SPACE_SLOTS];
    parts[4].at = &base[LLMC_SPACE_ADAPTERS];
    parts[5].at = &base[LLMC_SPACE_PAGE_TABLE];
    parts[6] = (memory_part){model->cuda->input_bytes, &base[LLMC_SPACE_NEXT]}; /* of turn 1: it begins with tokens */
    parts[7] = (memory_part){h->arena_bytes, &base[LLMC_SPACE_ARENA]};
    parts[8] = (memory_part){h->scratch_bytes, &base[LLMC_SPACE_SCRATCH]};
    parts[9] = (memory_part){r * h->n_vocab * sizeof(float), &base[LLMC_SPACE_LOGITS]};
    parts[10] = (memory_part){n * sizeof(int32_t), &base[LLMC_SPACE_CHOSEN]};
    parts[11] = (memory_part){s * sizeof(llmc_draw_record), &base[LLMC_SPACE_DRAWS]};
    return memory_measure(parts, N_GPU);
}

/* What lies somewhere else in turn 1: the input, and where tokens are written for the other turn and the host. */
static void set_shift(cuda *cuda)
{
    const int64_t n_bytes = (int64_t)cuda->input_bytes;
    cuda->shift[LLMC_SPACE_TOKENS] = cuda->shift[LLMC_SPACE_ROWS] = n_bytes;
    cuda->shift[LLMC_SPACE_POSITIONS] = cuda->shift[LLMC_SPACE_SLOTS] = cuda->shift[LLMC_SPACE_PAGE_TABLE] = n_bytes;
    cuda->shift[LLMC_SPACE_ADAPTERS] = n_bytes;
    cuda->shift[LLMC_SPACE_NEXT] = -n_bytes;
    cuda->shift[LLMC_SPACE_TOLD] = (int64_t)(cuda->told_rows * sizeof *cuda->told);
}

/* Pinned memory of the host: what the GPU copies, and what its kernels write. */
static llmc_status take_pinned(llmc_model *model)
{
    cuda *cuda = model->cuda;
    const uint64_t s = model->plans.max_sampler_rows;
    const uint64_t line = LLMC_ALIGNMENT / sizeof *cuda->told;
    memory_part parts[N_HOST];
    cuda->told_rows = (uint32_t)((most_chosen(&model->plans) + line - 1) / line * line);
    measure_input(model, parts);
    parts[6] = (memory_part){s * sizeof *model->drawn, &model->drawn};
    parts[7] = (memory_part){s * sizeof *model->draws, &model->draws};
    parts[8] = (memory_part){2ull * cuda->told_rows * sizeof *cuda->told, &cuda->told};
    const uint64_t n_bytes = memory_measure(parts, N_HOST);
    void *pinned = NULL;
    CUdeviceptr mapped = 0;
    CUresult result = cuda->driver.cuMemHostAlloc(&pinned, n_bytes, CU_MEMHOSTALLOC_DEVICEMAP);
    if (result) return cuda_failed(model, result, "taking pinned memory of the host");
    cuda->pinned = pinned;
    memset(pinned, 0, n_bytes);
    memory_cut(cuda->pinned, parts, N_HOST);
    if (!model->plans.states.slot_bytes) model->slots = NULL;
    if (!model->plans.n_adapters) model->adapters = NULL;
    result = cuda->driver.cuMemHostGetDevicePointer(&mapped, pinned, 0);
    if (result) return cuda_failed(model, result, "mapping pinned memory of the host");
    model->spaces.base[LLMC_SPACE_TOLD] = address(mapped) + ((char *)cuda->told - cuda->pinned);
    return LLMC_OK;
}

static llmc_status take_ordinary(llmc_model *model)
{
    const uint64_t r = model->plans.max_head_rows;
    memory_part ordinary[] = {
        {r * sizeof *model->chosen, &model->chosen},
        {r * sizeof *model->owners, &model->owners},
        {r * sizeof *model->sources, &model->sources},
        {model->plans.max_body_rows * sizeof *model->turn, &model->turn},
        {model->states.page_bytes ? model->plans.max_body_rows * sizeof *model->turn_states : 0, &model->turn_states},
        {model->plans.header.n_vocab * sizeof *model->candidates, &model->candidates},
        {model->plans.header.n_vocab * sizeof *model->adjusted, &model->adjusted},
        {model->plans.header.n_vocab * sizeof *model->counts, &model->counts},
    };
    enum { N_ORDINARY = sizeof ordinary / sizeof *ordinary };
    model->memory_bytes = memory_measure(ordinary, N_ORDINARY);
    model->memory = memory_map(model->memory_bytes);
    if (!model->memory)
        return fail(LLMC_ERROR_MEMORY, model->file.path, NULL, "there is no memory for %llu rows of logits",
                    (unsigned long long)r);
    memory_cut(model->memory, ordinary, N_ORDINARY);
    return LLMC_OK;
}

/* -- a step's input ----------------------------------------------------------------------------------------------- */

const int32_t *cuda_told(const cuda *cuda, uint32_t turn)
{
    return cuda->told + (uint64_t)turn * cuda->told_rows;
}

CUresult cuda_copy_input(const llmc_model *model, uint32_t turn, const void *from, const void *end, CUstream stream)
{
    const cuda *cuda = model->cuda;
    const char *first = from;
    const char *to = cuda->input + turn * cuda->input_bytes + (first - (const char *)model->tokens);
    return cuda->driver.cuMemcpyHtoDAsync((uintptr_t)to, first, (size_t)((const char *)end - first), stream);
}

const int32_t *cuda_page_table_end(const llmc_model *model, const plan *body)
{
    return model->page_table + (uint64_t)body->n_rows * model->plans.header.pages_per_sequence;
}

/* -- the weights -------------------------------------------------------------------------------------------------- */

typedef struct bounce {
    void *bytes[2]; /* [BOUNCE_BYTES] pinned */
    CUevent copied[2];
} bounce;

/* What this program reads of them. While the GPU fetches one buffer, the other is filled from the file. */
static llmc_status copy_weights(llmc_model *model, const llmc_options *options, const bounce *bounce)
{
    cuda *cuda = model->cuda;
    const cuda_driver *driver = &cuda->driver;
    const uint8_t *section = model->file.program.weights.bytes;
    const uint64_t n_bytes = model->plans.weight_bytes;
    CUresult result = CUDA_SUCCESS;
    for (uint64_t done = 0, turn = 0; done < n_bytes && !result; turn ^= 1) {
        uint64_t left = n_bytes - done, n = left < BOUNCE_BYTES ? left : BOUNCE_BYTES;
        if (options->progress && options->progress(options->context, done, n_bytes))
            return fail(LLMC_ERROR_ARGUMENT, model->file.path, NULL, "opening the model was stopped");
        result = driver->cuEventSynchronize(bounce->copied[turn]); /* one never recorded is done */
        if (result) break;
        weights_copy(&model->plans, section, done, n, bounce->bytes[turn]);
        result = driver->cuMemcpyHtoDAsync(cuda->weights + done, bounce->bytes[turn], n, cuda->stream);
        if (!result) result = driver->cuEventRecord(bounce->copied[turn], cuda->stream);
        done += n;
    }
    if (!result) result = driver->cuStreamSynchronize(cuda->stream);
    if (result) return cuda_failed(model, result, "copying the weights");
    if (options->progress) options->progress(options->context, n_bytes, n_bytes);
    return LLMC_OK;
}

static llmc_status upload(llmc_model *model, const llmc_options *options)
{
    cuda *cuda = model->cuda;
    const cuda_driver *driver = &cuda->driver;
    const range *weights = &model->file.program.weights;
    bounce bounce = {{NULL, NULL}, {NULL, NULL}};
    CUresult result = CUDA_SUCCESS;
    madvise((void *)(uintptr_t)weights->bytes, weights->n_bytes, MADV_SEQUENTIAL);
    for (int i = 0; i < 2 && !result; i++) {
        result = driver->cuMemAllocHost(&bounce.bytes[i], BOUNCE_BYTES);
        if (result) bounce.bytes[i] = NULL;
        if (!result) result = driver->cuEventCreate(&bounce.copied[i], CU_EVENT_DISABLE_TIMING);
    }
    llmc_status status = result ? cuda_failed(model, result, "taking pinned memory to copy the weights with")
                                : copy_weights(model, options, &bounce);
    if (status) driver->cuStreamSynchronize(cuda->stream); /* the GPU may still be reading */
    for (int i = 0; i < 2; i++) {
        if (bounce.copied[i]) driver->cuEventDestroy(bounce.copied[i]);
        if (bounce.bytes[i]) driver->cuMemFreeHost(bounce.bytes[i]);
    }
    return status;
}

/* -- the cache ---------------------------------------------------------------------------------------------------- */

/* For n_tokens. Nothing may depend on what was there before. */
static llmc_status take_cache(llmc_model *model, uint64_t n_tokens)
{
    cuda *cuda = model->cuda;
    llmc_status status = kv_open(&model->kv, &model->plans.header, n_tokens, model->file.path);
    const uint64_t n_bytes = model->kv.n_pages * model->kv.page_bytes;
    if (!status) status = take(model, &cuda->kv, n_bytes, "taking memory for the KV cache");
    if (status) return status;
    model->spaces.base[LLMC_SPACE_KV] = model->kv.pages = address(cuda->kv);
    CUresult result = n_bytes ? cuda->driver.cuMemsetD8Async(cuda->kv, 0, n_bytes, cuda->stream) : CUDA_SUCCESS;
    return result ? cuda_failed(model, result, "clearing the KV cache") : LLMC_OK;
}

int cuda_shrink_cache(llmc_model *model, const llmc_options *options, uint64_t n_bytes)
{
    cuda *cuda = model->cuda;
    const kv_cache kv = model->kv;
    if (options->kv_tokens || !kv.page_bytes || kv.n_pages < 2) return 0;
    uint64_t less = n_bytes / kv.page_bytes + 1;
    if (less >= kv.n_pages) less = kv.n_pages - 1;
    CUresult result = cuda->driver.cuStreamSynchronize(cuda->stream); /* it may still be clearing it */
    if (!result) result = cuda->driver.cuMemFree(cuda->kv);
    if (result) return 0;
    cuda->kv = 0;
    kv_close(&model->kv);
    return !take_cache(model, (kv.n_pages - less) * kv.page_tokens);
}

/* Slots for the states of n sequences; nothing, where there are none. */
static llmc_status take_states(llmc_model *model, uint32_t n)
{
    cuda *cuda = model->cuda;
    kv_cache *states = &model->states;
    llmc_status status = states_open(states, &model->plans.states, n, model->file.path);
    if (status || !states->page_bytes) return status;
    const uint64_t n_bytes = states->n_pages * states->page_bytes;
    status = take(model, &cuda->states, n_bytes, "taking memory for states");
    if (status) return status;
    model->spaces.base[LLMC_SPACE_STATES] = states->pages = address(cuda->states);
    CUresult result = cuda->driver.cuMemsetD8Async(cuda->states, 0, n_bytes, cuda->stream);
    return result ? cuda_failed(model, result, "clearing states") : LLMC_OK;
}

/* -- all of it ---------------------------------------------------------------------------------------------------- */

llmc_status cuda_take_memory(llmc_model *model, const llmc_options *options)
{
    cuda *cuda = model->cuda;
    const llmc_plan_header *h = &model->plans.header;
    const uint64_t largest = 1ull << 46; /* no product of these overflows */
    memory_part parts[N_GPU];
    size_t n_free = 0, n_bytes = 0;
    CUresult result = cuda->driver.cuMemGetInfo(&n_free, &n_bytes);
    if (result) return cuda_failed(model, result, "asking for free memory");
    if (h->arena_bytes > largest || h->scratch_bytes > largest)
        return fail(LLMC_ERROR_MEMORY, model->file.path, NULL, "there is no memory for activations: %llu bytes",
                    (unsigned long long)h->arena_bytes);
    uint64_t default_tokens = h->default_kv_tokens ? h->default_kv_tokens : h->n_context;
    needs needs = {
        .weights = model->plans.weight_bytes,
        .page = h->kv_page_bytes,
        .slot = model->plans.states.slot_bytes,
        .activations = measure_gpu(model, parts),
        .spare = SPARE_BYTES + cuda_count_nodes(model) * NODE_BYTES,
        .n_free = n_free,
        .kv_tokens = options->kv_tokens ? options->kv_tokens : default_tokens,
        .n_slots = options->n_slots ? options->n_slots : model->plans.states.default_slots,
        .is_asked = options->kv_tokens != 0,
        .slots_are_asked = options->n_slots != 0,
    };
    llmc_status status = check_room(model, &needs);
    if (!status) status = take(model, &cuda->weights, needs.weights, "taking memory for the weights");
    if (!status) status = take_cache(model, needs.kv_tokens);
    if (!status) status = take_states(model, needs.n_slots);
    if (!status) status = take(model, &cuda->memory, needs.activations, "taking memory for activations");
    if (!status) status = take_pinned(model);
    if (!status) status = take_ordinary(model);
    if (status) return status;
    memory_cut(address(cuda->memory), parts, N_GPU);
    weights_pack(&model->plans);
    model->spaces.base[LLMC_SPACE_WEIGHTS] = address(cuda->weights);
    cuda->input = address(cuda->memory);
    set_shift(cuda);
    /* Counters must be zero; the rest is so that nothing depends on what was there before. */
    result = cuda->driver.cuMemsetD8Async(cuda->memory, 0, needs.activations, cuda->stream);
    if (result) return cuda_failed(model, result, "clearing memory");
    return upload(model, options);
}
