/* speculate.c - a token and guesses at those behind it, in one step.
 *
 * A step on eight tokens of a sequence reads the weights once, as a step on one does.  So whoever can guess what a text
 * goes on with has guesses checked for little more than a token costs (Leviathan, Kalman, Matias 2023, arXiv:2211.17192).
 * What is kept here is not drawn anew: a draw depends on the logits, the seed and the position alone (sample.c), so the
 * token that sample() would have given at a place is known as soon as the logits before it are, and a guess is right or
 * it is not.  The text is that of one token at a time, to the last token, drawn or greedy; on a CPU its logits are too. */
#include <string.h>

#include "runtime.h"

static llmc_status check(const llmc_model *model, const llmc_speculate_input *inputs, size_t n_inputs)
{
    if (n_inputs > model->plans.max_body_rows)
        return fail(LLMC_ERROR_ARGUMENT, "speculate", "make several calls",
                    "%zu sequences are more than the %u of the largest step", n_inputs, model->plans.max_body_rows);
    for (size_t i = 0; i < n_inputs; i++) {
        if (!inputs[i].logits)
            return fail(LLMC_ERROR_ARGUMENT, "speculate", "give it memory for [n_tokens, n_vocab]",
                        "input %zu has no room for logits", i);
        llmc_status status = sample_check_how(inputs[i].how);
        if (status) return status;
        if (sample_is_masked(inputs[i].how))
            return fail(LLMC_ERROR_ARGUMENT, "speculate", "sample and feed one token at a time",
                        "input %zu allows some tokens alone", i);
    }
    return LLMC_OK;
}

/* How many of the tokens stay: the first, and the guesses up to the first that is wrong.  Logits of which none is a
 * number end it as well; whoever samples from them is told. */
static size_t count_right(const llmc_speculate_input *input, uint32_t length)
{
    const llmc_model *model = input->sequence->model;
    size_t n = 1;
    for (int32_t token; n < input->n_tokens; n++) {
        const float *logits = input->logits + (n - 1) * model->plans.header.n_vocab;
        if (sample_at(model, logits, (uint32_t)(length + n), input->how, &token) || token != input->tokens[n]) break;
    }
    return n;
}

/* The sequence as it was when it had so many of the tokens. */
static void keep(const llmc_speculate_input *input, uint32_t length, size_t n_kept)
{
    llmc_sequence *sequence = input->sequence;
    const uint32_t n_vocab = sequence->model->plans.header.n_vocab;
    if (n_kept == input->n_tokens) return;
    sequence_truncate(sequence, (int32_t)(length + n_kept));
    memcpy(sequence->logits, input->logits + (n_kept - 1) * n_vocab, n_vocab * sizeof *sequence->logits);
    sequence->choice = sample_best(sequence->logits, n_vocab);
    sequence->has_logits = 1;
}

llmc_status speculate(llmc_model *model, llmc_speculate_input *inputs, size_t n_inputs)
{
    if (!model || (!inputs && n_inputs))
        return fail(LLMC_ERROR_ARGUMENT, "speculate", NULL, "the %s NULL", model ? "inputs are" : "model is");
    llmc_status status = check(model, inputs, n_inputs);
    for (size_t i = 0; i < n_inputs && !status; i++) {
        const llmc_speculate_input *in = inputs + i;
        model->turn[i] = (llmc_step_input){in->sequence, in->tokens, in->n_tokens, in->logits};
    }
    if (!status) status = step(model, model->turn, n_inputs);
    for (size_t i = 0; i < n_inputs && !status; i++) {
        uint32_t length = inputs[i].sequence->length - (uint32_t)inputs[i].n_tokens;
        inputs[i].n_kept = count_right(inputs + i, length);
        keep(inputs + i, length, inputs[i].n_kept);
    }
    return status;
}
