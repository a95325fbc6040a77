/* cuda.c - a GPU as what runs plans: open, close, and a step.
 *
 *   cuda_driver   the driver's functions, and the words for its errors
 *   cuda_context  which GPU, and its context
 *   cuda_memory   what the model needs and what is free; weights from the file to the GPU; where a step's input lies
 *   cuda_graph    a plan's launches, captured once as a graph; or one by one, to find or to time a kernel
 *   cuda_ahead    a step that is given to the GPU while the one before it runs
 *
 * A step writes its input to pinned memory; one copy and the graph of a body and a head go to one stream, and the host
 * waits once: the tokens chosen are in its memory then. Logits stay where the head wrote them until somebody asks for
 * them, or another head would write there. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cuda_ahead.h"
#include "cuda_context.h"
#include "cuda_graph.h"
#include "cuda_memory.h"

const char *cuda_name(const llmc_model *model)
{
    return model->cuda->name;
}

static CUdeviceptr space(const llmc_model *model, int space)
{
    return (uintptr_t)model->spaces.base[space];
}

/* -- open and close ----------------------------------------------------------------------------------------------- */

/* What graphs take of the GPU's memory the driver says only by refusing: then the cache gives way, by more each time. */
static llmc_status bind_and_capture(llmc_model *model, const llmc_options *options)
{
    llmc_status status;
    uint64_t n_bytes = 64 << 20;
    do {
        plans_bind(&model->plans, &model->spaces, 1);
        status = model->cuda->is_one_by_one ? LLMC_OK : cuda_capture(model);
        if (status) cuda_drop_graphs(model);
        n_bytes *= 2;
    } while (status == LLMC_ERROR_MEMORY && cuda_shrink_cache(model, options, n_bytes / 2));
    return status;
}

static llmc_status open_in_context(llmc_model *model, const llmc_options *options)
{
    cuda *cuda = model->cuda;
    CUresult result = cuda->driver.cuStreamCreate(&cuda->stream, CU_STREAM_NON_BLOCKING);
    if (!result) result = cuda->driver.cuStreamCreate(&cuda->beside, CU_STREAM_NON_BLOCKING);
    if (!result) result = cuda->driver.cuEventCreate(&cuda->known, CU_EVENT_DISABLE_TIMING);
    if (result) return cuda_failed(model, result, "making a stream");
    llmc_status status = cuda_load_kernels(model);
    if (!status) status = cuda_take_memory(model, options);
    return status ? status : bind_and_capture(model, options);
}

static llmc_status cuda_open(llmc_model *model, const llmc_options *options)
{
    const char *sync = getenv("LLMC_CUDA_SYNC");
    cuda *cuda = model->cuda = calloc(1, sizeof *cuda);
    if (!cuda) return fail(LLMC_ERROR_MEMORY, model->file.path, NULL, "there is no memory for a model");
    cuda->process = getpid();
    cuda->is_one_by_one = sync && strcmp(sync, "0") != 0 && *sync;
    llmc_status status = cuda_load_driver(&cuda->driver, model->file.path);
    if (!status) status = cuda_take_device(model, options);
    if (!status) status = cuda_enter(model);
    if (status) return status;
    status = open_in_context(model, options);
    cuda_leave(model);
    return status;
}

/* Everything that was taken, in the opposite order; a lost GPU refuses, which does not matter any more. */
static void give_back(llmc_model *model)
{
    cuda *cuda = model->cuda;
    const cuda_driver *driver = &cuda->driver;
    if (cuda->beside) driver->cuStreamSynchronize(cuda->beside);
    if (cuda->stream) driver->cuStreamSynchronize(cuda->stream);
    for (uint32_t i = 0; i < cuda->n_events; i++) driver->cuEventDestroy(cuda->events[i]);
    if (cuda->known) driver->cuEventDestroy(cuda->known);
    cuda_drop_graphs(model);
    if (cuda->pinned) driver->cuMemFreeHost(cuda->pinned);
    if (cuda->memory) driver->cuMemFree(cuda->memory);
    if (cuda->states) driver->cuMemFree(cuda->states);
    if (cuda->kv) driver->cuMemFree(cuda->kv);
    if (cuda->weights) driver->cuMemFree(cuda->weights);
    for (uint32_t i = 0; i < cuda->n_modules; i++) driver->cuModuleUnload(cuda->modules[i]);
    if (cuda->beside) driver->cuStreamDestroy(cuda->beside);
    if (cuda->stream) driver->cuStreamDestroy(cuda->stream);
}

static void cuda_close(llmc_model *model)
{
    cuda *cuda = model->cuda;
    if (!cuda) return;
    if (cuda->context && cuda->process == getpid()) { /* a forked child has nothing of the GPU to give back */
        CUcontext before;
        int is_current = cuda->driver.cuCtxPushCurrent(cuda->context) == CUDA_SUCCESS;
        give_back(model);
        if (is_current) cuda->driver.cuCtxPopCurrent(&before);
        cuda->driver.cuDevicePrimaryCtxRelease(cuda->device);
    }
    free(cuda->events);
    free(cuda->graphs);
    free(cuda->pairs);
    free(cuda->functions);
    free(cuda->modules);
    free(cuda);
    model->cuda = NULL;
}

/* -- a step ------------------------------------------------------------------------------------------------------- */

/* Where the input ends that a head alone reads: rows, and positions where it finds a text's beginning by them. */
static const int32_t *rows_end(const llmc_model *model)
{
    const plans *plans = &model->plans;
    return plans->is_whole ? model->positions + plans->max_body_rows : model->rows + plans->max_head_rows;
}

/* The rows alone when the body has run before. */
static llmc_status start_plans(llmc_model *model, const plan *body, const plan *head)
{
    const int32_t *from = body ? model->tokens : model->rows;
    const int32_t *end = body ? cuda_page_table_end(model, body) : rows_end(model);
    CUresult result = cuda_copy_input(model, cuda_next_turn(model, body, head), from, end, model->cuda->stream);
    return result ? cuda_lose(model, result, "copying a step's input") : cuda_start_pair(model, body, head);
}

static llmc_status cuda_run(llmc_model *model, const plan *body, const plan *head)
{
    llmc_status status = cuda_enter(model);
    if (status) return status;
    model->cuda->is_running = 1;
    status = start_plans(model, body, head);
    cuda_leave(model);
    return status;
}

static llmc_status cuda_finish(llmc_model *model)
{
    cuda *cuda = model->cuda;
    if (!cuda->is_running && !model->n_ahead) return LLMC_OK;
    llmc_status status = cuda_enter(model);
    if (status) return status;
    CUresult result = cuda->driver.cuStreamSynchronize(cuda->stream);
    if (result) status = cuda_lose(model, result, "");
    else {
        memcpy(model->chosen, cuda_told(cuda, cuda->turn), cuda->n_told * sizeof *model->chosen);
        model->n_ahead = cuda->n_told = 0;
    }
    cuda->is_running = 0;
    cuda_leave(model);
    return status;
}

/* -- logits, pages and states ------------------------------------------------------------------------------------- */

/* Wait for a copy: the host's memory is the caller's again. */
static llmc_status end_copy(llmc_model *model, CUresult result, const char *doing)
{
    const cuda *cuda = model->cuda;
    if (!result) result = cuda->driver.cuStreamSynchronize(cuda->stream);
    llmc_status status = result ? cuda_lose(model, result, doing) : LLMC_OK;
    cuda_leave(model);
    return status;
}

static CUdeviceptr row_of_logits(const llmc_model *model, uint32_t row)
{
    return space(model, LLMC_SPACE_LOGITS) + (uint64_t)row * model->plans.header.n_vocab * sizeof(float);
}

static llmc_status cuda_read_logits(llmc_model *model, uint32_t row, float *out)
{
    cuda *cuda = model->cuda;
    size_t n_bytes = model->plans.header.n_vocab * sizeof *out;
    llmc_status status = cuda_enter(model);
    if (status) return status;
    cuda->is_running = 1;
    CUresult result = cuda->driver.cuMemcpyDtoHAsync(out, row_of_logits(model, row), n_bytes, cuda->stream);
    if (result) status = cuda_lose(model, result, "copying logits to the host");
    cuda_leave(model);
    return status;
}

static llmc_status cuda_write_logits(llmc_model *model, uint32_t row, const float *logits)
{
    cuda *cuda = model->cuda;
    size_t n_bytes = model->plans.header.n_vocab * sizeof *logits;
    llmc_status status = cuda_enter(model);
    if (status) return status;
    CUresult result = cuda->driver.cuMemcpyHtoDAsync(row_of_logits(model, row), logits, n_bytes, cuda->stream);
    return end_copy(model, result, "copying logits to the GPU");
}

static void copy(llmc_model *model, const kv_cache *kv, int32_t to, int32_t from, const char *doing)
{
    const cuda *cuda = model->cuda;
    CUdeviceptr pages = (uintptr_t)kv->pages;
    if (!kv->page_bytes || cuda_enter(model)) return; /* a lost GPU says so at the next step */
    CUresult result = cuda->driver.cuMemcpyDtoDAsync(pages + (uint64_t)to * kv->page_bytes,
                                                     pages + (uint64_t)from * kv->page_bytes, kv->page_bytes,
                                                     cuda->stream);
    if (result) cuda_lose(model, result, doing);
    cuda_leave(model);
}

static void cuda_copy_page(llmc_model *model, int32_t to, int32_t from)
{
    copy(model, &model->kv, to, from, "copying a page of the KV cache");
}

static void cuda_copy_state(llmc_model *model, int32_t to, int32_t from)
{
    copy(model, &model->states, to, from, "copying the states of a sequence");
}

static CUdeviceptr address(const char *at)
{
    return (uintptr_t)at;
}

static llmc_status cuda_read(llmc_model *model, void *to, const char *from, uint64_t n_bytes)
{
    const cuda *cuda = model->cuda;
    llmc_status status = cuda_enter(model);
    if (status) return status;
    CUresult result = cuda->driver.cuMemcpyDtoHAsync(to, address(from), n_bytes, cuda->stream);
    return end_copy(model, result, "copying a sequence to the host");
}

static llmc_status cuda_write(llmc_model *model, char *to, const void *from, uint64_t n_bytes)
{
    const cuda *cuda = model->cuda;
    llmc_status status = cuda_enter(model);
    if (status) return status;
    CUresult result = cuda->driver.cuMemcpyHtoDAsync(address(to), from, n_bytes, cuda->stream);
    return end_copy(model, result, "copying a sequence to the GPU");
}

/* -- sampling ----------------------------------------------------------------------------------------------------- */

static llmc_status start_sampler(llmc_model *model, const plan *sampler)
{
    cuda *cuda = model->cuda;
    CUresult result = cuda->driver.cuMemcpyHtoDAsync(space(model, LLMC_SPACE_DRAWS), model->draws,
                                                     sampler->n_rows * sizeof *model->draws, cuda->stream);
    return result ? cuda_lose(model, result, "copying the sampler's input") : cuda_start(model, sampler, cuda->turn);
}

static llmc_status start_draws(llmc_model *model, const plan *sampler)
{
    cuda *cuda = model->cuda;
    llmc_status status = start_sampler(model, sampler);
    if (status) return status;
    CUresult result = cuda->driver.cuMemcpyDtoHAsync(model->drawn, space(model, LLMC_SPACE_CHOSEN),
                                                     sampler->n_rows * sizeof *model->drawn, cuda->stream);
    return result ? cuda_lose(model, result, "") : LLMC_OK;
}

static llmc_status cuda_draw(llmc_model *model, const plan *sampler)
{
    llmc_status status = cuda_enter(model);
    if (status) return status;
    model->cuda->is_running = 1;
    status = start_draws(model, sampler);
    cuda_leave(model);
    return status ? status : cuda_finish(model);
}

/* An H200 reads the weights of a 7B in the time that it multiplies them by 190 rows. */
const device cuda_device = {
    .step_rows = 192,
    .open = cuda_open,
    .close = cuda_close,
    .run = cuda_run,
    .finish = cuda_finish,
    .read_logits = cuda_read_logits,
    .copy_page = cuda_copy_page,
    .copy_state = cuda_copy_state,
    .read = cuda_read,
    .write = cuda_write,
    .write_logits = cuda_write_logits,
    .draw = cuda_draw,
    .advance = cuda_advance,
};
