/* step.c - tokens of several sequences through bodies and heads.
 *
 * The tokens of all inputs are one stream, input after input. A body takes the next M of it, whatever sequences they
 * belong to; the heads then turn the rows whose logits are wanted into logits, while the arena still has them. Where
 * tokens see what is behind them a body takes as many inputs as it has rows for, each of them whole. */
#include <string.h>

#include "runtime.h"

/* A place in the stream: token `token` of input `input`. */
typedef struct cursor {
    size_t input, token;
} cursor;

static void move_on(cursor *at, const llmc_step_input *inputs)
{
    if (++at->token == inputs[at->input].n_tokens) *at = (cursor){at->input + 1, 0};
}

/* -- checks, before anything changes ------------------------------------------------------------------------------ */

static llmc_status check_input(const llmc_model *model, const llmc_step_input *input, size_t index)
{
    const llmc_plan_header *h = &model->plans.header;
    const llmc_sequence *sequence = input->sequence;
    const char *path = model->file.path;
    if (!sequence || !input->tokens || !input->n_tokens)
        return fail(LLMC_ERROR_ARGUMENT, path, NULL, "input %zu of the step has no %s", index,
                    sequence ? "tokens" : "sequence");
    if (sequence->model != model)
        return fail(LLMC_ERROR_ARGUMENT, path, NULL, "input %zu of the step is a sequence of another model", index);
    if (sequence->in_call)
        return fail(LLMC_ERROR_ARGUMENT, path, "give all its tokens in one input",
                    "input %zu of the step is there twice", index);
    if (input->n_tokens > h->n_context - sequence->length)
        return fail(LLMC_ERROR_ARGUMENT, path, "shorten the text, or compile with a larger --max-seq",
                    "%zu tokens after %u are more than the context of %u", input->n_tokens, sequence->length,
                    h->n_context);
    if (model->plans.is_whole && sequence->length)
        return fail(LLMC_ERROR_ARGUMENT, path, "give each text in one input, to a sequence of its own",
                    "the model reads a text whole, and input %zu of the step is to go on after %u tokens", index,
                    sequence->length);
    llmc_status status = LLMC_OK;
    for (size_t i = 0; i < input->n_tokens && !status; i++) status = rows_check(model, input->tokens[i]);
    if (!status && model->plans.picture_rows) status = rows_check_order(model, input->tokens, input->n_tokens);
    if (!status && model->turns) status = turns_check(sequence, input->tokens, input->n_tokens);
    return status;
}

llmc_status step_check(const llmc_model *model, const llmc_step_input *inputs, size_t n_inputs, uint64_t *n_tokens)
{
    llmc_status status = LLMC_OK;
    size_t n_good = 0;
    *n_tokens = 0;
    while (n_good < n_inputs && !(status = check_input(model, inputs + n_good, n_good))) {
        *n_tokens += inputs[n_good].n_tokens;
        inputs[n_good++].sequence->in_call = 1;
    }
    for (size_t i = 0; i < n_good; i++) inputs[i].sequence->in_call = 0;
    return status;
}

llmc_status step_reserve(llmc_model *model, const llmc_step_input *inputs, size_t n_inputs, uint64_t n_tokens)
{
    const kv_cache *kv = &model->kv;
    unsigned long long n_free = (unsigned long long)kv_free_pages(kv) * kv->page_tokens;
    const kv_cache *states = &model->states;
    size_t n_ready = 0;
    while (n_ready < n_inputs && sequence_reserve(inputs[n_ready].sequence, inputs[n_ready].n_tokens)) n_ready++;
    if (n_ready == n_inputs) return LLMC_OK;
    int lacks_state = sequence_lacks_state(inputs[n_ready].sequence);
    for (size_t i = 0; i <= n_ready; i++) sequence_settle(inputs[i].sequence);
    if (lacks_state)
        return fail(LLMC_ERROR_MEMORY, model->file.path, "free a sequence, or open with more slots",
                    "there is no slot for a sequence's state: %u of %u are taken", states->n_pages, states->n_pages);
    return fail(LLMC_ERROR_MEMORY, model->file.path, "free or truncate a sequence, or open with more kv_tokens",
                "the KV cache is full: the step has %llu tokens, and there are pages for %llu of %llu",
                (unsigned long long)n_tokens, n_free, (unsigned long long)kv->n_pages * kv->page_tokens);
}

llmc_status step_settle(const llmc_step_input *inputs, size_t n_inputs, llmc_status status)
{
    for (size_t i = 0; i < n_inputs; i++) {
        llmc_sequence *sequence = inputs[i].sequence;
        if (!status) {
            memcpy(sequence->tokens + sequence->length, inputs[i].tokens, inputs[i].n_tokens * sizeof *inputs[i].tokens);
            sequence->length += (uint32_t)inputs[i].n_tokens;
        } else {
            sequence_drop_logits(sequence);
        }
        if (status && sequence->state >= 0) sequence->length = 0; /* its state is somewhere on the way */
        sequence_settle(sequence);
    }
    return status;
}

/* -- bodies and heads --------------------------------------------------------------------------------------------- */

/* Where a row stands for the token, what is to be taken in place of an embedding. */
static void take_row(llmc_model *model, uint32_t row, int32_t token)
{
    const uint64_t n_row = model->plans.n_row;
    const float *numbers = (uint32_t)token < rows_first(model) ? NULL : rows_find(model, token);
    model->is_given[row] = numbers != NULL;
    if (!numbers) return;
    memcpy(model->taken + row * n_row, numbers, n_row * sizeof *numbers);
    model->tokens[row] = 0;
}

void step_fill_row(llmc_model *model, uint32_t row, const llmc_sequence *sequence, int32_t token, uint32_t position)
{
    uint32_t n_columns = model->plans.header.pages_per_sequence, n_pages = sequence ? sequence->n_pages : 0;
    int32_t *pages = model->page_table + (uint64_t)row * n_columns;
    model->tokens[row] = token;
    model->positions[row] = sequence ? (int32_t)position : -1;
    if (model->adapters) model->adapters[row] = sequence ? sequence->adapter : -1;
    if (model->is_given) take_row(model, row, token);
    if (model->sees)
        model->sees[row] = sequence ? (int32_t)(position + rows_together(model, token) - 1) : -1;
    if (model->slots) model->slots[row] = sequence ? sequence->state : -1;
    if (n_pages) memcpy(pages, sequence->pages, n_pages * sizeof *pages);
    memset(pages + n_pages, 0xff, (n_columns - n_pages) * sizeof *pages); /* -1 */
}

static void fill_body(llmc_model *model, const llmc_step_input *inputs, const plan *body, uint32_t n_rows, cursor at)
{
    for (uint32_t row = 0; row < n_rows; row++, move_on(&at, inputs)) {
        const llmc_step_input *input = inputs + at.input;
        uint32_t position = input->sequence->length + (uint32_t)at.token;
        step_fill_row(model, row, input->sequence, input->tokens[at.token], position);
        if (model->turns) turns_fill(model, row, input->sequence, input->tokens[at.token], position);
    }
    for (uint32_t row = n_rows; row < body->n_rows; row++) step_fill_row(model, row, NULL, 0, 0);
    if (model->turns) memset(model->turns + 3ull * n_rows, 0, 3ull * (body->n_rows - n_rows) * sizeof *model->turns);
}

static int is_wanted(const llmc_step_input *inputs, cursor at)
{
    return inputs[at.input].logits || at.token + 1 == inputs[at.input].n_tokens;
}

/* The first n wanted rows of the body from `row` on, whose token is at the cursor; both move on. */
static void fill_head(llmc_model *model, const llmc_step_input *inputs, const plan *head, uint32_t n, cursor *at,
                      uint32_t *row)
{
    uint32_t found = 0;
    for (; found < n; ++*row, move_on(at, inputs))
        if (is_wanted(inputs, *at)) model->rows[found++] = (int32_t)*row;
    for (; found < head->n_rows; found++) model->rows[found] = 0; /* padding: computed and forgotten */
}

/* A head has computed n rows, the first of them that of the token at the cursor or the next wanted one. */
static llmc_status hand_out_logits(llmc_model *model, const llmc_step_input *inputs, uint32_t n, cursor at)
{
    size_t n_vocab = model->plans.header.n_vocab;
    llmc_status status = LLMC_OK;
    for (uint32_t row = 0; row < n && !status; move_on(&at, inputs)) {
        const llmc_step_input *input = inputs + at.input;
        if (!is_wanted(inputs, at)) continue;
        if (input->logits) status = model->device->read_logits(model, row, input->logits + at.token * n_vocab);
        if (at.token + 1 == input->n_tokens) sequence_claim_row(input->sequence, row);
        row++;
    }
    return status;
}

/* Run a body on n_rows tokens from the cursor on, and the heads for those whose logits are wanted. */
static llmc_status run_tokens(llmc_model *model, const llmc_step_input *inputs, const plan *body, uint32_t n_rows,
                              cursor at)
{
    const plans *plans = &model->plans;
    const device *device = model->device;
    uint32_t n_wanted = 0, row = 0;
    cursor scout = at;
    for (uint32_t i = 0; i < n_rows; i++, move_on(&scout, inputs)) n_wanted += (uint32_t)is_wanted(inputs, scout);
    llmc_status status = device->finish(model); /* the input of what ran before may be written over */
    if (status) return status;
    fill_body(model, inputs, body, n_rows, at);
    if (!n_wanted) return device->run(model, body, NULL);
    while (n_wanted && !status) {
        const plan *head = plan_choose(plans->heads, plans->n_heads, n_wanted, device->step_rows);
        uint32_t n = n_wanted < head->n_rows ? n_wanted : head->n_rows;
        cursor first = at;
        status = device->finish(model);
        if (!status) status = rows_keep(model, head->n_rows);
        if (status) return status;
        fill_head(model, inputs, head, n, &at, &row);
        status = device->run(model, body, head);
        if (!status) status = hand_out_logits(model, inputs, n, first);
        body = NULL; /* has run */
        n_wanted -= n;
    }
    return status;
}

/* Of the next n rows of the stream as many as cut no picture whose rows see each other; more, if it is the first. */
static uint32_t uncut(const llmc_model *model, const llmc_step_input *inputs, cursor at, uint32_t n)
{
    uint32_t whole = 0, n_next;
    for (; whole < n; whole += n_next) {
        n_next = rows_together(model, inputs[at.input].tokens[at.token]);
        if (whole && whole + n_next > n) break;
        for (uint32_t i = 0; i < n_next; i++) move_on(&at, inputs);
    }
    return whole;
}

/* The body for the next rows of the stream, n_left of which are left, and how many it takes. */
static const plan *next_body(const llmc_model *model, const llmc_step_input *inputs, cursor at, uint64_t n_left,
                             uint32_t *n_rows)
{
    const plans *plans = &model->plans;
    if (!plans->is_whole) {
        const plan *body = plan_choose(plans->bodies, plans->n_bodies, n_left, model->device->step_rows);
        uint32_t n = *n_rows = n_left < body->n_rows ? (uint32_t)n_left : body->n_rows;
        if (plans->picture_rows) *n_rows = uncut(model, inputs, at, n);
        return *n_rows == n ? body : plan_holding(plans->bodies, plans->n_bodies, *n_rows);
    }
    uint64_t n = inputs[at.input].n_tokens; /* at most n_context, which is at most the largest body's rows */
    for (size_t i = at.input + 1; n < n_left && n + inputs[i].n_tokens <= plans->max_body_rows; i++)
        n += inputs[i].n_tokens;
    *n_rows = (uint32_t)n;
    return plan_holding(plans->bodies, plans->n_bodies, n);
}

llmc_status step(llmc_model *model, const llmc_step_input *inputs, size_t n_inputs)
{
    if (!model || (!inputs && n_inputs))
        return fail(LLMC_ERROR_ARGUMENT, "step", NULL, "the %s NULL", model ? "inputs are" : "model is");
    uint64_t n_left;
    cursor at = {0, 0};
    llmc_status status = step_check(model, inputs, n_inputs, &n_left);
    if (!status) status = step_reserve(model, inputs, n_inputs, n_left);
    if (status) return status;
    for (size_t i = 0; i < n_inputs; i++) sequence_drop_logits(inputs[i].sequence);
    while (n_left && !status) {
        uint32_t n_rows;
        const plan *body = next_body(model, inputs, at, n_left, &n_rows);
        status = run_tokens(model, inputs, body, n_rows, at);
        for (uint32_t i = 0; i < n_rows; i++) move_on(&at, inputs);
        n_left -= n_rows;
    }
    if (!status) status = model->device->finish(model);
    return step_settle(inputs, n_inputs, status);
}

llmc_status feed(llmc_sequence *sequence, const int32_t *tokens, size_t n_tokens)
{
    if (!sequence) return fail(LLMC_ERROR_ARGUMENT, "feed", NULL, "the sequence is NULL");
    const llmc_step_input input = {sequence, tokens, n_tokens, NULL};
    return step(sequence->model, &input, 1);
}
