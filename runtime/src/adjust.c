/* adjust.c - logits as the caller wants them before a token is chosen: with biases, and with penalties for tokens that
 * the text has already. The order, and what is prompt and what was generated, are vLLM's; the repetition penalty is
 * Hugging Face's (Keskar et al. 2019, arXiv:1909.05858, with logits below 0 multiplied). */
#include <math.h>
#include <string.h>

#include "runtime.h"

static int looks_back(const llmc_sampling *how)
{
    int repetition = how->repetition_penalty != 0 && how->repetition_penalty != 1;
    return repetition || how->frequency_penalty != 0 || how->presence_penalty != 0;
}

int adjust_is_wanted(const llmc_sampling *how)
{
    return how->n_biases || looks_back(how);
}

/* -- what is wrong with the settings ------------------------------------------------------------------------------- */

static llmc_status check_number(const char *name, float value)
{
    if (isfinite(value)) return LLMC_OK;
    return fail(LLMC_ERROR_ARGUMENT, "sample", "0 changes nothing", "%s is %g", name, (double)value);
}

static llmc_status check_token(const char *place, size_t index, int32_t token, uint32_t n_vocab)
{
    if (token >= 0 && (uint32_t)token < n_vocab) return LLMC_OK;
    return fail(LLMC_ERROR_ARGUMENT, "sample", NULL, "%s[%zu] has token %d, of a vocabulary of %u", place, index, token,
                n_vocab);
}

static llmc_status check_biases(const llmc_sampling *how, uint32_t n_vocab)
{
    if (!how->biases && how->n_biases) return fail(LLMC_ERROR_ARGUMENT, "sample", NULL, "the biases are NULL");
    llmc_status status = LLMC_OK;
    for (uint32_t i = 0; i < how->n_biases && !status; i++) {
        status = check_token("biases", i, how->biases[i].token, n_vocab);
        if (!status) status = check_number("a bias", how->biases[i].value);
    }
    return status;
}

static llmc_status check_penalties(const llmc_model *model, const llmc_sampling *how, uint32_t n_vocab)
{
    if (!(how->repetition_penalty >= 0) || isinf(how->repetition_penalty))
        return fail(LLMC_ERROR_ARGUMENT, "sample", "above 0; 1 changes nothing", "repetition_penalty is %g",
                    (double)how->repetition_penalty);
    if (!how->tokens && how->n_tokens) return fail(LLMC_ERROR_ARGUMENT, "sample", NULL, "the tokens are NULL");
    if (how->n_prompt > how->n_tokens)
        return fail(LLMC_ERROR_ARGUMENT, "sample", NULL, "n_prompt is %u, of %u tokens", how->n_prompt, how->n_tokens);
    llmc_status status = check_number("frequency_penalty", how->frequency_penalty);
    if (!status) status = check_number("presence_penalty", how->presence_penalty);
    for (uint32_t i = 0; i < how->n_tokens && !status; i++)
        if (!rows_is_one(model, how->tokens[i])) status = check_token("tokens", i, how->tokens[i], n_vocab);
    return status;
}

/* -- the change ---------------------------------------------------------------------------------------------------- */

enum { MET = 1u << 30 }; /* in the text at all, prompt or not; the bits below count how often it was generated */

static float penalized(float logit, uint32_t n_generated, const llmc_sampling *how)
{
    float repetition = how->repetition_penalty;
    if (repetition != 0) logit = logit > 0 ? logit / repetition : logit * repetition;
    logit -= how->frequency_penalty * (float)n_generated;
    return n_generated ? logit - how->presence_penalty : logit;
}

/* Rows that stand for tokens have no logits. */
static void penalize(float *logits, uint32_t n_vocab, uint32_t *counts, const llmc_sampling *how)
{
    for (uint32_t i = 0; i < how->n_tokens; i++) {
        uint32_t token = (uint32_t)how->tokens[i];
        if (token < n_vocab) counts[token] = (counts[token] | MET) + (i >= how->n_prompt);
    }
    for (uint32_t i = 0; i < how->n_tokens; i++) {
        uint32_t token = (uint32_t)how->tokens[i], count = token < n_vocab ? counts[token] : 0;
        if (token < n_vocab) counts[token] = 0;
        if (count) logits[token] = penalized(logits[token], count - MET, how);
    }
}

llmc_status adjust_logits(llmc_model *model, const llmc_sampling *how, const float **logits)
{
    uint32_t n_vocab = model->plans.header.n_vocab;
    llmc_status status = check_biases(how, n_vocab);
    if (!status && looks_back(how)) status = check_penalties(model, how, n_vocab);
    if (status) return status;
    memcpy(model->adjusted, *logits, n_vocab * sizeof **logits);
    for (uint32_t i = 0; i < how->n_biases; i++) model->adjusted[how->biases[i].token] += how->biases[i].value;
    if (looks_back(how)) penalize(model->adjusted, n_vocab, model->counts, how);
    *logits = model->adjusted;
    return LLMC_OK;
}
