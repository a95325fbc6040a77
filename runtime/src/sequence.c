/* sequence.c - the tokens of one text: the pages that hold its keys and values, the slot that holds its state, and its
 * last logits. A state is that behind the last token: there is no way back from it, but to one that was kept. */
#include <stdlib.h>
#include <string.h>

#include "runtime.h"

static uint32_t pages_for(const llmc_sequence *sequence, uint64_t n_tokens)
{
    uint64_t page_tokens = sequence->model->kv.page_tokens;
    return (uint32_t)((n_tokens + page_tokens - 1) / page_tokens);
}

llmc_status sequence_new(llmc_model *model, llmc_sequence **out)
{
    if (out) *out = NULL;
    if (!model || !out)
        return fail(LLMC_ERROR_ARGUMENT, "sequence_new", NULL, "the %s is NULL", model ? "result" : "model");
    const llmc_plan_header *h = &model->plans.header;
    llmc_sequence *sequence = calloc(1, sizeof *sequence);
    if (sequence) {
        sequence->model = model;
        sequence->state = sequence->adapter = -1;
        sequence->pages = calloc(h->pages_per_sequence, sizeof *sequence->pages);
        sequence->tokens = calloc(h->n_context, sizeof *sequence->tokens);
        sequence->logits = calloc(h->n_vocab, sizeof *sequence->logits);
        if (model->turns) sequence->behind = calloc(h->n_context, sizeof *sequence->behind);
        if (sequence->pages && sequence->tokens && sequence->logits && (sequence->behind || !model->turns)) {
            *out = sequence;
            return LLMC_OK;
        }
    }
    sequence_free(sequence);
    return fail(LLMC_ERROR_MEMORY, "sequence_new", NULL, "there is no memory for a sequence with %u logits",
                h->n_vocab);
}

/* A sequence's logits wander between the device and the host without its user seeing it: so it is const for the user,
 * and the object behind the pointer, which sequence_new made, is not. */
static llmc_status copy_logits(llmc_sequence *copy, llmc_sequence *sequence)
{
    const float *logits; /* [n_vocab] */
    llmc_status status = sequence_logits(sequence, &logits);
    if (status) return status;
    memcpy(copy->logits, logits, sequence->model->plans.header.n_vocab * sizeof *logits);
    copy->choice = sequence->choice;
    copy->has_logits = 1;
    return LLMC_OK;
}

llmc_status sequence_fork(const llmc_sequence *sequence, llmc_sequence **out)
{
    if (out) *out = NULL;
    if (!sequence || !out)
        return fail(LLMC_ERROR_ARGUMENT, "sequence_fork", NULL, "the %s is NULL", sequence ? "result" : "sequence");
    llmc_model *model = sequence->model;
    llmc_sequence *copy;
    llmc_status status = sequence_new(model, &copy);
    if (status) return status;
    /* All pages are shared, the last one until either of the two writes to it: see sequence_reserve. */
    for (uint32_t i = 0; i < sequence->n_pages; i++) kv_share(&model->kv, copy->pages[i] = sequence->pages[i]);
    memcpy(copy->tokens, sequence->tokens, sequence->length * sizeof *copy->tokens);
    if (copy->behind) memcpy(copy->behind, sequence->behind, sequence->length * sizeof *copy->behind);
    copy->n_pages = sequence->n_pages;
    copy->length = sequence->length;
    copy->is_repeated = sequence->is_repeated;
    copy->adapter = sequence->adapter;
    if (sequence->state >= 0) kv_share(&model->states, copy->state = sequence->state);
    status = sequence->has_logits ? copy_logits(copy, (llmc_sequence *)sequence) : LLMC_OK;
    if (status) sequence_free(copy);
    else *out = copy;
    return status;
}

llmc_status sequence_repeat(const llmc_sequence *sequence, int32_t n, llmc_sequence **out)
{
    if (out) *out = NULL;
    if (!sequence || !out)
        return fail(LLMC_ERROR_ARGUMENT, "sequence_repeat", NULL, "the %s is NULL", sequence ? "result" : "sequence");
    llmc_model *model = sequence->model;
    const kv_cache *kv = &model->kv;
    int longer = n > (int64_t)sequence->length;
    uint32_t n_sources = longer ? sequence->length / kv->page_tokens : sequence->n_pages;
    if (n < 0 || (uint32_t)n > model->plans.header.n_context || (longer && !n_sources))
        return fail(LLMC_ERROR_ARGUMENT, "sequence_repeat", NULL, "a sequence of %u tokens cannot be repeated to %d",
                    sequence->length, n);
    llmc_sequence *copy;
    llmc_status status = sequence_new(model, &copy);
    if (status) return status;
    if (!sequence_reserve(copy, (uint32_t)n)) {
        sequence_free(copy);
        return fail(LLMC_ERROR_MEMORY, model->file.path, "open the model with room for more tokens (kv_tokens)",
                    "the KV cache has no room for %d more tokens", n);
    }
    for (uint32_t i = 0; i < copy->n_pages; i++)
        model->device->copy_page(model, copy->pages[i], sequence->pages[i % n_sources]);
    if (n && sequence->state >= 0) model->device->copy_state(model, copy->state, sequence->state);
    for (uint32_t i = 0; i < (uint32_t)n; i++) copy->tokens[i] = sequence->tokens[i % sequence->length];
    copy->length = (uint32_t)n;
    turns_of_text(copy);
    copy->is_repeated = n != 0;
    copy->adapter = sequence->adapter;
    *out = copy;
    return LLMC_OK;
}

void sequence_free(llmc_sequence *sequence)
{
    if (!sequence) return;
    sequence->length = 0;
    sequence_drop_logits(sequence);
    sequence_settle(sequence);
    free(sequence->pages);
    free(sequence->tokens);
    free(sequence->behind);
    free(sequence->logits);
    free(sequence->note);
    free(sequence);
}

int32_t sequence_length(const llmc_sequence *sequence)
{
    return sequence ? (int32_t)sequence->length : 0;
}

llmc_status sequence_truncate(llmc_sequence *sequence, int32_t n)
{
    if (!sequence) return fail(LLMC_ERROR_ARGUMENT, "sequence_truncate", NULL, "the sequence is NULL");
    if (n < 0 || (uint32_t)n > sequence->length)
        return fail(LLMC_ERROR_ARGUMENT, "sequence_truncate", NULL, "a sequence of %u tokens has no first %d",
                    sequence->length, n);
    if ((uint32_t)n == sequence->length) return LLMC_OK;
    n -= (int32_t)rows_place(sequence->model, sequence->tokens[n]); /* a picture stays whole, or goes */
    if (n && sequence->state >= 0)
        return fail(LLMC_ERROR_ARGUMENT, "sequence_truncate", "truncate it to 0 and feed it again, or fork it in time",
                    "the model has states, which do not go back: a sequence of %u tokens cannot be cut to %d",
                    sequence->length, n);
    sequence->length = (uint32_t)n;
    sequence_drop_logits(sequence);
    sequence_settle(sequence);
    return LLMC_OK;
}

llmc_status sequence_tokens(const llmc_sequence *sequence, const int32_t **out)
{
    if (out) *out = NULL;
    if (!sequence || !out)
        return fail(LLMC_ERROR_ARGUMENT, "sequence_tokens", NULL, "the %s is NULL", sequence ? "result" : "sequence");
    *out = sequence->tokens;
    return LLMC_OK;
}

int32_t sequence_adapter(const llmc_sequence *sequence)
{
    return sequence ? sequence->adapter : -1;
}

llmc_status sequence_set_adapter(llmc_sequence *sequence, int32_t adapter)
{
    if (!sequence) return fail(LLMC_ERROR_ARGUMENT, "sequence_set_adapter", NULL, "the sequence is NULL");
    const llmc_model *model = sequence->model;
    if (adapter < -1 || adapter >= (int64_t)model->plans.n_adapters)
        return fail(LLMC_ERROR_ARGUMENT, model->file.path, NULL, "there is no adapter %d: the artifact has %u", adapter,
                    model->plans.n_adapters);
    if (sequence->length)
        return fail(LLMC_ERROR_ARGUMENT, model->file.path, "choose it in front of the first token, or truncate to 0",
                    "a sequence of %u tokens cannot take another adapter", sequence->length);
    sequence->adapter = adapter;
    return LLMC_OK;
}

llmc_status sequence_logits(const llmc_sequence *sequence, const float **out)
{
    if (out) *out = NULL;
    if (!sequence || !out)
        return fail(LLMC_ERROR_ARGUMENT, "logits", NULL, "the %s is NULL", sequence ? "result" : "sequence");
    if (!sequence->has_logits)
        return fail(LLMC_ERROR_ARGUMENT, "logits", "feed tokens first", "the sequence has no logits");
    llmc_status status = sequence_keep_logits((llmc_sequence *)sequence); /* see copy_logits */
    if (!status) *out = sequence->logits;
    return status;
}

/* -- rows of the device ------------------------------------------------------------------------------------------- */

void sequence_claim_row(llmc_sequence *sequence, uint32_t row)
{
    sequence->has_logits = 1;
    sequence->row = row + 1;
    sequence->model->owners[row] = sequence;
}

void sequence_drop_logits(llmc_sequence *sequence)
{
    if (sequence->row) sequence->model->owners[sequence->row - 1] = NULL;
    sequence->row = 0;
    sequence->has_logits = 0;
}

llmc_status sequence_keep_logits(llmc_sequence *sequence)
{
    llmc_model *model = sequence->model;
    uint32_t row = sequence->row - 1;
    if (!sequence->row) return LLMC_OK;
    llmc_status status = model->device->finish(model); /* what fails in a step that runs ahead is not this copy's */
    if (!status) status = model->device->read_logits(model, row, sequence->logits);
    if (!status) status = model->device->finish(model);
    if (status) {
        sequence_drop_logits(sequence);
        return status;
    }
    if (model->chosen) sequence->choice = model->chosen[row];
    model->owners[row] = NULL;
    sequence->row = 0;
    return LLMC_OK;
}

llmc_status rows_keep(llmc_model *model, uint32_t n_rows)
{
    llmc_status status = LLMC_OK;
    for (uint32_t row = 0; row < n_rows && !status; row++)
        if (model->owners[row]) status = sequence_keep_logits(model->owners[row]);
    return status;
}

llmc_status sequence_restore_row(llmc_sequence *sequence)
{
    llmc_model *model = sequence->model;
    uint32_t n = model->plans.max_head_rows, row = 0;
    llmc_status status = LLMC_OK;
    if (sequence->row) return LLMC_OK;
    while (row < n && model->owners[row]) row++;
    if (row == n) { /* none is free: take one from a sequence that does not need it now */
        for (row = 0; row < n && model->owners[row]->in_call;) row++;
        if (row == n)
            return fail(LLMC_ERROR_ARGUMENT, "sample", "sample fewer sequences at once",
                        "the device has %u rows of logits", n);
        status = sequence_keep_logits(model->owners[row]);
    }
    if (!status) status = model->device->write_logits(model, row, sequence->logits);
    if (status) return status;
    sequence_claim_row(sequence, row);
    model->chosen[row] = sequence->choice;
    return LLMC_OK;
}

/* -- pages -------------------------------------------------------------------------------------------------------- */

/* Make the last page the sequence's own, by a copy when others hold it too. 0: the cache is full. */
static int own_last_page(llmc_sequence *sequence)
{
    llmc_model *model = sequence->model;
    int32_t *page = sequence->pages + sequence->n_pages - 1;
    if (!kv_is_shared(&model->kv, *page)) return 1;
    int32_t copy = kv_take(&model->kv);
    if (copy < 0) return 0;
    model->device->copy_page(model, copy, *page);
    kv_release(&model->kv, *page);
    *page = copy;
    return 1;
}

int sequence_lacks_state(const llmc_sequence *sequence)
{
    const kv_cache *states = &sequence->model->states;
    return states->page_bytes && (sequence->state < 0 || kv_is_shared(states, sequence->state));
}

/* Make the state the sequence's own, by a copy when others hold it too. 0: no slot is free. */
static int own_state(llmc_sequence *sequence)
{
    llmc_model *model = sequence->model;
    if (!sequence_lacks_state(sequence)) return 1;
    int32_t slot = kv_take(&model->states);
    if (slot < 0) return 0;
    if (sequence->state >= 0) {
        model->device->copy_state(model, slot, sequence->state);
        kv_release(&model->states, sequence->state);
    }
    sequence->state = slot;
    return 1;
}

int sequence_reserve(llmc_sequence *sequence, uint64_t n_tokens)
{
    kv_cache *kv = &sequence->model->kv;
    if (!own_state(sequence)) return 0;
    uint32_t n_needed = pages_for(sequence, sequence->length + n_tokens);
    /* A last page that is not full takes the next token. */
    if (sequence->length % kv->page_tokens && !own_last_page(sequence)) return 0;
    while (sequence->n_pages < n_needed) {
        int32_t page = kv_take(kv);
        if (page < 0) return 0;
        sequence->pages[sequence->n_pages++] = page;
    }
    return 1;
}

void sequence_settle(llmc_sequence *sequence)
{
    uint32_t n_needed = pages_for(sequence, sequence->length);
    while (sequence->n_pages > n_needed) kv_release(&sequence->model->kv, sequence->pages[--sequence->n_pages]);
    if (!sequence->length) sequence->is_repeated = 0;
    if (sequence->length || sequence->state < 0) return;
    kv_release(&sequence->model->states, sequence->state);
    sequence->state = -1;
}

void sequence_return(llmc_sequence *sequence, uint32_t length, int32_t state)
{
    if (sequence->state >= 0) kv_release(&sequence->model->states, sequence->state);
    sequence->state = state;
    sequence->length = length;
    sequence_drop_logits(sequence);
    sequence_settle(sequence);
}
