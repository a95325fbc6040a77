/* The function table of include/llmc.h over a model of arithmetic: what follows a sequence depends on all of its
 * tokens and on their order.  For tests of the binding and the command line, which need no kernels. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <threads.h>
#include <time.h>

#include "llmc.h"

#ifndef N_VOCAB
#define N_VOCAB 64
#endif
#ifndef N_CONTEXT
#define N_CONTEXT 48
#endif
#ifndef STEP_MS
#define STEP_MS 0
#endif
enum { MAX_STEP = 8, KV_TOKENS = 160, EOS = 2 };

struct llmc_model {
    int32_t n_threads, n_kv_used, n_kv;
};

struct llmc_sequence {
    llmc_model *model;
    int32_t n;
    int32_t tokens[N_CONTEXT];
    float logits[N_VOCAB];
};

static _Thread_local char message[256];

static llmc_status fail(llmc_status status, const char *text)
{
    snprintf(message, sizeof message, "%s", text);
    return status;
}

static const char *last_error(void)
{
    return message;
}

static llmc_status open_model(const llmc_options *options, llmc_model **out)
{
    if (options && options->n_threads == 99)
        return fail(LLMC_ERROR_TARGET, "this machine lacks threads\n" STUB_PLACE "\nhint: take fewer");
    *out = calloc(1, sizeof **out);
    (*out)->n_threads = options && options->n_threads ? options->n_threads : 2;
    (*out)->n_kv = options && options->kv_tokens ? (int32_t)options->kv_tokens : KV_TOKENS;
    return LLMC_OK;
}

static void close_model(llmc_model *model)
{
    free(model);
}

static llmc_status model_info(const llmc_model *model, llmc_info *out)
{
    const llmc_info info = {
        sizeof info, N_VOCAB, N_CONTEXT, model->n_threads, MAX_STEP, 1, 4096, 256, (uint64_t)model->n_kv,
        (uint64_t)(model->n_kv - model->n_kv_used), "CPU", 0, 1,
        sizeof(llmc_sampling),
    };
    memcpy(out, &info, out->size < sizeof info ? out->size : sizeof info);
    return LLMC_OK;
}

static int is_eos(const llmc_model *model, int32_t token)
{
    (void)model;
    return token == EOS;
}

static llmc_status token_text(const llmc_model *model, int32_t token, const char **bytes, size_t *n_bytes)
{
    static char text[16];
    (void)model;
    *n_bytes = (size_t)snprintf(text, sizeof text, "<%d>", token);
    *bytes = text;
    return LLMC_OK;
}

static llmc_status sequence_new(llmc_model *model, llmc_sequence **out)
{
    *out = calloc(1, sizeof **out);
    (*out)->model = model;
    return LLMC_OK;
}

static llmc_status sequence_fork(const llmc_sequence *sequence, llmc_sequence **out)
{
    *out = malloc(sizeof **out);
    **out = *sequence;
    sequence->model->n_kv_used += sequence->n;
    return LLMC_OK;
}

static void sequence_free(llmc_sequence *sequence)
{
    if (sequence)
        sequence->model->n_kv_used -= sequence->n;
    free(sequence);
}

static int32_t sequence_length(const llmc_sequence *sequence)
{
    return sequence->n;
}

static llmc_status sequence_truncate(llmc_sequence *sequence, int32_t n)
{
    if (n < 0 || n > sequence->n)
        return fail(LLMC_ERROR_ARGUMENT, "truncated to more tokens than there are");
    sequence->model->n_kv_used -= sequence->n - n;
    sequence->n = n;
    return LLMC_OK;
}

static void compute(const llmc_sequence *sequence, float *logits)
{
    uint32_t state = 17;
    for (int32_t i = 0; i < sequence->n; i++)
        state = state * 1664525u + (uint32_t)sequence->tokens[i] + 1013904223u;
    for (uint32_t v = 0; v < N_VOCAB; v++)
        logits[v] = -0.25f * (float)((v + N_VOCAB - (state >> 8) % N_VOCAB) % N_VOCAB);
}

static llmc_status step(llmc_model *model, const llmc_step_input *inputs, size_t n_inputs)
{
    const struct timespec pause = {.tv_nsec = STEP_MS * 1000000};
    size_t n = 0;
    if (STEP_MS) thrd_sleep(&pause, NULL);
    for (size_t i = 0; i < n_inputs; i++) {
        n += inputs[i].n_tokens;
        if ((size_t)inputs[i].sequence->n + inputs[i].n_tokens > N_CONTEXT)
            return fail(LLMC_ERROR_ARGUMENT, "the sequence is past the context");
    }
    if (n > (size_t)(model->n_kv - model->n_kv_used))
        return fail(LLMC_ERROR_MEMORY, "the KV cache is full\nhint: ask for more kv_tokens");
    for (size_t i = 0; i < n_inputs; i++) {
        llmc_sequence *sequence = inputs[i].sequence;
        for (size_t j = 0; j < inputs[i].n_tokens; j++) {
            sequence->tokens[sequence->n++] = inputs[i].tokens[j];
            compute(sequence, sequence->logits);
            if (inputs[i].logits)
                memcpy(inputs[i].logits + j * N_VOCAB, sequence->logits, sizeof sequence->logits);
        }
        model->n_kv_used += (int32_t)inputs[i].n_tokens;
    }
    return LLMC_OK;
}

static llmc_status feed(llmc_sequence *sequence, const int32_t *tokens, size_t n_tokens)
{
    const llmc_step_input input = {sequence, tokens, n_tokens, NULL};
    return step(sequence->model, &input, 1);
}

static llmc_status logits(const llmc_sequence *sequence, const float **out)
{
    if (!sequence->n)
        return fail(LLMC_ERROR_ARGUMENT, "the sequence is empty");
    *out = sequence->logits;
    return LLMC_OK;
}

static int is_allowed(const llmc_sampling *how, int32_t token)
{
    return !how || !how->allowed || how->allowed[token / 32] >> token % 32 & 1;
}

/* What biases and the presence penalty alone leave of a logit. */
static float adjusted(const llmc_sequence *sequence, const llmc_sampling *how, int32_t token)
{
    float logit = sequence->logits[token], penalty = 0;
    for (uint32_t i = 0; how && i < how->n_biases; i++)
        logit += how->biases[i].token == token ? how->biases[i].value : 0;
    for (uint32_t i = how ? how->n_prompt : 0; how && i < how->n_tokens; i++)
        if (how->tokens[i] == token) penalty = how->presence_penalty;
    return logit - penalty;
}

static llmc_status sample(const llmc_sequence *sequence, const llmc_sampling *how, int32_t *out)
{
    int32_t best = -1;
    if (!sequence->n)
        return fail(LLMC_ERROR_ARGUMENT, "the sequence is empty");
    for (int32_t v = 0; v < N_VOCAB; v++)
        if (is_allowed(how, v) && (best < 0 || adjusted(sequence, how, v) > adjusted(sequence, how, best)))
            best = v;
    if (best < 0)
        return fail(LLMC_ERROR_ARGUMENT, "no token is allowed");
    for (uint64_t i = 0; how && how->temperature > 0 && i < how->seed % N_VOCAB; i++)
        do
            best = (best + 1) % N_VOCAB;
        while (!is_allowed(how, best));
    *out = best;
    return LLMC_OK;
}

static const llmc_api api = {
    sizeof(llmc_api), LLMC_API_VERSION, last_error,    open_model,      close_model,       model_info, is_eos, token_text,
    sequence_new,     sequence_fork,    sequence_free, sequence_length, sequence_truncate, step,       feed,   logits,
    sample,
};

const llmc_api *llmc_get_api(uint32_t version)
{
    return version == LLMC_API_VERSION ? &api : NULL;
}
