/* toy_cuda_kernels.c - the toy's kernels as a GPU's, for the fake driver: each runs its grid block by block.
 *
 * Choosing is a kernel too. The toy's sampler does not sample: its token is a function of everything that it is given,
 * so that whatever does not reach it shows. */
#include <stdio.h>

#include "../emulator/core/buffers.h"
#include "format.h"
#include "toy_kernels.c"
#include "toy_state_kernels.c"

/* row [VOCAB] */
static int32_t best_of(const float *row)
{
    int32_t best = -1;
    for (int32_t v = 0; v < TOY_VOCAB; v++)
        if (!isnan(row[v]) && (best < 0 || row[v] > row[best])) best = v;
    return best;
}

/* The token of a task, to chosen, next and told, i32 [n_tasks] each. */
static int32_t put(int32_t token, void **to, int32_t task)
{
    int32_t *const chosen = to[0], *const next = to[1], *const told = to[2];
    chosen[task] = told[task] = token;
    next[task] = token < 0 ? 0 : token;
    return 0;
}

/* logits [R, VOCAB] -> tokens [R] */
static int32_t choose(const float *logits, void **to, int32_t task)
{
    return put(best_of(logits + (int64_t)task * TOY_VOCAB), to, task);
}

/* logits [max R, VOCAB], draws [S] -> tokens [S]; tests/runtime/toy_cuda.py says the same */
static int32_t draw(const float *logits, const llmc_draw_record *draws, void **to, int32_t task)
{
    const llmc_draw_record *d = draws + task;
    const int32_t best = d->row < 0 ? -1 : best_of(logits + (int64_t)d->row * TOY_VOCAB);
    if (best < 0) return put(-1, to, task);
    uint64_t sum = d->seed + 3 * (uint64_t)d->position + 5 * (uint64_t)d->top_k + (uint64_t)(d->temperature * 7) +
                   (uint64_t)(d->top_p * 11) + (uint64_t)best;
    return put((int32_t)(sum % TOY_VOCAB), to, task);
}

/* x [M, CHANNELS], adapters i32 [M]: a row's elements grow by 1 + its adapter's number */
static int32_t adapt(float *x, const int32_t *adapters, int32_t row)
{
    for (int32_t c = 0; c < TOY_CHANNELS; c++) x[row * TOY_CHANNELS + c] += (float)(adapters[row] + 1);
    return 0;
}

#define RUN(name, call)                                                                      \
    static int run_##name(int grid, void **a, char *error, size_t error_bytes)               \
    {                                                                                        \
        for (int32_t block = 0; block < grid; block++)                                       \
            if ((call) != 0) return snprintf(error, error_bytes, "block %d", block), 1;      \
        return 0;                                                                            \
    }

#define RUN_BODY(m)                                                        \
    RUN(embed_##m, embed(m, a[0], a[1], a[2], block, grid))                \
    RUN(store_##m, store(m, a[0], a[1], a[2], a[3], block, grid))          \
    RUN(attend_##m, attend(m, a[0], a[1], a[2], a[3], a[4], a[5], block, grid)) \
    RUN(recur_##m, recur(m, a[0], a[1], a[2], a[3], a[4], block, grid))    \
    RUN(turn_##m, turn(m, a[0], a[1], block, grid))                        \
    RUN(adapt_##m, adapt(a[0], a[1], block))
#define RUN_HEAD(r)                                              \
    RUN(pick_##r, pick(r, a[0], a[1], a[2], block, grid))        \
    RUN(project_##r, project(r, a[0], a[1], a[2], block, grid))  \
    RUN(choose_##r, choose(a[0], a + 1, block))
#define RUN_SAMPLER(s) RUN(draw_##s, draw(a[0], a[1], a + 2, block))

RUN_BODY(2)
RUN_BODY(4)
RUN_BODY(16)
RUN_BODY(64)
RUN_BODY(80)
RUN_HEAD(1)
RUN_HEAD(4)
RUN_SAMPLER(1)
RUN_SAMPLER(4)

#define ENTRY(name, n_pointers, shared_bytes) {#name, n_pointers, 32, shared_bytes, 1, run_##name}
#define BODY_ENTRIES(m) \
    ENTRY(embed_##m, 3, 0), ENTRY(store_##m, 4, 0), ENTRY(attend_##m, 6, 65536), ENTRY(turn_##m, 2, 1024), \
        ENTRY(recur_##m, 5, 0), ENTRY(adapt_##m, 2, 0)
#define HEAD_ENTRIES(r) ENTRY(pick_##r, 3, 0), ENTRY(project_##r, 3, 0), ENTRY(choose_##r, 4, 0)

const emulated_kernel *emulated_kernels(int *count)
{
    static const emulated_kernel kernels[] = {
        BODY_ENTRIES(2),   BODY_ENTRIES(4),  BODY_ENTRIES(16),      HEAD_ENTRIES(1),
        HEAD_ENTRIES(4),   ENTRY(draw_1, 5, 0), ENTRY(draw_4, 5, 0), BODY_ENTRIES(64), BODY_ENTRIES(80),
    };
    *count = sizeof kernels / sizeof *kernels;
    return kernels;
}
