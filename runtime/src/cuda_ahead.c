/* cuda_ahead.c - a step that is given to the GPU while the one before it runs.
 *
 * In the common case row i goes on from the token chosen for row i, by the last head or by a sampler. The kernel that
 * chose has then written the token where this step embeds it, and to the host's memory. All else of the input is copied
 * by another stream to the half of the input that the running step does not read, and the host waits for that copy: the
 * graph begins with its input there, and between two steps the GPU does nothing else.
 *
 * Of the steps before, only the last may still run: the host has waited until that one had its tokens. So the other half
 * of the input, what the other turn told the host, and the sampler's input are free. */
#include <string.h>

#include "cuda_ahead.h"
#include "cuda_graph.h"
#include "cuda_memory.h"

/* The row of the choices [R] that row i's token is taken from, before the sampler or behind it; -1: it is not. */
static int32_t source_of(const llmc_model *model, uint32_t i, int is_drawn)
{
    int32_t source = model->sources[i];
    return is_drawn ? LLMC_FROM_DRAW - source : source;
}

/* Whether all tokens are, or will be, where a step of this turn embeds them. A sampler writes all that were chosen
 * before it over, so that none may be drawn or all must. */
static int are_in_place(const llmc_model *model, uint32_t turn, int is_drawn, uint32_t n_rows)
{
    if (turn == model->cuda->turn) return 0;
    for (uint32_t i = 0; i < n_rows; i++)
        if (source_of(model, i, is_drawn) != (int32_t)i) return 0;
    return 1;
}

/* All but the tokens, and what the sampler reads: beside the step that runs, unless that one reads the same memory. */
static CUresult send_input(const llmc_model *model, const plan *body, const plan *sampler, uint32_t turn)
{
    const cuda *cuda = model->cuda;
    const int is_beside = turn != cuda->turn;
    CUstream stream = is_beside ? cuda->beside : cuda->stream;
    CUresult result = cuda_copy_input(model, turn, model->rows, cuda_page_table_end(model, body), stream);
    if (!result && sampler)
        result = cuda->driver.cuMemcpyHtoDAsync((uintptr_t)model->spaces.base[LLMC_SPACE_DRAWS], model->draws,
                                                sampler->n_rows * sizeof *model->draws, stream);
    return result || !is_beside ? result : cuda->driver.cuStreamSynchronize(stream);
}

/* -- tokens that are not in place ---------------------------------------------------------------------------------- */

static CUdeviceptr tokens_of(const cuda *cuda, uint32_t turn)
{
    return (uintptr_t)cuda->input + turn * cuda->input_bytes;
}

/* Choices to tokens; neighbours go together, so that sequences that did not change places are one copy. */
static CUresult copy_tokens(const llmc_model *model, uint32_t turn, uint32_t n_rows, int is_drawn)
{
    const cuda *cuda = model->cuda;
    const size_t size = sizeof *model->tokens;
    CUdeviceptr to = tokens_of(cuda, turn), chosen = (uintptr_t)model->spaces.base[LLMC_SPACE_CHOSEN];
    CUresult result = CUDA_SUCCESS;
    for (uint32_t i = 0, n = 1; i < n_rows && !result; i += n, n = 1) {
        int32_t from = source_of(model, i, is_drawn);
        if (from < 0) continue;
        while (i + n < n_rows && source_of(model, i + n, is_drawn) == from + (int32_t)n) n++;
        result = cuda->driver.cuMemcpyDtoDAsync(to + i * size, chosen + (uint32_t)from * size, n * size, cuda->stream);
    }
    return result;
}

/* The host's tokens, then the device's own from where they were chosen; all go to the host. Samplers of this turn write
 * for the other one, whose input nobody needs any more when they run. */
static llmc_status place_tokens(llmc_model *model, const plan *body, const plan *sampler, uint32_t turn,
                                uint32_t n_rows, const char *doing)
{
    const cuda *cuda = model->cuda;
    CUresult result = cuda_copy_input(model, turn, model->tokens, model->tokens + body->n_rows, cuda->stream);
    if (!result) result = copy_tokens(model, turn, n_rows, 0);
    if (result) return cuda_lose(model, result, doing);
    llmc_status status = sampler ? cuda_start(model, sampler, turn) : LLMC_OK;
    if (status) return status;
    if (sampler) result = copy_tokens(model, turn, n_rows, 1);
    if (!result)
        result = cuda->driver.cuMemcpyDtoHAsync(model->tokens, tokens_of(cuda, turn), n_rows * sizeof *model->tokens,
                                                cuda->stream);
    return result ? cuda_lose(model, result, doing) : LLMC_OK;
}

/* -- the step ------------------------------------------------------------------------------------------------------ */

/* What the driver refuses while a step still runs is most likely that step's. */
static llmc_status start_input(llmc_model *model, const plan *body, const plan *sampler, uint32_t turn, uint32_t n_rows,
                               int is_in_place)
{
    cuda *cuda = model->cuda;
    const char *doing = cuda->is_running ? "" : "copying a step's input";
    llmc_status status = LLMC_OK;
    cuda->is_running = 1;
    CUresult result = send_input(model, body, sampler, turn);
    if (result) return cuda_lose(model, result, doing);
    if (!is_in_place) status = place_tokens(model, body, sampler, turn, n_rows, doing);
    else if (sampler) status = cuda_start(model, sampler, cuda->turn);
    if (status) return status;
    result = cuda->driver.cuEventRecord(cuda->known, cuda->stream);
    return result ? cuda_lose(model, result, doing) : LLMC_OK;
}

llmc_status cuda_advance(llmc_model *model, const plan *body, const plan *head, const plan *sampler, uint32_t n_rows)
{
    cuda *cuda = model->cuda;
    const uint32_t before = cuda->turn, turn = cuda_next_turn(model, body, head);
    const int is_in_place = are_in_place(model, turn, sampler != NULL, n_rows);
    llmc_status status = cuda_enter(model);
    if (status) return status;
    status = start_input(model, body, sampler, turn, n_rows, is_in_place);
    if (!status) status = cuda_start_pair(model, body, head);
    if (!status) {
        CUresult result = cuda->driver.cuEventSynchronize(cuda->known);
        if (result) status = cuda_lose(model, result, "");
    }
    if (!status && is_in_place) memcpy(model->tokens, cuda_told(cuda, before), n_rows * sizeof *model->tokens);
    cuda_leave(model);
    return status;
}
