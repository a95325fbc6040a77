/* toy_kernels.c - a model whose logits are exact and depend on every token before, in order.
 *
 * Two layers; hidden states are whole numbers below PRIME kept in floats. A layer stores its input in the paged cache
 * and hashes all inputs so far: y = x + sum_j 31^(pos - j) input_j, everything modulo PRIME. tests/runtime/
 * toy_artifact.py says the same in Python, toy_oracle.h in C. Kernels read what attention kernels of real models read
 * (positions, page table, pages) and write only what a task owns. */
#include <math.h>
#include <stdint.h>

#include "toy_model.h"

#define SHARE(grid)                                                \
    int32_t first = (grid) * task / n_tasks, end = (grid) * (task + 1) / n_tasks

static float below_prime(float x)
{
    return fmodf(x, TOY_PRIME);
}

/* tokens i32 [M], table f32 [VOCAB, CHANNELS] -> x f32 [M, CHANNELS] */
static int32_t embed(int32_t m, const int32_t *tokens, const float *table, float *x, int32_t task, int32_t n_tasks)
{
    SHARE(m);
    for (int32_t row = first; row < end; row++) {
        if (tokens[row] == TOY_POISON) return -1;
        for (int32_t c = 0; c < TOY_CHANNELS; c++) x[row * TOY_CHANNELS + c] = table[tokens[row] * TOY_CHANNELS + c];
    }
    return 0;
}

/* The cached input [CHANNELS] of a layer (kv: the layer's part of page 0) for one position. */
static float *cached(float *kv, const int32_t *pages, int32_t position)
{
    int64_t page = pages[position / TOY_PAGE_TOKENS];
    return kv + page * (TOY_PAGE_BYTES / 4) + position % TOY_PAGE_TOKENS * TOY_CHANNELS;
}

/* x [M, CHANNELS], positions [M], page_table [M, PAGES] -> kv */
static int32_t store(int32_t m, const float *x, const int32_t *positions, const int32_t *page_table, float *kv,
                     int32_t task, int32_t n_tasks)
{
    SHARE(m);
    for (int32_t row = first; row < end; row++) {
        if (positions[row] < 0) continue;
        float *slot = cached(kv, page_table + row * TOY_PAGES, positions[row]);
        for (int32_t c = 0; c < TOY_CHANNELS; c++) slot[c] = x[row * TOY_CHANNELS + c];
    }
    return 0;
}

/* x, positions, page_table, kv, scratch [CHANNELS] -> y [M, CHANNELS] */
static int32_t attend(int32_t m, const float *x, const int32_t *positions, const int32_t *page_table, float *kv,
                      float *scratch, float *y, int32_t task, int32_t n_tasks)
{
    SHARE(m);
    for (int32_t row = first; row < end; row++) {
        const int32_t *pages = page_table + row * TOY_PAGES;
        for (int32_t c = 0; c < TOY_CHANNELS; c++) scratch[c] = 0;
        for (int32_t j = 0; j <= positions[row]; j++)
            for (int32_t c = 0; c < TOY_CHANNELS; c++)
                scratch[c] = below_prime(scratch[c] * 31 + cached(kv, pages, j)[c]);
        for (int32_t c = 0; c < TOY_CHANNELS; c++)
            y[row * TOY_CHANNELS + c] = below_prime(x[row * TOY_CHANNELS + c] + scratch[c]);
    }
    return 0;
}

/* y [M, CHANNELS] -> x [M, CHANNELS], one unit of work: y rotated by a channel, plus 1 */
static int32_t turn(int32_t m, const float *y, float *x, int32_t task, int32_t n_tasks)
{
    SHARE(1);
    for (int32_t row = 0; row < m && first < end; row++)
        for (int32_t c = 0; c < TOY_CHANNELS; c++)
            x[row * TOY_CHANNELS + c] = below_prime(y[row * TOY_CHANNELS + (c + 1) % TOY_CHANNELS] + 1);
    return 0;
}

/* hidden [max M, CHANNELS], rows [R] -> h [R, CHANNELS] */
static int32_t pick(int32_t r, const float *hidden, const int32_t *rows, float *h, int32_t task, int32_t n_tasks)
{
    SHARE(r);
    for (int32_t row = first; row < end; row++)
        for (int32_t c = 0; c < TOY_CHANNELS; c++) h[row * TOY_CHANNELS + c] = hidden[rows[row] * TOY_CHANNELS + c];
    return 0;
}

/* h [R, CHANNELS], table [VOCAB, CHANNELS] -> logits [R, VOCAB] */
static int32_t project(int32_t r, const float *h, const float *table, float *logits, int32_t task, int32_t n_tasks)
{
    SHARE(TOY_VOCAB);
    for (int32_t row = 0; row < r; row++)
        for (int32_t v = first; v < end; v++) {
            float sum = 0;
            for (int32_t c = 0; c < TOY_CHANNELS; c++) sum += h[row * TOY_CHANNELS + c] * table[v * TOY_CHANNELS + c];
            logits[row * TOY_VOCAB + v] = below_prime(sum);
        }
    return 0;
}

#define BODY(m)                                                                                                       \
    int32_t embed_##m(void *, void *, void *, int32_t, int32_t);                                                      \
    int32_t store_##m(void *, void *, void *, void *, int32_t, int32_t);                                              \
    int32_t attend_##m(void *, void *, void *, void *, void *, void *, int32_t, int32_t);                             \
    int32_t turn_##m(void *, void *, int32_t, int32_t);                                                               \
    int32_t embed_##m(void *a, void *b, void *c, int32_t task, int32_t n) { return embed(m, a, b, c, task, n); }      \
    int32_t store_##m(void *a, void *b, void *c, void *d, int32_t task, int32_t n)                                    \
    {                                                                                                                 \
        return store(m, a, b, c, d, task, n);                                                                         \
    }                                                                                                                 \
    int32_t attend_##m(void *a, void *b, void *c, void *d, void *e, void *f, int32_t task, int32_t n)                 \
    {                                                                                                                 \
        return attend(m, a, b, c, d, e, f, task, n);                                                                  \
    }                                                                                                                 \
    int32_t turn_##m(void *a, void *b, int32_t task, int32_t n) { return turn(m, a, b, task, n); }

#define HEAD(r)                                                                                                       \
    int32_t pick_##r(void *, void *, void *, int32_t, int32_t);                                                       \
    int32_t project_##r(void *, void *, void *, int32_t, int32_t);                                                    \
    int32_t pick_##r(void *a, void *b, void *c, int32_t task, int32_t n) { return pick(r, a, b, c, task, n); }        \
    int32_t project_##r(void *a, void *b, void *c, int32_t task, int32_t n) { return project(r, a, b, c, task, n); }

BODY(2)
BODY(4)
BODY(16)
BODY(32)
HEAD(1)
HEAD(4)
