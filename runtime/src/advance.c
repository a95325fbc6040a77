/* advance.c - the next token of each sequence, and the step on it, as one call.
 *
 * A GPU takes the tokens of the step from where it has just chosen them, so that it goes on while the host still reads
 * them. Rows whose logits are being computed then have an owner already, and a choice that nobody has seen: they are
 * the first model->n_ahead rows, until device->finish. The next advance is the one call that need not finish first. */
#include <string.h>

#include "runtime.h"

/* -- one after the other: on a CPU, and whenever the tokens do not fit one body, one head and one sampler ---------- */

static llmc_status sample_all(llmc_model *model, llmc_advance_input *inputs, size_t n_inputs)
{
    enum { MOST = 64 };
    llmc_sample_input some[MOST];
    llmc_status status = LLMC_OK;
    for (size_t first = 0; first < n_inputs && !status; first += MOST) {
        size_t n = n_inputs - first < MOST ? n_inputs - first : MOST;
        for (size_t i = 0; i < n; i++)
            some[i] = (llmc_sample_input){inputs[first + i].sequence, inputs[first + i].how, -1};
        status = sample_many(model, some, n);
        for (size_t i = 0; i < n && !status; i++) inputs[first + i].token = some[i].token;
    }
    return status;
}

/* -- where tokens come from ---------------------------------------------------------------------------------------- */

static int is_known(const llmc_model *model, const llmc_sequence *sequence)
{
    return !sequence->row || sequence->row > model->n_ahead;
}

/* Whether something would be lost: rows that the host has not seen and others still need, or logits that have to come
 * from the host into a row. */
static int must_finish(const llmc_model *model, const llmc_advance_input *inputs, size_t n_inputs, uint32_t n_rows)
{
    int must = 0;
    if (!model->n_ahead) return 0;
    if (n_rows < model->n_ahead) n_rows = model->n_ahead;
    for (size_t i = 0; i < n_inputs; i++) inputs[i].sequence->in_call = 1;
    for (uint32_t row = 0; row < n_rows; row++) must |= model->owners[row] && !model->owners[row]->in_call;
    for (size_t i = 0; i < n_inputs; i++) {
        inputs[i].sequence->in_call = 0;
        must |= !inputs[i].sequence->row && sample_is_drawn(inputs[i].how);
    }
    return must;
}

/* Into model->tokens what the host knows, into sources what the device does, into draws [n_draws] what it has to
 * draw. */
static llmc_status find_tokens(llmc_model *model, const llmc_advance_input *inputs, size_t n_inputs, uint32_t *n_draws)
{
    llmc_status status = LLMC_OK;
    *n_draws = 0;
    for (size_t i = 0; i < n_inputs; i++) inputs[i].sequence->in_call = 1;
    for (size_t i = 0; i < n_inputs && !status; i++) {
        llmc_sequence *sequence = inputs[i].sequence;
        model->sources[i] = LLMC_FROM_HOST;
        model->tokens[i] = 0;
        if (sample_is_drawn(inputs[i].how)) {
            status = sequence_restore_row(sequence);
            if (!status) status = sample_record(sequence, inputs[i].how, model->draws + *n_draws);
            model->sources[i] = LLMC_FROM_DRAW - (int32_t)(*n_draws)++;
        } else if (is_known(model, sequence)) {
            status = sample_choice(sequence, model->tokens + i);
        } else {
            model->sources[i] = (int32_t)sequence->row - 1;
        }
    }
    for (size_t i = 0; i < n_inputs; i++) inputs[i].sequence->in_call = 0;
    return status;
}

/* -- ahead --------------------------------------------------------------------------------------------------------- */

typedef struct route {
    const plan *body, *head, *sampler; /* sampler: NULL when nothing is drawn */
    uint32_t n_rows, n_draws;
} route;

/* The plans for so many sequences; 0 when they do not fit, the device cannot, or the host has to choose a token. */
static int find_route(const llmc_model *model, const llmc_advance_input *inputs, size_t n_inputs, route *route)
{
    const plans *plans = &model->plans;
    const uint32_t step_rows = model->device->step_rows;
    if (!model->device->advance || n_inputs > plans->max_head_rows) return 0;
    *route = (struct route){.n_rows = (uint32_t)n_inputs};
    for (size_t i = 0; i < n_inputs; i++) {
        if (sample_is_hosted(inputs[i].how)) return 0;
        route->n_draws += (uint32_t)sample_is_drawn(inputs[i].how);
    }
    route->body = plan_choose(plans->bodies, plans->n_bodies, n_inputs, step_rows);
    route->head = plan_choose(plans->heads, plans->n_heads, n_inputs, step_rows);
    if (route->n_draws) route->sampler = plan_choose(plans->samplers, plans->n_samplers, route->n_draws, step_rows);
    return route->body->n_rows >= n_inputs && route->head->n_rows >= n_inputs &&
           (!route->sampler || route->sampler->n_rows >= route->n_draws);
}

/* Start the step and wait for its tokens, which are in model->tokens then. */
static llmc_status run_ahead(llmc_model *model, const route *route)
{
    const uint32_t n = route->n_rows;
    model->n_ahead = 0; /* whoever owned a row is in this call, or has been looked after */
    for (uint32_t i = 0; i < n; i++) sequence_drop_logits(model->turn[i].sequence);
    llmc_status status = rows_keep(model, route->head->n_rows);
    if (status) return status;
    for (uint32_t i = 0; i < route->body->n_rows; i++) {
        const llmc_sequence *sequence = i < n ? model->turn[i].sequence : NULL;
        step_fill_row(model, i, sequence, i < n ? model->tokens[i] : 0, sequence ? sequence->length : 0);
    }
    for (uint32_t i = 0; i < route->head->n_rows; i++) model->rows[i] = i < n ? (int32_t)i : 0;
    for (uint32_t i = route->n_draws; route->sampler && i < route->sampler->n_rows; i++)
        model->draws[i] = (llmc_draw_record){.row = -1};
    status = model->device->advance(model, route->body, route->head, route->sampler, n);
    for (uint32_t i = 0; i < n && !status; i++)
        if (model->tokens[i] < 0) status = sample_no_number();
    if (status) {
        model->device->finish(model);
        return status;
    }
    for (uint32_t i = 0; i < n; i++) sequence_claim_row(model->turn[i].sequence, i);
    model->n_ahead = n;
    return LLMC_OK;
}

/* -- the call ------------------------------------------------------------------------------------------------------ */

/* Fill model->turn, and check everything that can be refused before anything changes, but for pages. */
static llmc_status check(llmc_model *model, llmc_advance_input *inputs, size_t n_inputs)
{
    uint64_t n_tokens;
    if (n_inputs > model->plans.max_body_rows)
        return fail(LLMC_ERROR_ARGUMENT, "advance", "make several calls, or sample_many and step",
                    "%zu sequences are more than the %u of the largest step", n_inputs, model->plans.max_body_rows);
    for (size_t i = 0; i < n_inputs; i++) {
        inputs[i].token = 0; /* checked below as if it were known */
        model->turn[i] = (llmc_step_input){inputs[i].sequence, &inputs[i].token, 1, NULL};
    }
    llmc_status status = step_check(model, model->turn, n_inputs, &n_tokens);
    for (size_t i = 0; i < n_inputs && !status; i++) status = sample_check(inputs[i].sequence, inputs[i].how);
    return status;
}

llmc_status advance(llmc_model *model, llmc_advance_input *inputs, size_t n_inputs)
{
    if (!model || (!inputs && n_inputs))
        return fail(LLMC_ERROR_ARGUMENT, "advance", NULL, "the %s NULL", model ? "inputs are" : "model is");
    route route;
    llmc_status status = check(model, inputs, n_inputs);
    if (status || !n_inputs) return status;
    if (!find_route(model, inputs, n_inputs, &route)) {
        status = sample_all(model, inputs, n_inputs);
        return status ? status : step(model, model->turn, n_inputs);
    }
    if (must_finish(model, inputs, n_inputs, route.head->n_rows)) status = model->device->finish(model);
    if (!status) status = find_tokens(model, inputs, n_inputs, &route.n_draws);
    if (!status) status = step_reserve(model, model->turn, n_inputs, n_inputs);
    if (status) return status;
    status = run_ahead(model, &route);
    for (size_t i = 0; i < n_inputs && !status; i++) inputs[i].token = model->tokens[i];
    return step_settle(model->turn, n_inputs, status);
}
