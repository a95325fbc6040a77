/* speculate.c - tokens and guesses at those behind them, in one step.
 *
 * A step on eight tokens of a sequence reads the weights once, as a step on one does. So whoever can guess what a text
 * goes on with has guesses checked for little more than a token costs (Leviathan, Kalman, Matias 2023, arXiv:2211.17192).
 * Nothing is drawn anew here: a draw depends on the logits, the seed and the position alone (sample.c), so the token
 * that sample() would have given at a place is known as soon as the logits before it are, and a guess is right or it is
 * not. The text is that of one token at a time, to the last token, drawn or greedy; on a CPU its logits are too.
 *
 * A state goes forwards alone. So a sequence with guesses holds on to the state in front of the step, which writes
 * another one; where a guess was wrong it returns there, and is fed again what is known and what was right. */
#include <string.h>

#include "runtime.h"

static llmc_status check_input(const llmc_speculate_input *input, size_t index)
{
    if (input->n_tokens && input->n_guesses >= input->n_tokens)
        return fail(LLMC_ERROR_ARGUMENT, "speculate", "the first token is known: sample() gives it",
                    "input %zu has %zu tokens, and %zu of them are guesses", index, input->n_tokens, input->n_guesses);
    if (!input->n_guesses) return LLMC_OK;
    if (!input->logits)
        return fail(LLMC_ERROR_ARGUMENT, "speculate", "give it memory for [n_tokens, n_vocab]",
                    "input %zu has guesses, and no room for logits", index);
    llmc_status status = sample_check_how(input->how);
    if (!status && sample_is_hosted(input->how))
        status = fail(LLMC_ERROR_ARGUMENT, "speculate", "sample and feed one token at a time",
                      "input %zu has guesses, and asks for more than temperature, top_k and top_p", index);
    return status;
}

/* Guesses up to the first that is wrong. Logits of which none is a number end them as well; whoever samples from them
 * is told. n_before: tokens of the sequence that are no guesses. */
static size_t count_right(llmc_model *model, const llmc_speculate_input *input, uint32_t n_before)
{
    const size_t n_known = input->n_tokens - input->n_guesses, n_vocab = model->plans.header.n_vocab;
    size_t n = 0;
    for (int32_t token; n < input->n_guesses; n++) {
        const float *logits = input->logits + (n_known + n - 1) * n_vocab;
        const uint32_t *allowed = input->allowed ? input->allowed + n * ((n_vocab + 31) / 32) : NULL;
        llmc_status status = sample_at(model, logits, n_before + (uint32_t)n, input->how, allowed, &token);
        if (status || token != input->tokens[n_known + n]) break;
    }
    return n;
}

/* Forget the guesses behind the right ones: the sequence has the logits that it had before them. */
static void forget(llmc_model *model, const llmc_speculate_input *input)
{
    llmc_sequence *sequence = input->sequence;
    const uint32_t n_vocab = model->plans.header.n_vocab;
    const size_t n_wrong = input->n_guesses - input->n_right;
    if (!n_wrong) return;
    sequence_truncate(sequence, (int32_t)(sequence->length - n_wrong));
    memcpy(sequence->logits, input->logits + (input->n_tokens - n_wrong - 1) * n_vocab,
           n_vocab * sizeof *sequence->logits);
    sequence->has_logits = 1;
    if (!model->chosen) return;
    sequence->choice = -1; /* stays, if no logit is a number */
    sample_at(model, sequence->logits, 0, NULL, NULL, &sequence->choice);
}

/* Hold the state of each sequence with guesses beside the sequence, which then takes another slot for the step. Without
 * room for that there are no guesses: then n_known of its tokens are left. */
static void keep_states(llmc_model *model, const llmc_speculate_input *inputs, size_t n_inputs)
{
    kv_cache *states = &model->states;
    uint32_t n_wanted = 0;
    for (size_t i = 0; i < n_inputs; i++) {
        const llmc_sequence *sequence = inputs[i].sequence;
        n_wanted += (uint32_t)sequence_lacks_state(sequence); /* the step needs these in any case */
        model->turn_states[i] = -1;
    }
    for (size_t i = 0; i < n_inputs; i++) {
        llmc_sequence *sequence = inputs[i].sequence;
        if (!inputs[i].n_guesses) continue;
        int is_shared = sequence_lacks_state(sequence); /* with others, which keep it: a slot is counted already */
        if (sequence->state >= 0 && kv_free_pages(states) >= n_wanted + !is_shared) {
            n_wanted += !is_shared;
            kv_share(states, model->turn_states[i] = sequence->state);
        } else {
            model->turn[i].n_tokens -= inputs[i].n_guesses;
        }
    }
}

/* Of sequences that went too far: back to the state that was kept, and forwards again in one step. The others give up
 * what was kept for them. */
static llmc_status return_to_states(llmc_model *model, llmc_speculate_input *inputs, size_t n_inputs, llmc_status status)
{
    size_t n_again = 0;
    for (size_t i = 0; i < n_inputs; i++) {
        llmc_speculate_input *in = inputs + i;
        const int32_t kept = model->turn_states[i];
        const size_t n_right = in->n_tokens - in->n_guesses + in->n_right;
        if (kept < 0) continue;
        if (status || in->n_right == in->n_guesses) {
            kv_release(&model->states, kept);
            continue;
        }
        sequence_return(in->sequence, in->sequence->length - (uint32_t)in->n_tokens, kept);
        model->turn[n_again++] = (llmc_step_input){in->sequence, in->tokens, n_right, NULL};
    }
    return status || !n_again ? status : step(model, model->turn, n_again);
}

/* The same with states. */
static llmc_status speculate_with_states(llmc_model *model, llmc_speculate_input *inputs, size_t n_inputs)
{
    uint64_t n_tokens;
    llmc_status status = step_check(model, model->turn, n_inputs, &n_tokens);
    if (status) return status;
    keep_states(model, inputs, n_inputs);
    status = step(model, model->turn, n_inputs);
    for (size_t i = 0; i < n_inputs && !status; i++) {
        const uint32_t n_before = inputs[i].sequence->length - (uint32_t)inputs[i].n_guesses;
        inputs[i].n_right = model->turn_states[i] < 0 ? 0 : count_right(model, inputs + i, n_before);
    }
    return return_to_states(model, inputs, n_inputs, status);
}

llmc_status speculate(llmc_model *model, llmc_speculate_input *inputs, size_t n_inputs)
{
    if (!model || (!inputs && n_inputs))
        return fail(LLMC_ERROR_ARGUMENT, "speculate", NULL, "the %s NULL", model ? "inputs are" : "model is");
    if (n_inputs > model->plans.max_body_rows)
        return fail(LLMC_ERROR_ARGUMENT, "speculate", "make several calls",
                    "%zu sequences are more than the %u of the largest step", n_inputs, model->plans.max_body_rows);
    llmc_status status = LLMC_OK;
    for (size_t i = 0; i < n_inputs && !status; i++) {
        const llmc_speculate_input *in = inputs + i;
        model->turn[i] = (llmc_step_input){in->sequence, in->tokens, in->n_tokens, in->logits};
        status = check_input(in, i);
    }
    if (!status && model->states.page_bytes) return speculate_with_states(model, inputs, n_inputs);
    if (!status) status = step(model, model->turn, n_inputs);
    for (size_t i = 0; i < n_inputs && !status; i++) {
        uint32_t n_before = inputs[i].sequence->length - (uint32_t)inputs[i].n_guesses;
        inputs[i].n_right = count_right(model, inputs + i, n_before);
        forget(model, inputs + i);
    }
    return status;
}
