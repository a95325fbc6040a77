/* host scenarios ARTIFACT N_THREADS SEED N_ACTIONS - random lives of several sequences, each checked at every step.
 *
 * Sequences are born, fed alone and together, advanced, forked, cut, saved and restored, freed; some steps must be refused and change
 * nothing. Every logit is compared with the oracle's, but not after every step: one that runs ahead would be waited
 * for. With TOY_SOUND in the environment no kernel fails. */
#include <string.h>

#include "host.h"
#include "toy_oracle.h"

enum { MAX_TEXTS = 6 };

typedef struct text {
    llmc_sequence *sequence; /* NULL: free place */
    int32_t tokens[TOY_CONTEXT];
    int n;
    int has_logits;
} text;

static llmc_model *model;
static text texts[MAX_TEXTS];
static uint64_t state;
static int n_refused, is_gpu;
static char saved[4096];

static int pick(int n)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (int)((state >> 33) % (uint64_t)n);
}

static uint64_t free_tokens(void)
{
    llmc_info info = {.size = sizeof info};
    REQUIRE(!api->info(model, &info));
    return info.kv_tokens_free;
}

static void check_text(const text *text)
{
    float expected[TOY_VOCAB];
    const float *logits;
    REQUIRE(api->sequence_length(text->sequence) == text->n);
    REQUIRE((api->logits(text->sequence, &logits) == LLMC_OK) == text->has_logits);
    if (!text->has_logits) return;
    toy_oracle(text->tokens, text->n, expected);
    REQUIRE(memcmp(logits, expected, sizeof expected) == 0);
}

/* Feed a random set of sequences; some inputs are too long, poisoned, or out of range. */
static void feed_some(void)
{
    llmc_step_input inputs[MAX_TEXTS];
    text *fed[MAX_TEXTS];
    int32_t tokens[MAX_TEXTS][2 * TOY_CONTEXT];
    static float all[MAX_TEXTS][2 * TOY_CONTEXT * TOY_VOCAB];
    uint64_t before = free_tokens();
    int n_inputs = 0, sound = 1, poisoned = 0;
    for (int i = 0; i < MAX_TEXTS; i++) {
        int room = TOY_CONTEXT - texts[i].n;
        if (!texts[i].sequence || pick(3) == 0) continue;
        int n = pick(20) == 0 ? room + 1 : pick(4) == 0 ? 1 + pick(room + 1) : 1 + pick(3);
        for (int t = 0; t < n; t++) tokens[n_inputs][t] = pick(TOY_POISON);
        if (pick(40) == 0 && !getenv("TOY_SOUND")) tokens[n_inputs][pick(n)] = TOY_POISON, poisoned = 1;
        if (pick(40) == 0) tokens[n_inputs][pick(n)] = pick(2) ? -1 : TOY_VOCAB, sound = 0;
        if (n > room) sound = 0;
        fed[n_inputs] = texts + i;
        float *wanted = pick(3) ? NULL : all[n_inputs];
        inputs[n_inputs] = (llmc_step_input){texts[i].sequence, tokens[n_inputs], (size_t)n, wanted};
        n_inputs++;
    }
    int alone = n_inputs == 1 && !inputs[0].logits;
    llmc_status status = alone ? api->feed(inputs[0].sequence, tokens[0], inputs[0].n_tokens)
                               : api->step(model, inputs, (size_t)n_inputs);
    if (status) {
        n_refused++;
        if (!sound) REQUIRE(status == LLMC_ERROR_ARGUMENT);
        else REQUIRE(status == LLMC_ERROR_MEMORY || (poisoned && status == LLMC_ERROR_KERNEL));
        for (int i = 0; i < n_inputs && status == LLMC_ERROR_KERNEL; i++) fed[i]->has_logits = 0;
        REQUIRE(free_tokens() <= before); /* less when a shared page was copied before the cache was full */
        return;
    }
    REQUIRE(sound && !poisoned);
    for (int i = 0; i < n_inputs; i++) {
        text *text = fed[i];
        for (size_t t = 0; t < inputs[i].n_tokens; t++) {
            float expected[TOY_VOCAB];
            text->tokens[text->n++] = tokens[i][t];
            if (!inputs[i].logits) continue;
            toy_oracle(text->tokens, text->n, expected);
            REQUIRE(memcmp(inputs[i].logits + t * TOY_VOCAB, expected, sizeof expected) == 0);
        }
        text->has_logits = 1;
    }
}

/* The token that must follow: the first of the most likely, where the host chooses with a penalty too, or on a GPU what
 * tests/runtime/toy_cuda_kernels.c draws. */
static int32_t next_token(const text *text, const llmc_sampling *how)
{
    float logits[TOY_VOCAB];
    int32_t best = 0, token = -1;
    toy_oracle(text->tokens, text->n, logits);
    for (int32_t v = 0; how && v < TOY_VOCAB; v++)
        for (int32_t t = 0, n_met = 0; t < text->n; t++)
            if (text->tokens[t] == v && !n_met++) logits[v] -= how->presence_penalty;
    for (int32_t v = 1; v < TOY_VOCAB; v++)
        if (logits[v] > logits[best]) best = v;
    if (!how || how->temperature == 0) return best;
    if (is_gpu)
        return (int32_t)((how->seed + 3 * (uint64_t)text->n + 5 * (uint64_t)how->top_k +
                          (uint64_t)(how->temperature * 7) + (uint64_t)(how->top_p * 11) + (uint64_t)best) % TOY_VOCAB);
    REQUIRE(!api->sample(text->sequence, how, &token));
    return token;
}

/* Advance a random set of sequences in a random order, each in a way of its own. */
static void advance_some(void)
{
    llmc_advance_input inputs[MAX_TEXTS];
    llmc_sampling hows[MAX_TEXTS];
    text *moved[MAX_TEXTS];
    int32_t expected[MAX_TEXTS];
    int n = 0, first = pick(MAX_TEXTS), turn = pick(2) ? 1 : MAX_TEXTS - 1, is_full = 0;
    for (int k = 0; k < MAX_TEXTS; k++) {
        text *text = texts + (first + k * turn) % MAX_TEXTS;
        if (!text->sequence || !text->has_logits || pick(5) == 0) continue;
        hows[n] = (llmc_sampling){
            .size = sizeof hows[n], .temperature = 1.0f + (float)pick(9), .top_k = pick(9),
            .top_p = 0.25f * (float)(1 + pick(4)), .seed = state,
        };
        if (pick(8) == 0)
            hows[n] = (llmc_sampling){
                .size = sizeof hows[n], .presence_penalty = 2.5f, .tokens = text->tokens, .n_tokens = (uint32_t)text->n,
            };
        const llmc_sampling *how = pick(3) ? NULL : hows + n;
        int32_t token = next_token(text, how);
        if (token == TOY_POISON) continue;
        is_full |= text->n == TOY_CONTEXT;
        expected[n] = token;
        moved[n] = text;
        inputs[n++] = (llmc_advance_input){text->sequence, how, -1};
    }
    llmc_status status = api->advance(model, inputs, (size_t)n);
    if (status) n_refused++;
    if (status) REQUIRE(status == (is_full ? LLMC_ERROR_ARGUMENT : LLMC_ERROR_MEMORY));
    for (int i = 0; i < n && !status; i++) {
        REQUIRE(inputs[i].token == expected[i]);
        moved[i]->tokens[moved[i]->n++] = expected[i];
    }
}

/* What goes on from a file is what was saved, whatever the place was before; or there is no room for it. */
static void save_and_restore(const char *path, const text *from, text *to)
{
    const text known = *from;
    const int32_t *tokens;
    llmc_sequence *back = NULL;
    REQUIRE(!api->sequence_save(from->sequence, path, NULL, 0));
    if (to->sequence) api->sequence_free(to->sequence);
    to->sequence = NULL;
    llmc_status status = api->sequence_restore(model, path, &back);
    if (status) {
        REQUIRE(status == LLMC_ERROR_MEMORY && !back);
        n_refused++;
        return;
    }
    REQUIRE(!api->sequence_tokens(back, &tokens) && memcmp(tokens, known.tokens, (size_t)known.n * sizeof *tokens) == 0);
    *to = known;
    to->sequence = back;
}

static void act(void)
{
    text *text = texts + pick(MAX_TEXTS), *other = texts + pick(MAX_TEXTS);
    int action = pick(12);
    if (!text->sequence) {
        *text = (struct text){0};
        if (action < 6 || !other->sequence) {
            REQUIRE(!api->sequence_new(model, &text->sequence));
        } else {
            *text = *other;
            REQUIRE(!api->sequence_fork(other->sequence, &text->sequence));
        }
    } else if (action == 0 || text->n > TOY_CONTEXT - 4) {
        api->sequence_free(text->sequence);
        text->sequence = NULL;
    } else if (action == 1) {
        int n = pick(text->n + 1);
        if (n < text->n) text->has_logits = 0;
        text->n = n;
        REQUIRE(!api->sequence_truncate(text->sequence, n));
        REQUIRE(api->sequence_truncate(text->sequence, n + 1) == LLMC_ERROR_ARGUMENT);
    } else if (action == 2 && text->has_logits) {
        float temperature = 1.0f + (float)pick(300), top_p = 0.05f + 0.19f * (float)pick(6);
        llmc_sampling how = {
            .size = sizeof how, .temperature = temperature, .top_k = pick(TOY_VOCAB + 5), .top_p = top_p, .seed = state,
        };
        int32_t token = -1;
        REQUIRE(!api->sample(text->sequence, &how, &token) && token >= 0 && token < TOY_VOCAB);
    } else if (action == 3 && pick(2)) {
        save_and_restore(saved, text, other);
    } else if (action < 8) {
        advance_some();
    } else {
        feed_some();
    }
}

int host_scenarios(int argc, char **argv)
{
    if (argc != 4) return 2;
    llmc_options options = {.size = sizeof options, .n_threads = atoi(argv[1]), .kv_tokens = 4 * TOY_CONTEXT};
    state = strtoull(argv[2], NULL, 10);
    snprintf(saved, sizeof saved, "%s.%s-%s.seq", argv[0], argv[1], argv[2]);
    REQUIRE(!model_open(argv[0], &options, &model));
    static llmc_event events[64]; /* too few: what finds no room is counted */
    llmc_profile profile = {sizeof profile, 64, 0, 0, events};
    if (state % 2) REQUIRE(!api->profile(model, &profile));
    llmc_info info = {.size = sizeof info};
    REQUIRE(!api->info(model, &info));
    is_gpu = strcmp(info.device, "CPU") != 0;
    uint64_t n_free = free_tokens();
    for (int i = atoi(argv[3]); i > 0; i--) {
        act();
        int is_watched = pick(3) == 0;
        for (int k = 0; k < MAX_TEXTS && is_watched; k++)
            if (texts[k].sequence) check_text(texts + k);
    }
    for (int k = 0; k < MAX_TEXTS; k++) api->sequence_free(texts[k].sequence);
    REQUIRE(free_tokens() == n_free);
    api->close(model);
    printf("ok, %d steps refused\n", n_refused);
    return 0;
}
