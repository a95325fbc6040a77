/* api.c - opening and closing a model, what it says about itself, and the table that llmc_get_api returns. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runtime.h"

/* -- open and close ----------------------------------------------------------------------------------------------- */

/* The vocabulary is u32 n, u32 offsets[n + 1], bytes. */
static llmc_status check_vocabulary(const artifact *file)
{
    const range *v = &file->vocabulary;
    uint32_t n = 0, offset = 0, before = 0;
    if (!v->bytes) return LLMC_OK;
    int good = v->n_bytes >= 8;
    if (good) memcpy(&n, v->bytes, sizeof n);
    uint64_t n_table = 4 * (n + 2ull);
    good = good && n_table <= v->n_bytes;
    for (uint64_t i = 0; i <= n && good; i++, before = offset) {
        memcpy(&offset, v->bytes + 4 * (i + 1), sizeof offset);
        good = offset >= before && offset <= v->n_bytes - n_table;
    }
    if (good) return LLMC_OK;
    return fail(LLMC_ERROR_FORMAT, file->path, "compile the model again with this llmc",
                "the vocabulary section is not valid: %u tokens in %llu bytes", n, (unsigned long long)v->n_bytes);
}

static llmc_status check_options(const llmc_options *given, llmc_options *options)
{
    *options = (llmc_options){.size = sizeof *options};
    if (given && given->size < sizeof given->size)
        return fail(LLMC_ERROR_ARGUMENT, "open", "set it to sizeof the struct", "llmc_options.size is %u", given->size);
    if (given) memcpy(options, given, given->size < sizeof *options ? given->size : sizeof *options);
    if (options->run_on < LLMC_ON_ANY || options->run_on > LLMC_ON_CUDA)
        return fail(LLMC_ERROR_ARGUMENT, "open", "see LLMC_ON_ANY in llmc.h", "llmc_options.run_on is %d",
                    options->run_on);
    if (options->n_threads >= 0 && options->n_threads <= LLMC_MAX_THREADS) return LLMC_OK;
    return fail(LLMC_ERROR_ARGUMENT, "open", "0 takes as many as this process may use", "%d threads were asked for",
                options->n_threads);
}

static llmc_status open_parts(llmc_model *model, const llmc_options *options)
{
    llmc_status status = artifact_open(&model->file);
    if (!status) status = check_vocabulary(&model->file);
    return status ? status : program_open(model, options);
}

static void model_close(llmc_model *model)
{
    if (!model) return;
    program_close(model);
    artifact_close(&model->file);
    free(model);
}

llmc_status model_open(const char *path, const llmc_options *given, llmc_model **out)
{
    llmc_options options;
    if (!out) return fail(LLMC_ERROR_ARGUMENT, "open", NULL, "the result is NULL");
    *out = NULL;
    llmc_status status = check_options(given, &options);
    if (status) return status;
    llmc_model *model = aligned_alloc(_Alignof(llmc_model), sizeof *model);
    if (!model) return fail(LLMC_ERROR_MEMORY, path, NULL, "there is no memory for a model");
    memset(model, 0, sizeof *model);
    if (!path) status = artifact_find(&model->file);
    else if ((size_t)snprintf(model->file.path, sizeof model->file.path, "%s", path) >= sizeof model->file.path)
        status = fail(LLMC_ERROR_IO, NULL, NULL, "the artifact's path is longer than %zu bytes",
                      sizeof model->file.path);
    if (!status) status = open_parts(model, &options);
    if (status) model_close(model);
    else *out = model;
    return status;
}

static llmc_status open_self(const llmc_options *options, llmc_model **out)
{
    return model_open(NULL, options, out);
}

/* -- facts -------------------------------------------------------------------------------------------------------- */

static llmc_status model_info(const llmc_model *model, llmc_info *out)
{
    if (!model || !out || out->size < sizeof out->size)
        return fail(LLMC_ERROR_ARGUMENT, "info", out ? "set size to sizeof the struct" : NULL, "the %s",
                    !model ? "model is NULL" : !out ? "result is NULL" : "result's size is not set");
    const llmc_plan_header *h = &model->plans.header;
    const llmc_plan_grids *grids = &model->plans.grids;
    const llmc_info info = {
        .size = out->size,
        .n_vocab = (int32_t)h->n_vocab,
        .n_context = (int32_t)h->n_context,
        .n_threads = model->cuda ? 1 : model->engine.pool.n_threads,
        .max_step_tokens = (int32_t)model->plans.max_body_rows,
        .bos_token = h->bos,
        .weight_bytes = model->plans.weight_bytes,
        .kv_bytes_per_token = h->kv_page_bytes / h->page_tokens,
        .kv_tokens = (uint64_t)model->kv.n_pages * h->page_tokens,
        .kv_tokens_free = (uint64_t)kv_free_pages(&model->kv) * h->page_tokens,
        .device = model->cuda ? cuda_name(model) : "CPU",
        .program = (int32_t)model->file.number,
        .page_tokens = (int32_t)h->page_tokens,
        .sampling_bytes = sizeof(llmc_sampling),
        .n_slots = model->states.n_pages,
        .n_slots_free = kv_free_pages(&model->states),
        .slot_bytes = model->states.page_bytes,
        .n_tokens = (int32_t)model->plans.n_tokens,
        .is_whole = model->plans.is_whole,
        .n_types = (int32_t)model->plans.n_types,
        .n_adapters = (int32_t)model->plans.n_adapters,
        .n_row = (int32_t)model->plans.n_row,
        .tile = {(int32_t)model->plans.tile[0], (int32_t)model->plans.tile[1], (int32_t)model->plans.tile[2]},
        .n_tile_rows = model->plans.tower && !grids->patch ? (int32_t)model->plans.tower->n_rows : 0,
        .picture_rows = model->plans.picture_rows,
        .n_rows = model->given.n_rows,
        .patch = grids->patch,
        .merge = grids->merge,
        .most_rows = grids->patch ? model->plans.tower[model->plans.n_towers - 1].n_rows : 0,
    };
    memcpy(out, &info, out->size < sizeof info ? out->size : sizeof info);
    return LLMC_OK;
}

static int is_eos(const llmc_model *model, int32_t token)
{
    for (uint32_t i = 0; model && i < model->plans.header.n_eos; i++)
        if (model->plans.header.eos[i] == token) return 1;
    return 0;
}

static llmc_status token_text(const llmc_model *model, int32_t token, const char **bytes, size_t *n_bytes)
{
    if (!model || !bytes || !n_bytes)
        return fail(LLMC_ERROR_ARGUMENT, "token_text", NULL, "the %s is NULL", model ? "result" : "model");
    const range *v = &model->file.vocabulary;
    uint32_t n, places[2]; /* where the text begins and ends */
    *bytes = "";
    *n_bytes = 0;
    if (!v->bytes)
        return fail(LLMC_ERROR_ARGUMENT, model->file.path, "compile from a folder with a tokenizer",
                    "the artifact has no vocabulary");
    memcpy(&n, v->bytes, sizeof n);
    if (token >= 0 && rows_is_one(model, token)) return LLMC_OK;
    if (token < 0 || ((uint32_t)token >= n && (uint32_t)token >= model->plans.n_tokens))
        return fail(LLMC_ERROR_ARGUMENT, model->file.path, NULL, "token %d is out of range: the vocabulary has %u",
                    token, n);
    if ((uint32_t)token >= n) return LLMC_OK; /* logits are often padded to a round number of columns */
    memcpy(places, v->bytes + 4 * (1ull + (uint32_t)token), sizeof places);
    *bytes = (const char *)v->bytes + 4 * (n + 2ull) + places[0];
    *n_bytes = places[1] - places[0];
    return LLMC_OK;
}

static llmc_status adapter_name(const llmc_model *model, int32_t adapter, const char **out)
{
    if (out) *out = NULL;
    if (!model || !out)
        return fail(LLMC_ERROR_ARGUMENT, "adapter_name", NULL, "the %s is NULL", model ? "result" : "model");
    if (adapter < 0 || adapter >= (int64_t)model->plans.n_adapters)
        return fail(LLMC_ERROR_ARGUMENT, model->file.path, NULL, "there is no adapter %d: the artifact has %u", adapter,
                    model->plans.n_adapters);
    *out = model->plans.adapters[adapter].name;
    return LLMC_OK;
}

/* -- the table ---------------------------------------------------------------------------------------------------- */

static const llmc_api API = {
    .size = sizeof API,
    .version = LLMC_API_VERSION,
    .last_error = error_text,
    .open = open_self,
    .close = model_close,
    .info = model_info,
    .is_eos = is_eos,
    .token_text = token_text,
    .sequence_new = sequence_new,
    .sequence_fork = sequence_fork,
    .sequence_free = sequence_free,
    .sequence_length = sequence_length,
    .sequence_truncate = sequence_truncate,
    .step = step,
    .feed = feed,
    .logits = sequence_logits,
    .sample = sample,
    .profile = profile,
    .sequence_repeat = sequence_repeat,
    .sample_many = sample_many,
    .advance = advance,
    .speculate = speculate,
    .sequence_save = sequence_save,
    .sequence_restore = sequence_restore,
    .sequence_tokens = sequence_tokens,
    .sequence_note = sequence_note,
    .adapter_name = adapter_name,
    .sequence_set_adapter = sequence_set_adapter,
    .sequence_adapter = sequence_adapter,
    .rows_new = rows_new,
    .rows_free = rows_free,
    .rows_numbers = rows_numbers,
    .image_rows = image_rows,
    .picture_rows = picture_rows,
    .rows_in_grid = rows_in_grid,
};

__attribute__((visibility("default"))) const llmc_api *llmc_get_api(uint32_t version)
{
    return version == LLMC_API_VERSION ? &API : NULL;
}
