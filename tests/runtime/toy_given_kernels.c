/* toy_given_kernels.c - what the toy needs where rows stand for tokens, and its tower: rows out of the pixels of a tile. */
#include <math.h>
#include <stdint.h>

#include "toy_model.h"

#define SHARE(grid)                                                \
    int32_t first = (grid) * task / n_tasks, end = (grid) * (task + 1) / n_tasks

/* is_given [M], given [M, CHANNELS] -> x [M, CHANNELS], where a row is given */
static int32_t take(int32_t m, const int32_t *is_given, const float *given, float *x, int32_t task, int32_t n_tasks)
{
    SHARE(m);
    for (int32_t row = first; row < end; row++)
        for (int32_t c = 0; c < TOY_CHANNELS && is_given[row]; c++)
            x[row * TOY_CHANNELS + c] = given[row * TOY_CHANNELS + c];
    return 0;
}

/* positions [M], sees [M], x [M, CHANNELS] -> x: where a row sees what is behind it, it and the last row that it sees */
static int32_t peek(int32_t m, const int32_t *positions, const int32_t *sees, float *x, int32_t task, int32_t n_tasks)
{
    SHARE(m);
    for (int32_t row = first; row < end; row++) {
        int32_t last = row + sees[row] - positions[row];
        if (last < row || last >= m) return -1;
        for (int32_t c = 0; c < TOY_CHANNELS && last > row; c++)
            x[row * TOY_CHANNELS + c] = fmodf(x[row * TOY_CHANNELS + c] + x[last * TOY_CHANNELS + c], TOY_PRIME);
    }
    return 0;
}

/* turns [M, 3], x [M, CHANNELS] -> x: and to each channel what the row is turned by in one of three directions */
static int32_t shift(int32_t m, const int32_t *turns, float *x, int32_t task, int32_t n_tasks)
{
    SHARE(m);
    for (int32_t row = first; row < end; row++)
        for (int32_t c = 0; c < TOY_CHANNELS; c++)
            x[row * TOY_CHANNELS + c] = fmodf(x[row * TOY_CHANNELS + c] + (float)turns[3 * row + c % 3], TOY_PRIME);
    return 0;
}

int32_t look(void *, void *, void *, void *, int32_t, int32_t);
int32_t made(void *, void *, int32_t, int32_t);

/* pixels [TILE] -> x [TILE_ROWS, CHANNELS] in the arena; scratch is not read. A first pixel below 0 makes it fail. */
int32_t look(void *pixels_, void *weights_, void *scratch, void *x_, int32_t task, int32_t n_tasks)
{
    const float *pixels = pixels_, *weights = weights_;
    float *x = x_;
    SHARE(TOY_TILE_ROWS);
    (void)scratch;
    if (pixels[0] < 0) return -1;
    for (int32_t i = first * TOY_CHANNELS; i < end * TOY_CHANNELS; i++)
        x[i] = fmodf(pixels[i % TOY_TILE] * weights[i % TOY_CHANNELS] + (float)i, TOY_PRIME);
    return 0;
}

/* x [TILE_ROWS, CHANNELS] -> rows [TILE_ROWS, CHANNELS], one unit of work: the rows from the last to the first */
int32_t made(void *x_, void *rows_, int32_t task, int32_t n_tasks)
{
    const float *x = x_;
    float *rows = rows_;
    SHARE(1);
    for (int32_t row = 0; row < TOY_TILE_ROWS && first < end; row++)
        for (int32_t c = 0; c < TOY_CHANNELS; c++)
            rows[row * TOY_CHANNELS + c] = x[(TOY_TILE_ROWS - 1 - row) * TOY_CHANNELS + c];
    return 0;
}

#define GIVEN(m)                                                                                                      \
    int32_t take_##m(void *, void *, void *, int32_t, int32_t);                                                       \
    int32_t take_##m(void *a, void *b, void *c, int32_t task, int32_t n) { return take(m, a, b, c, task, n); }        \
    int32_t peek_##m(void *, void *, void *, int32_t, int32_t);                                                       \
    int32_t peek_##m(void *a, void *b, void *c, int32_t task, int32_t n) { return peek(m, a, b, c, task, n); }        \
    int32_t shift_##m(void *, void *, int32_t, int32_t);                                                               \
    int32_t shift_##m(void *a, void *b, int32_t task, int32_t n) { return shift(m, a, b, task, n); }

GIVEN(2)
GIVEN(4)
GIVEN(16)
