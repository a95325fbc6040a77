/* saved.c - what the file of a sequence has, and whose it is.
 *
 * Keys, values and states are bytes that one program's kernels wrote for themselves: what they mean depends on the
 * weights, on the plan (how a page is laid out, in which dtype) and on the code of the kernels. So a file says by hashes
 * which these were, and no other program reads it. */
#include <string.h>

#include "runtime.h"

static const char NAME_ANOTHER[] = "name another file, or delete this one";

static const uint8_t *kernels_sha256(const artifact *file, uint32_t device)
{
    return device == LLMC_DEVICE_CPU ? file->code.sha256 : file->program.cuda.sha256;
}

void saved_begin(const llmc_model *model, llmc_saved_header *header)
{
    const llmc_plan_header *h = &model->plans.header;
    *header = (llmc_saved_header){
        .version = LLMC_SAVED_VERSION,
        .device = h->device,
        .cuda_arch = h->cuda_arch,
        .cpu_features = h->cpu_features,
    };
    memcpy(header->magic, LLMC_SAVED_MAGIC, sizeof header->magic);
    memcpy(header->weights_sha256, model->file.program.weights.sha256, sizeof header->weights_sha256);
    memcpy(header->plan_sha256, model->file.program.plan.sha256, sizeof header->plan_sha256);
    memcpy(header->kernels_sha256, kernels_sha256(&model->file, h->device), sizeof header->kernels_sha256);
}

static llmc_status check_target(const llmc_saved_header *header, const llmc_saved_header *ours, const char *path)
{
    char theirs_name[48], our_name[48];
    if (header->device == ours->device && header->cuda_arch == ours->cuda_arch &&
        header->cpu_features == ours->cpu_features)
        return LLMC_OK;
    program_target(header->device, header->cuda_arch, header->cpu_features, theirs_name, sizeof theirs_name);
    program_target(ours->device, ours->cuda_arch, ours->cpu_features, our_name, sizeof our_name);
    return fail(LLMC_ERROR_FORMAT, path, NAME_ANOTHER,
                "this sequence was saved by the program for %s, and the one that runs is for %s%s", theirs_name, our_name,
                strcmp(theirs_name, our_name) == 0 ? " with other instructions" : "");
}

llmc_status saved_check(const llmc_model *model, const llmc_saved_header *header, const char *path)
{
    llmc_saved_header ours;
    saved_begin(model, &ours);
    if (memcmp(header->magic, ours.magic, sizeof ours.magic) != 0)
        return fail(LLMC_ERROR_FORMAT, path, "name a file that a sequence was saved in, or one that is not there yet",
                    "this is not a saved sequence");
    if (header->version == __builtin_bswap32(ours.version))
        return fail(LLMC_ERROR_FORMAT, path, NAME_ANOTHER,
                    "this sequence was saved by a machine of another byte order");
    if (header->version != ours.version || header->reserved)
        return fail(LLMC_ERROR_FORMAT, path, NAME_ANOTHER,
                    "this sequence was saved in version %u; this artifact reads version %u", header->version,
                    ours.version);
    if (memcmp(header->weights_sha256, ours.weights_sha256, sizeof ours.weights_sha256) != 0)
        return fail(LLMC_ERROR_FORMAT, path, NAME_ANOTHER,
                    "this sequence is another model's: it was saved by one with other weights");
    llmc_status status = check_target(header, &ours, path);
    if (status) return status;
    if (memcmp(header->plan_sha256, ours.plan_sha256, sizeof ours.plan_sha256) != 0)
        return fail(LLMC_ERROR_FORMAT, path, NAME_ANOTHER,
                    "this sequence was saved by this model as it was compiled with other options: its plan is another");
    if (memcmp(header->kernels_sha256, ours.kernels_sha256, sizeof ours.kernels_sha256) != 0)
        return fail(LLMC_ERROR_FORMAT, path, NAME_ANOTHER,
                    "this sequence was saved by this model as it was compiled by another llmc: its kernels are others");
    return LLMC_OK;
}

llmc_status saved_is_possible(const llmc_model *model)
{
    if (!model->plans.is_whole) return LLMC_OK;
    return fail(LLMC_ERROR_ARGUMENT, model->file.path, NULL,
                "the model reads texts whole, and keeps nothing of them to save");
}

llmc_status saved_walk(const llmc_sequence *sequence, saved_move *move, void *context)
{
    const llmc_model *model = sequence->model;
    const kv_cache *kv = &model->kv, *states = &model->states;
    llmc_status status = move(context, sequence->tokens, NULL, sequence->length * sizeof *sequence->tokens);
    if (!status && sequence->has_logits)
        status = move(context, sequence->logits, NULL, model->plans.header.n_vocab * sizeof *sequence->logits);
    if (!status && sequence->state >= 0)
        status = move(context, NULL, states->pages + (uint64_t)sequence->state * states->page_bytes, states->page_bytes);
    for (uint32_t i = 0; i < sequence->n_pages && kv->page_bytes && !status; i++)
        status = move(context, NULL, kv->pages + (uint64_t)sequence->pages[i] * kv->page_bytes, kv->page_bytes);
    return status;
}
