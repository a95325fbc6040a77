/* sequence.c - the tokens of one text: the pages that hold its keys and values, and its last logits. */
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
        sequence->pages = calloc(h->pages_per_sequence, sizeof *sequence->pages);
        sequence->logits = calloc(h->n_vocab, sizeof *sequence->logits);
        if (sequence->pages && sequence->logits) {
            *out = sequence;
            return LLMC_OK;
        }
    }
    sequence_free(sequence);
    return fail(LLMC_ERROR_MEMORY, "sequence_new", NULL, "there is no memory for a sequence with %u logits",
                h->n_vocab);
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
    copy->n_pages = sequence->n_pages;
    copy->length = sequence->length;
    copy->has_logits = sequence->has_logits;
    if (copy->has_logits) memcpy(copy->logits, sequence->logits, model->plans.header.n_vocab * sizeof *copy->logits);
    *out = copy;
    return LLMC_OK;
}

void sequence_free(llmc_sequence *sequence)
{
    if (!sequence) return;
    sequence->length = 0;
    sequence_settle(sequence);
    free(sequence->pages);
    free(sequence->logits);
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
    sequence->length = (uint32_t)n;
    sequence->has_logits = 0;
    sequence_settle(sequence);
    return LLMC_OK;
}

llmc_status sequence_logits(const llmc_sequence *sequence, const float **out)
{
    if (out) *out = NULL;
    if (!sequence || !out)
        return fail(LLMC_ERROR_ARGUMENT, "logits", NULL, "the %s is NULL", sequence ? "result" : "sequence");
    if (!sequence->has_logits)
        return fail(LLMC_ERROR_ARGUMENT, "logits", "feed tokens first", "the sequence has no logits");
    *out = sequence->logits;
    return LLMC_OK;
}

int sequence_reserve(llmc_sequence *sequence, uint64_t n_tokens)
{
    kv_cache *kv = &sequence->model->kv;
    uint32_t n_needed = pages_for(sequence, sequence->length + n_tokens);
    if (sequence->length % kv->page_tokens) { /* the last page is not full, so the next token goes there */
        int32_t *last = sequence->pages + sequence->n_pages - 1, own = kv_own(kv, *last);
        if (own < 0) return 0;
        *last = own;
    }
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
}
