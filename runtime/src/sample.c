/* sample.c - the next token of a sequence, chosen from its last logits.
 *
 * Candidates are ordered by logit, then by token, so that every choice is determined. A logit that is not a number is
 * never chosen. The draw depends on the seed and the token's position alone: not on the batch, nor on earlier draws. */
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "runtime.h"

static int is_better(candidate a, candidate b)
{
    return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

/* -- a heap with the best candidate on top: the m best of n in O(n + m log n) ------------------------------------- */

static void sift_down(candidate *heap, uint32_t n, uint32_t at)
{
    candidate moving = heap[at];
    for (uint64_t child; (child = 2ull * at + 1) < n; at = (uint32_t)child) {
        if (child + 1 < n && is_better(heap[child + 1], heap[child])) child++;
        if (!is_better(heap[child], moving)) break;
        heap[at] = heap[child];
    }
    heap[at] = moving;
}

static void make_heap(candidate *heap, uint32_t n)
{
    for (uint32_t i = n / 2; i-- > 0;) sift_down(heap, n, i);
}

/* The best goes behind the heap, which is one shorter then. */
static candidate pop(candidate *heap, uint32_t *n)
{
    candidate best = heap[0];
    heap[0] = heap[--*n];
    heap[*n] = best;
    if (*n) sift_down(heap, *n, 0);
    return best;
}

/* -- the draw ----------------------------------------------------------------------------------------------------- */

/* SplitMix64's output function (Steele, Lea, Flood 2014). */
static uint64_t mix(uint64_t x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

/* In [0, 1), a function of the two. */
static double uniform(uint64_t seed, uint64_t position)
{
    uint64_t bits = mix(mix(seed + 0x9e3779b97f4a7c15u) + (position + 1) * 0x9e3779b97f4a7c15u);
    return (double)(bits >> 11) * 0x1p-53;
}

/* e^x for x <= 0, within 1e-12 of the value; 0 where a float would be. Our own, so that a draw does not depend on the
 * machine's libm, and the artifact needs none: x = whole ln 2 + rest, and the Taylor series for the rest. */
static double exponential(double x)
{
    static const double inverse_factorials[] = {1. / 3628800, 1. / 362880, 1. / 40320, 1. / 5040, 1. / 720, 1. / 120,
                                                1. / 24,      1. / 6,      1. / 2,     1,         1};
    if (!(x > -104)) return 0;
    int whole = (int)(x * 1.4426950408889634 - 0.5);
    double rest = (x - whole * 0x1.62e42fee00000p-1) - whole * 0x1.a39ef35793c76p-33; /* ln 2 in two parts */
    double sum = 0;
    for (int i = 0; i <= 10; i++) sum = sum * rest + inverse_factorials[i];
    uint64_t bits = (uint64_t)(whole + 1023) << 52;
    double scale;
    memcpy(&scale, &bits, sizeof scale);
    return sum * scale;
}

/* exp((logit - best) / temperature); 1 for the best, even when it is infinite. */
static double weight(float logit, float best, float temperature)
{
    return logit == best ? 1 : exponential((logit - best) / temperature);
}

/* The first of candidates [n], from `first` on in steps of `step`, at which the weights pass `target`. */
static int32_t walk(const candidate *first, uint32_t n, ptrdiff_t step, float best, float temperature, double target)
{
    int32_t last = first->token; /* the last one possible, should rounding keep the sum below the target */
    double sum = 0;
    for (const candidate *c = first; n; n--, c += step) {
        double w = weight(c->logit, best, temperature);
        if (w > 0) last = c->token;
        sum += w;
        if (sum > target) return c->token;
    }
    return last;
}

/* Keep those of candidates [n] that min_p leaves, in their order. -> the sum of their weights */
static double keep_likely(candidate *candidates, uint32_t *n, float best, const llmc_sampling *how)
{
    double sum = 0;
    uint32_t n_kept = 0;
    for (uint32_t i = 0; i < *n; i++) {
        double w = weight(candidates[i].logit, best, how->temperature);
        if (w < how->min_p) continue;
        candidates[n_kept++] = candidates[i];
        sum += w;
    }
    *n = n_kept;
    return sum;
}

/* candidates [n] with the best one given; n >= 1. */
static int32_t draw(candidate *candidates, uint32_t n, float best, const llmc_sampling *how, double u)
{
    uint32_t n_heap = n, n_kept = 0, k = how->top_k > 0 && (uint32_t)how->top_k < n ? (uint32_t)how->top_k : n;
    float temperature = how->temperature;
    double sum = 0, kept = 0;
    if (k == n && how->top_p >= 1) {
        sum = keep_likely(candidates, &n, best, how);
        return walk(candidates, n, 1, best, temperature, u * sum);
    }
    make_heap(candidates, n);
    if (k < n) /* the sum of the k best: they end up behind the heap, best last */
        while (n_heap > n - k) sum += weight(pop(candidates, &n_heap).logit, best, temperature);
    else
        for (uint32_t i = 0; i < n; i++) sum += weight(candidates[i].logit, best, temperature);
    while (n_kept < k && kept < how->top_p * sum) {
        if (n_heap == n - n_kept) pop(candidates, &n_heap); /* not behind the heap yet */
        double w = weight(candidates[n - 1 - n_kept].logit, best, temperature);
        if (w < how->min_p) break;
        n_kept++, kept += w;
    }
    return walk(candidates + n - 1, n_kept, -1, best, temperature, u * kept);
}

/* -- the call ----------------------------------------------------------------------------------------------------- */

static llmc_status check_sampling(const llmc_sampling *how)
{
    if (!(how->temperature >= 0) || isinf(how->temperature))
        return fail(LLMC_ERROR_ARGUMENT, "sample", "0 is greedy", "the temperature is %g", (double)how->temperature);
    if (how->top_k < 0) return fail(LLMC_ERROR_ARGUMENT, "sample", "0 keeps all tokens", "top_k is %d", how->top_k);
    if (!(how->top_p > 0) || how->top_p > 1)
        return fail(LLMC_ERROR_ARGUMENT, "sample", "above 0; 1 keeps all tokens", "top_p is %g", (double)how->top_p);
    if (!(how->min_p >= 0) || how->min_p > 1)
        return fail(LLMC_ERROR_ARGUMENT, "sample", "0 keeps all tokens; at most 1", "min_p is %g", (double)how->min_p);
    return LLMC_OK;
}

/* The caller's settings, checked. */
static llmc_status read_sampling(const llmc_sampling *given, llmc_sampling *how)
{
    *how = (llmc_sampling){.size = sizeof *how, .top_p = 1};
    if (given && given->size < sizeof given->size)
        return fail(LLMC_ERROR_ARGUMENT, "sample", "set it to sizeof the struct", "llmc_sampling.size is %u",
                    given->size);
    if (given) memcpy(how, given, given->size < sizeof *how ? given->size : sizeof *how);
    return how->temperature == 0 ? LLMC_OK : check_sampling(how);
}

llmc_status sample_no_number(void)
{
    return fail(LLMC_ERROR_KERNEL, "sample", "look for weights that are not finite, or too large for the model's dtype",
                "no logit of the sequence is a number");
}

static int is_allowed(const llmc_sampling *how, uint32_t token)
{
    return !how->allowed || how->allowed[token / 32] >> token % 32 & 1;
}

/* From logits [n_vocab], settings that were read, and the place that the token will have. */
static llmc_status choose(llmc_model *model, const float *logits, uint32_t position, const llmc_sampling *how,
                          int32_t *out)
{
    llmc_status status = adjust_is_wanted(how) ? adjust_logits(model, how, &logits) : LLMC_OK;
    if (status) return status;
    candidate *candidates = model->candidates, best = {0, -1};
    uint32_t n_vocab = model->plans.header.n_vocab, n = 0, n_allowed = 0;
    for (uint32_t i = 0; i < n_vocab; i++) {
        if (!is_allowed(how, i)) continue;
        n_allowed++;
        if (isnan(logits[i])) continue;
        candidate c = {logits[i], (int32_t)i};
        if (best.token < 0 || is_better(c, best)) best = c;
        if (how->temperature > 0) candidates[n++] = c;
    }
    if (!n_allowed) return fail(LLMC_ERROR_ARGUMENT, "sample", NULL, "no token is allowed");
    if (best.token < 0) return sample_no_number();
    *out = best.token;
    if (how->temperature > 0) *out = draw(candidates, n, best.logit, how, uniform(how->seed, position));
    return LLMC_OK;
}

/* On the host, from all logits. */
static llmc_status sample_here(const llmc_sequence *sequence, const llmc_sampling *how, int32_t *out)
{
    const float *logits; /* [n_vocab] */
    llmc_status status = sequence_logits(sequence, &logits);
    return status ? status : choose(sequence->model, logits, sequence->length, how, out);
}

llmc_status sample_at(llmc_model *model, const float *logits, uint32_t position, const llmc_sampling *given,
                      const uint32_t *allowed, int32_t *out)
{
    llmc_sampling how;
    llmc_status status = read_sampling(given, &how);
    how.allowed = allowed;
    return status ? status : choose(model, logits, position, &how, out);
}

/* -- on a GPU ----------------------------------------------------------------------------------------------------- */

llmc_status sample_choice(const llmc_sequence *sequence, int32_t *out)
{
    int32_t choice = sequence->row ? sequence->model->chosen[sequence->row - 1] : sequence->choice;
    if (choice < 0) return sample_no_number();
    *out = choice;
    return LLMC_OK;
}

llmc_status sample_record(const llmc_sequence *sequence, const llmc_sampling *given, llmc_draw_record *record)
{
    llmc_sampling how;
    llmc_status status = read_sampling(given, &how);
    *record = (llmc_draw_record){
        .seed = how.seed,
        .row = (int32_t)sequence->row - 1,
        .position = (int32_t)sequence->length,
        .temperature = how.temperature,
        .top_p = how.top_p,
        .top_k = how.top_k,
    };
    return status;
}

/* inputs [n_inputs] that are drawn, as many as there are rows for. */
static llmc_status draw_there(llmc_model *model, llmc_sample_input *const *inputs, uint32_t n_inputs)
{
    const plans *plans = &model->plans;
    const plan *sampler = plan_choose(plans->samplers, plans->n_samplers, n_inputs, model->device->step_rows);
    llmc_status status = LLMC_OK;
    for (uint32_t i = 0; i < n_inputs; i++) ((llmc_sequence *)inputs[i]->sequence)->in_call = 1;
    for (uint32_t i = 0; i < n_inputs && !status; i++)
        status = sequence_restore_row((llmc_sequence *)inputs[i]->sequence); /* const: see copy_logits in sequence.c */
    for (uint32_t i = 0; i < n_inputs; i++) ((llmc_sequence *)inputs[i]->sequence)->in_call = 0;
    for (uint32_t i = 0; i < sampler->n_rows && !status; i++) {
        if (i < n_inputs) status = sample_record(inputs[i]->sequence, inputs[i]->how, model->draws + i);
        else model->draws[i] = (llmc_draw_record){.row = -1};
    }
    if (!status) status = model->device->draw(model, sampler);
    for (uint32_t i = 0; i < n_inputs && !status; i++) {
        inputs[i]->token = model->drawn[i];
        if (inputs[i]->token < 0) status = sample_no_number();
    }
    return status;
}

/* -- the calls ---------------------------------------------------------------------------------------------------- */

llmc_status sample_check_how(const llmc_sampling *given)
{
    llmc_sampling how;
    return read_sampling(given, &how);
}

llmc_status sample_check(const llmc_sequence *sequence, const llmc_sampling *given)
{
    const plans *plans = &sequence->model->plans;
    int has_labels = plans->header.format_version == LLMC_FORMAT_LABELS;
    if (plans->is_whole || has_labels)
        return fail(LLMC_ERROR_ARGUMENT, "sample", "logits() has what it makes of the text",
                    "the model %s, and chooses no tokens", has_labels ? "gives texts labels" : "reads texts whole");
    if (!sequence->has_logits)
        return fail(LLMC_ERROR_ARGUMENT, "sample", "feed tokens first", "the sequence has no logits");
    return sample_check_how(given);
}

int sample_is_drawn(const llmc_sampling *given)
{
    llmc_sampling how;
    return !read_sampling(given, &how) && how.temperature > 0;
}

static int is_hosted(const llmc_sampling *how)
{
    return how->allowed || adjust_is_wanted(how) || (how->temperature > 0 && how->min_p > 0);
}

int sample_is_hosted(const llmc_sampling *given)
{
    llmc_sampling how;
    return !read_sampling(given, &how) && is_hosted(&how);
}

static llmc_status check_input(const llmc_model *model, const llmc_sample_input *input, size_t index)
{
    if (!input->sequence || input->sequence->model != model)
        return fail(LLMC_ERROR_ARGUMENT, "sample_many", NULL, "input %zu has %s", index,
                    input->sequence ? "a sequence of another model" : "no sequence");
    return sample_check(input->sequence, input->how);
}

llmc_status sample_many(llmc_model *model, llmc_sample_input *inputs, size_t n_inputs)
{
    if (!model || (!inputs && n_inputs))
        return fail(LLMC_ERROR_ARGUMENT, "sample_many", NULL, "the %s NULL", model ? "inputs are" : "model is");
    llmc_status status = LLMC_OK;
    for (size_t i = 0; i < n_inputs && !status; i++) status = check_input(model, inputs + i, i);
    if (!status) status = model->device->finish(model); /* of a step that runs ahead the choices are not known yet */
    enum { MOST = 64 };
    llmc_sample_input *waiting[MOST];
    uint32_t n_waiting = 0, most = model->plans.max_sampler_rows;
    if (most > model->plans.max_head_rows) most = model->plans.max_head_rows;
    if (most > MOST) most = MOST;
    for (size_t i = 0; i < n_inputs && !status; i++) {
        llmc_sampling how;
        status = read_sampling(inputs[i].how, &how);
        if (status) break;
        if (!model->device->draw || is_hosted(&how)) status = sample_here(inputs[i].sequence, &how, &inputs[i].token);
        else if (how.temperature == 0) status = sample_choice(inputs[i].sequence, &inputs[i].token);
        else waiting[n_waiting++] = inputs + i;
        if (!status && n_waiting && n_waiting == most) {
            status = draw_there(model, waiting, n_waiting);
            n_waiting = 0;
        }
    }
    return status || !n_waiting ? status : draw_there(model, waiting, n_waiting);
}

llmc_status sample(const llmc_sequence *sequence, const llmc_sampling *how, int32_t *out)
{
    if (!sequence || !out)
        return fail(LLMC_ERROR_ARGUMENT, "sample", NULL, "the %s is NULL", sequence ? "result" : "sequence");
    llmc_sample_input input = {sequence, how, -1};
    llmc_status status = sample_many(sequence->model, &input, 1);
    if (!status) *out = input.token;
    return status;
}
