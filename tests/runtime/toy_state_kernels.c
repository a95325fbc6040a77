/* toy_state_kernels.c - the toy's layer with a state in the place of pages: the same numbers.
 *
 * What `attend` sums up over all tokens before is kept in the sequence's slot, and each row goes on from there. */
#include <math.h>
#include <stdint.h>

#include "toy_model.h"

/* x [M, CHANNELS], positions [M], slots [M], states (slot 0's) -> y [M, CHANNELS], one unit of work */
static int32_t recur(int32_t m, const float *x, const int32_t *positions, const int32_t *slots, float *states, float *y,
                     int32_t task, int32_t n_tasks)
{
    int32_t first = task / n_tasks, end = (task + 1) / n_tasks;
    for (int32_t row = 0; row < m && first < end; row++)
        for (int32_t c = 0; c < TOY_CHANNELS; c++) {
            float *past = states + (int64_t)slots[row] * TOY_CHANNELS + c;
            y[row * TOY_CHANNELS + c] = 0;
            if (positions[row] < 0) continue;
            *past = fmodf((positions[row] ? *past * 31 : 0) + x[row * TOY_CHANNELS + c], TOY_PRIME);
            y[row * TOY_CHANNELS + c] = fmodf(x[row * TOY_CHANNELS + c] + *past, TOY_PRIME);
        }
    return 0;
}

#define STATE(m)                                                                                                      \
    int32_t recur_##m(void *, void *, void *, void *, void *, int32_t, int32_t);                                      \
    int32_t recur_##m(void *a, void *b, void *c, void *d, void *e, int32_t task, int32_t n)                           \
    {                                                                                                                 \
        return recur(m, a, b, c, d, e, task, n);                                                                      \
    }

STATE(2)
STATE(4)
STATE(16)
