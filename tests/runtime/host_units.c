/* host units - parts of the runtime alone: hashing, CPU features, the choice of plans, sampling. */
#define _GNU_SOURCE
#include <math.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>

#include "host.h"

/* -- sha256 ------------------------------------------------------------------------------------------------------- */

static void test_known_digests(void)
{
    static const uint8_t of_nothing[4] = {0xe3, 0xb0, 0xc4, 0x42}, of_abc[4] = {0xba, 0x78, 0x16, 0xbf};
    uint8_t digest[32];
    sha256((const uint8_t *)"", 0, digest);
    REQUIRE(memcmp(digest, of_nothing, 4) == 0);
    sha256_portable((const uint8_t *)"abc", 3, digest);
    REQUIRE(memcmp(digest, of_abc, 4) == 0);
}

static void test_both_ways_of_hashing_agree(void)
{
    uint8_t bytes[300], fast[32], portable[32];
    for (size_t i = 0; i < sizeof bytes; i++) bytes[i] = (uint8_t)(i * 37 + 11);
    for (size_t n = 0; n <= sizeof bytes; n++) {
        sha256(bytes + sizeof bytes - n, n, fast);
        sha256_portable(bytes + sizeof bytes - n, n, portable);
        REQUIRE(memcmp(fast, portable, 32) == 0);
    }
}

static void test_a_hash_of_pieces_is_that_of_the_whole(void)
{
    uint8_t bytes[300], whole[32], pieces[32];
    for (size_t i = 0; i < sizeof bytes; i++) bytes[i] = (uint8_t)(i * 37 + 11);
    sha256(bytes, sizeof bytes, whole);
    for (size_t step = 1; step < 200; step++) {
        sha256_state state;
        sha256_begin(&state);
        for (size_t done = 0, n; done < sizeof bytes; done += n) {
            n = sizeof bytes - done < step ? sizeof bytes - done : step;
            sha256_add(&state, bytes + done, n);
            sha256_add(&state, NULL, 0);
        }
        sha256_end(&state, pieces);
        REQUIRE(memcmp(whole, pieces, 32) == 0);
    }
}

/* -- cpu ---------------------------------------------------------------------------------------------------------- */

static void test_missing_features_are_named(void)
{
    const uint32_t v3 = (1u << 6) - 1, bf16 = LLMC_CPU_AVX512_BF16;
    REQUIRE(cpu_check(v3, v3 | bf16, "m.so") == LLMC_OK);
    REQUIRE(cpu_check(v3 | bf16, v3, "m.so") == LLMC_ERROR_TARGET);
    REQUIRE(strcmp(api->last_error(), "this artifact needs the CPU feature avx512_bf16, which this machine lacks\n"
                                      "  at: m.so\n  hint: compile with --target cpu:x86-64-v3") == 0);
    REQUIRE(cpu_check(LLMC_CPU_AVX2 | LLMC_CPU_FMA | 1u << 31, 0, "m.so") == LLMC_ERROR_TARGET);
    REQUIRE(strstr(api->last_error(), "features avx2, fma, unknown bit 31, which"));
    REQUIRE(cpu_check(LLMC_CPU_AMX_TILE | LLMC_CPU_AMX_BF16, (1u << 13) - 1, "m.so") == LLMC_ERROR_TARGET);
    REQUIRE(strcmp(api->last_error(),
                   "this artifact needs the CPU features amx_tile, amx_bf16, which this machine lacks\n"
                   "  at: m.so\n  hint: compile with --target cpu:x86-64-v4+bf16") == 0);
    REQUIRE(strcmp(cpu_level((1u << 16) - 1), "x86-64-v4+amx") == 0);
    REQUIRE(cpu_count() >= 1);
}

/* Linux gives tiles to all threads of a process or to none, so one whose signal stack has no room for them is enough. */
static void test_tiles_are_asked_for_and_a_refusal_is_said(void)
{
    static char stack[1 << 13];
    stack_t small = {.ss_sp = stack, .ss_size = sizeof stack}, none = {.ss_flags = SS_DISABLE};
    REQUIRE(cpu_allow(LLMC_CPU_AVX2, "m.so") == LLMC_OK);
    REQUIRE(sigaltstack(&small, NULL) == 0);
    REQUIRE(cpu_allow(LLMC_CPU_AMX_TILE, "m.so") == LLMC_ERROR_TARGET);
    REQUIRE(strstr(api->last_error(), "the system does not let this process use AMX, which this artifact needs: "));
    REQUIRE(sigaltstack(&none, NULL) == 0);
    if (!(cpu_features() & LLMC_CPU_AMX_TILE)) return;
    REQUIRE(strstr(api->last_error(), "a thread's stack for signals is too small"));
    REQUIRE(cpu_allow(LLMC_CPU_AMX_TILE, "m.so") == LLMC_OK);
}

/* -- plan_choose -------------------------------------------------------------------------------------------------- */

static uint32_t chosen(uint64_t n_rows)
{
    static const plan bodies[] = {
        {1, 0, NULL}, {2, 0, NULL}, {4, 0, NULL}, {8, 0, NULL}, {32, 0, NULL}, {128, 0, NULL},
    };
    return plan_choose(bodies, 6, n_rows, 16)->n_rows;
}

static void test_plans_fit_the_rows(void)
{
    REQUIRE(chosen(1) == 1 && chosen(2) == 2 && chosen(8) == 8 && chosen(128) == 128);
    REQUIRE(chosen(1000) == 128);          /* more than the largest */
    REQUIRE(chosen(3) == 4);               /* a row of padding is cheaper than another step */
    REQUIRE(chosen(31) == 32 && chosen(33) == 32);
    REQUIRE(chosen(40) == 32);             /* 32 + 8 is cheaper than 88 rows of padding */
    REQUIRE(chosen(120) == 128);
    static const plan chunks[] = {{64, 0, NULL}, {256, 0, NULL}, {512, 0, NULL}, {1024, 0, NULL}};
    REQUIRE(plan_choose(chunks, 4, 700, 192)->n_rows == 1024 && plan_choose(chunks, 4, 700, 4)->n_rows == 512);
    static const plan wide[] = {{16, 0, NULL}};
    REQUIRE(plan_choose(wide, 1, 1, 16)->n_rows == 16 && plan_choose(wide, 1, 40, 192)->n_rows == 16);
}

static uint32_t state = 1;

static uint32_t pick(uint32_t n)
{
    state = state * 1664525u + 1013904223u;
    return (state >> 8) % n;
}

/* -- sampling: a sequence made by hand, logits and nothing else --------------------------------------------------- */

enum { N_VOCAB = 8 };

static llmc_model model;
static float logits[N_VOCAB];
static candidate candidates[N_VOCAB];
static float adjusted[N_VOCAB];
static uint32_t counts[N_VOCAB];
static llmc_sequence sequence = {.model = &model, .has_logits = 1, .logits = logits};

static void set_logits(const float values[N_VOCAB])
{
    memcpy(logits, values, sizeof logits);
    model.plans.header.n_vocab = N_VOCAB;
    model.candidates = candidates;
    model.adjusted = adjusted;
    model.counts = counts;
    model.device = &cpu_device;
}

static const uint32_t *allowed; /* NULL: all */
static float min_p;

static int32_t drawn(float temperature, int32_t top_k, float top_p, uint64_t seed)
{
    llmc_sampling how = {
        .size = sizeof how, .temperature = temperature, .top_k = top_k, .top_p = top_p, .seed = seed,
        .allowed = allowed, .min_p = min_p,
    };
    int32_t token = -1;
    REQUIRE(!api->sample(&sequence, &how, &token));
    REQUIRE(token >= 0 && token < N_VOCAB);
    return token;
}

static void test_greedy_takes_the_first_maximum(void)
{
    set_logits((float[N_VOCAB]){1, 3, 2, 3, NAN, -INFINITY, 3, 0});
    REQUIRE(drawn(0, 0, 1, 0) == 1);
    set_logits((float[N_VOCAB]){NAN, -5, NAN, INFINITY, INFINITY, 1, 2, 3});
    REQUIRE(drawn(0, 0, 1, 0) == 3);
    set_logits((float[N_VOCAB]){NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN});
    int32_t token;
    REQUIRE(api->sample(&sequence, NULL, &token) == LLMC_ERROR_KERNEL);
}

static void test_infinite_logits_are_drawn_alone(void)
{
    set_logits((float[N_VOCAB]){NAN, -5, NAN, INFINITY, -INFINITY, 1, 2, 3});
    for (uint64_t seed = 0; seed < 50; seed++) {
        REQUIRE(drawn(1, 0, 1, seed) == 3);
        REQUIRE(drawn(1, 3, 0.9f, seed) == 3);
    }
    set_logits((float[N_VOCAB]){-INFINITY, -INFINITY, NAN, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY});
    REQUIRE(drawn(1, 0, 1, 3) != 2);
}

/* Counts over many seeds against softmax, restricted to the tokens that may be drawn. */
static void check_frequencies(float temperature, int32_t top_k, float top_p, const double expected[N_VOCAB])
{
    enum { N_DRAWS = 20000 };
    int counts[N_VOCAB] = {0};
    for (uint64_t seed = 0; seed < N_DRAWS; seed++) counts[drawn(temperature, top_k, top_p, seed)]++;
    for (int i = 0; i < N_VOCAB; i++) {
        double deviation = sqrt(N_DRAWS * expected[i] * (1 - expected[i]));
        REQUIRE(fabs(counts[i] - N_DRAWS * expected[i]) <= 4.5 * deviation);
    }
}

static void test_draws_follow_the_probabilities(void)
{
    const float p[N_VOCAB] = {0.05f, 0.4f, 0.1f, 0.2f, 0.02f, 0.03f, 0.05f, 0.15f};
    float values[N_VOCAB];
    for (int i = 0; i < N_VOCAB; i++) values[i] = 2 * logf(p[i]) + 40; /* so temperature 2 gives p */
    set_logits(values);
    check_frequencies(2, 0, 1, (double[N_VOCAB]){0.05, 0.4, 0.1, 0.2, 0.02, 0.03, 0.05, 0.15});
    check_frequencies(2, 3, 1, (double[N_VOCAB]){0, 0.4 / 0.75, 0, 0.2 / 0.75, 0, 0, 0, 0.15 / 0.75});
    check_frequencies(2, 0, 0.7f, (double[N_VOCAB]){0, 0.4 / 0.75, 0, 0.2 / 0.75, 0, 0, 0, 0.15 / 0.75});
    /* p counts within the k best */
    check_frequencies(2, 4, 0.7f, (double[N_VOCAB]){0, 0.4 / 0.6, 0, 0.2 / 0.6, 0, 0, 0, 0});
    check_frequencies(2, 0, 1e-9f, (double[N_VOCAB]){0, 1, 0, 0, 0, 0, 0, 0});
    check_frequencies(1e-30f, 0, 1, (double[N_VOCAB]){0, 1, 0, 0, 0, 0, 0, 0});
}

static void test_the_position_decides_too(void)
{
    int n_different = 0;
    set_logits((float[N_VOCAB]){0});
    for (sequence.length = 1; sequence.length < 200; sequence.length++)
        n_different += drawn(1, 0, 1, 7) != drawn(1, 0, 1, 8);
    REQUIRE(n_different > 150);
    sequence.length = 0;
}

#define SIZED .size = sizeof(llmc_sampling)
#define GOOD SIZED, .temperature = 1, .top_p = 1

static void test_bad_settings_are_refused(void)
{
    const llmc_sampling bad[] = {
        {SIZED, .temperature = -1}, {SIZED, .temperature = NAN}, {SIZED, .temperature = INFINITY}, {GOOD, .top_k = -1},
        {SIZED, .temperature = 1}, {SIZED, .temperature = 1, .top_p = 1.5f}, {SIZED, .temperature = 1, .top_p = NAN},
        {.size = 0, .temperature = 1, .top_p = 1},
        {GOOD, .min_p = -0.1f}, {GOOD, .min_p = 1.1f}, {GOOD, .min_p = NAN},
        {GOOD, .repetition_penalty = -1}, {GOOD, .repetition_penalty = NAN}, {GOOD, .repetition_penalty = INFINITY},
        {GOOD, .frequency_penalty = NAN}, {GOOD, .presence_penalty = -INFINITY},
        {GOOD, .presence_penalty = 1, .n_tokens = 1}, {GOOD, .presence_penalty = 1, .n_prompt = 1},
        {GOOD, .presence_penalty = 1, .n_tokens = 1, .tokens = &(int32_t){N_VOCAB}},
        {GOOD, .presence_penalty = 1, .n_tokens = 1, .tokens = &(int32_t){-1}},
        {GOOD, .n_biases = 1}, {GOOD, .n_biases = 1, .biases = &(llmc_bias){N_VOCAB, 1}},
        {GOOD, .n_biases = 1, .biases = &(llmc_bias){0, NAN}},
    };
    int32_t token;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        REQUIRE(api->sample(&sequence, bad + i, &token) == LLMC_ERROR_ARGUMENT);
    /* callers that know size and temperature only, and all but the penalties */
    const llmc_sampling old = {.size = 8, .temperature = 0.5f, .top_k = -9, .top_p = -9, .n_biases = 1};
    const llmc_sampling older = {.size = offsetof(llmc_sampling, biases), .top_p = 1, .n_biases = 1, .min_p = 2};
    REQUIRE(!api->sample(&sequence, &old, &token) && !api->sample(&sequence, &older, &token));
}

static void test_tokens_that_are_not_allowed_are_not_chosen(void)
{
    const float p[N_VOCAB] = {0.05f, 0.4f, 0.1f, 0.2f, 0.02f, 0.03f, 0.05f, 0.15f};
    const uint32_t some = 1 << 0 | 1 << 2 | 1 << 7, one = ~0xffu | 1 << 4, none = ~0xffu;
    float values[N_VOCAB];
    for (int i = 0; i < N_VOCAB; i++) values[i] = logf(p[i]);
    set_logits(values);
    allowed = &some;
    REQUIRE(drawn(0, 0, 1, 0) == 7);
    check_frequencies(1, 0, 1, (double[N_VOCAB]){0.05 / 0.3, 0, 0.1 / 0.3, 0, 0, 0, 0, 0.15 / 0.3});
    check_frequencies(1, 2, 1, (double[N_VOCAB]){0, 0, 0.4, 0, 0, 0, 0, 0.6}); /* the best of those that are allowed */
    allowed = &one;
    for (uint64_t seed = 0; seed < 50; seed++) REQUIRE(drawn(1, 0, 0.5f, seed) == 4);
    llmc_sampling how = {GOOD, .allowed = &none};
    int32_t token;
    REQUIRE(api->sample(&sequence, &how, &token) == LLMC_ERROR_ARGUMENT);
    how.size = offsetof(llmc_sampling, allowed); /* a caller that does not know of it */
    REQUIRE(!api->sample(&sequence, &how, &token));
    allowed = NULL;
}

static void test_what_is_much_less_likely_than_the_best_is_not_drawn(void)
{
    const float p[N_VOCAB] = {0.05f, 0.4f, 0.1f, 0.2f, 0.02f, 0.03f, 0.05f, 0.15f};
    float values[N_VOCAB];
    for (int i = 0; i < N_VOCAB; i++) values[i] = logf(p[i]);
    set_logits(values);
    min_p = 0.3f; /* of 0.4: 0.12 */
    check_frequencies(1, 0, 1, (double[N_VOCAB]){0, 0.4 / 0.75, 0, 0.2 / 0.75, 0, 0, 0, 0.15 / 0.75});
    check_frequencies(1, 5, 1, (double[N_VOCAB]){0, 0.4 / 0.75, 0, 0.2 / 0.75, 0, 0, 0, 0.15 / 0.75});
    check_frequencies(1, 0, 0.99f, (double[N_VOCAB]){0, 0.4 / 0.75, 0, 0.2 / 0.75, 0, 0, 0, 0.15 / 0.75});
    check_frequencies(1, 0, 0.5f, (double[N_VOCAB]){0, 0.4 / 0.6, 0, 0.2 / 0.6, 0, 0, 0, 0}); /* of all, not the rest */
    min_p = 1;
    check_frequencies(1, 0, 1, (double[N_VOCAB]){0, 1, 0, 0, 0, 0, 0, 0});
    REQUIRE(drawn(0, 0, 1, 0) == 1);
    min_p = 0;
}

/* Of random settings: the token that is most likely when each logit is changed as the header says, one by one. */
static void test_penalties_and_biases_are_those_of_the_header(void)
{
    enum { N_TEXT = 12 };
    for (int round = 0; round < 500; round++) {
        float values[N_VOCAB], best = -INFINITY;
        int32_t text[N_TEXT], token = -1, wanted = -1;
        llmc_bias biases[2];
        for (int i = 0; i < 2; i++) biases[i] = (llmc_bias){(int32_t)pick(N_VOCAB), (float)pick(9) - 4};
        for (int i = 0; i < N_VOCAB; i++) values[i] = (float)pick(4000) / 500 - 4;
        for (int i = 0; i < N_TEXT; i++) text[i] = (int32_t)pick(N_VOCAB);
        llmc_sampling how = {
            .size = sizeof how, .tokens = text, .n_tokens = pick(N_TEXT + 1), .biases = biases, .n_biases = pick(3),
            .repetition_penalty = (float)pick(4) / 2, .frequency_penalty = (float)pick(5) / 2 - 1,
            .presence_penalty = (float)pick(5) / 2 - 1,
        };
        how.n_prompt = pick(how.n_tokens + 1);
        set_logits(values);
        for (int32_t i = 0; i < N_VOCAB; i++) {
            uint32_t n_met = 0, n_generated = 0;
            float logit = values[i], repetition = how.repetition_penalty != 0 ? how.repetition_penalty : 1;
            for (uint32_t j = 0; j < how.n_biases; j++) logit += biases[j].token == i ? biases[j].value : 0;
            for (uint32_t j = 0; j < how.n_tokens; j++) n_met += text[j] == i;
            for (uint32_t j = how.n_prompt; j < how.n_tokens; j++) n_generated += text[j] == i;
            if (n_met) logit = logit > 0 ? logit / repetition : logit * repetition;
            logit -= how.frequency_penalty * (float)n_generated;
            if (n_generated) logit -= how.presence_penalty;
            if (logit > best) best = logit, wanted = i;
        }
        REQUIRE(!api->sample(&sequence, &how, &token) && token == wanted);
        REQUIRE(memcmp(logits, values, sizeof logits) == 0);
    }
}

/* -- weights ------------------------------------------------------------------------------------------------------- */

enum { SECTION_BYTES = 100000, N_ARGUMENTS = 40 };

/* Random arguments: what each names is where it says after packing, and nothing is packed that none is near to. */
static void test_arguments_find_their_weights_packed(void)
{
    static uint8_t section[SECTION_BYTES];
    for (size_t i = 0; i < sizeof section; i++) section[i] = (uint8_t)(i * 31 + i / 256);
    for (int round = 0; round < 200; round++) {
        argument arguments[N_ARGUMENTS], before[N_ARGUMENTS];
        plans plans = {.header = {.n_arguments = pick(N_ARGUMENTS + 1)}, .arguments = arguments};
        for (uint32_t i = 0; i < plans.header.n_arguments; i++) {
            uint64_t offset = pick(SECTION_BYTES / 64) * 64, left = SECTION_BYTES - offset;
            uint32_t space = pick(4) ? LLMC_SPACE_WEIGHTS : LLMC_SPACE_ARENA;
            before[i] = arguments[i] = (argument){
                .space = space, .offset = offset, .n_bytes = pick(5) ? pick(left < 3000 ? (uint32_t)left + 1 : 3000) : 0,
            };
        }
        REQUIRE(!weights_find(&plans, SECTION_BYTES, "m.so"));
        char *packed = malloc(plans.weight_bytes + 1);
        REQUIRE(packed && plans.weight_bytes <= SECTION_BYTES);
        for (uint64_t done = 0, n; done < plans.weight_bytes; done += n) {
            n = 1 + pick(20000);
            if (n > plans.weight_bytes - done) n = plans.weight_bytes - done;
            weights_copy(&plans, section, done, n, packed + done);
        }
        weights_pack(&plans);
        for (uint32_t i = 0; i < plans.header.n_arguments; i++) {
            const argument *a = arguments + i;
            if (a->space != LLMC_SPACE_WEIGHTS) REQUIRE(a->offset == before[i].offset);
            else REQUIRE(a->offset + a->n_bytes <= plans.weight_bytes && a->offset % 64 == 0);
            if (a->space != LLMC_SPACE_WEIGHTS || !a->n_bytes) continue;
            REQUIRE(a->offset % 256 == before[i].offset % 256);
            REQUIRE(memcmp(packed + a->offset, section + before[i].offset, a->n_bytes) == 0);
        }
        free(packed);
        plans_free(&(struct plans){.extents = plans.extents});
    }
}

int host_units(int argc, char **argv)
{
    (void)argv;
    if (argc) return 2;
    test_known_digests();
    test_both_ways_of_hashing_agree();
    test_a_hash_of_pieces_is_that_of_the_whole();
    test_missing_features_are_named();
    test_tiles_are_asked_for_and_a_refusal_is_said();
    test_plans_fit_the_rows();
    test_greedy_takes_the_first_maximum();
    test_infinite_logits_are_drawn_alone();
    test_draws_follow_the_probabilities();
    test_the_position_decides_too();
    test_bad_settings_are_refused();
    test_tokens_that_are_not_allowed_are_not_chosen();
    test_what_is_much_less_likely_than_the_best_is_not_drawn();
    test_penalties_and_biases_are_those_of_the_header();
    test_arguments_find_their_weights_packed();
    puts("ok");
    return 0;
}
