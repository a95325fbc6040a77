/* grid.c - pictures of any size: where each patch of one is, which others it attends, and the tower's run over them.
 *
 * Patches come as processors order them: those of a row of embeddings, merge by merge, one behind the other, and the rows
 * line by line. Where the tower has windows they are given to it window by window, so that those which attend each other
 * are side by side, as the tokens of a text are; what it makes of them is put back in order. */
#include <math.h>
#include <string.h>

#include "runtime.h"

/* A picture of rows [height, width], of merge by merge patches each, and the walk through them in the tower's order. */
typedef struct rows_walk {
    uint32_t height, width;
    uint32_t window;            /* rows along a window's side */
    uint32_t top, left;         /* of this window */
    uint32_t line, column;      /* of this row */
} rows_walk;

static uint32_t least(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

/* window: 0: the picture is one. */
static rows_walk begin_walk(uint32_t height, uint32_t width, uint32_t window)
{
    return (rows_walk){height, width, window ? window : height > width ? height : width, 0, 0, 0, 0};
}

static int begins_window(const rows_walk *at)
{
    return at->line == at->top && at->column == at->left;
}

/* Rows of the window that this row is in. */
static uint32_t window_rows(const rows_walk *at)
{
    return least(at->window, at->height - at->top) * least(at->window, at->width - at->left);
}

static void step_walk(rows_walk *at)
{
    if (++at->column < least(at->left + at->window, at->width)) return;
    at->column = at->left;
    if (++at->line < least(at->top + at->window, at->height)) return;
    at->left += at->window;
    if (at->left >= at->width) at->left = 0, at->top += at->window;
    at->line = at->top, at->column = at->left;
}

/* -- what the tower is told ---------------------------------------------------------------------------------------- */

/* The parts of LLMC_SPACE_PLACES; NULL: there is no such part. */
typedef struct places {
    int32_t *positions, *page_table;               /* [M], [M, n_pages] */
    int32_t *window_positions, *window_page_table; /* likewise */
    int32_t *line, *column;                        /* [M] */
    int32_t *taps;                                 /* [M, n_taps] */
    float *shares;                                 /* [M, n_taps] */
    uint64_t n_patches, n_pages;
} places;

static places cut_places(const llmc_model *model, uint64_t n_patches)
{
    const llmc_plan_grids *grids = &model->plans.grids;
    const uint64_t tokens = model->plans.header.page_tokens, n_pages = (n_patches + tokens - 1) / tokens;
    int32_t *at = model->places;
    places cut = {.n_patches = n_patches, .n_pages = n_pages};
    cut.positions = at;
    cut.page_table = at += n_patches;
    at += n_patches * n_pages;
    if (grids->window) {
        cut.window_positions = at;
        cut.window_page_table = at += n_patches;
        at += n_patches * n_pages;
    }
    cut.line = at;
    cut.column = at += n_patches;
    cut.taps = at += n_patches;
    cut.shares = (float *)(void *)(at + n_patches * grids->n_taps);
    return cut;
}

/* Patch m is the `position`-th of those that attend each other, whose pages are the `first`-th and those behind it. */
static void put(int32_t *positions, int32_t *page_table, uint64_t n_pages, uint64_t m, uint32_t position, uint32_t first)
{
    positions[m] = (int32_t)position;
    for (uint64_t page = 0; page < n_pages; page++) page_table[m * n_pages + page] = (int32_t)(first + page);
}

/* Entries of a table of positions [side] at `index` of `size`, and what each counts: as torch's interpolate has it, which
 * works in float32. n: 2 (linear) or 4 (cubic). */
static void stretch(const llmc_plan_grids *grids, uint32_t index, uint32_t size, uint32_t n, int32_t *taps, float *shares)
{
    const float side = (float)grids->side, a = -0.75f;
    const float at = grids->taps_aligned ? (float)index * (side - 1) / (float)(size > 1 ? size - 1 : 1)
                                         : ((float)index + 0.5f) * side / (float)size - 0.5f;
    const float below = floorf(at);
    for (uint32_t i = 0; i < n; i++) {
        const int32_t offset = (int32_t)i - (int32_t)(n / 2 - 1), tap = (int32_t)below + offset;
        const float d = fabsf(at - below - (float)offset);
        const float near = ((a + 2) * d - (a + 3)) * d * d + 1, far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a;
        taps[i] = tap < 0 ? 0 : tap >= (int32_t)grids->side ? (int32_t)grids->side - 1 : tap;
        shares[i] = n == 2 ? (d < 1 ? 1 - d : 0) : d <= 1 ? near : far;
    }
}

static void put_taps(const llmc_plan_grids *grids, const places *places, uint64_t m, const rows_walk *picture)
{
    const uint32_t n = grids->n_taps == 4 ? 2 : 4;
    int32_t lines[4], columns[4];
    float of_line[4], of_column[4];
    if (!grids->n_taps) return;
    stretch(grids, (uint32_t)places->line[m], picture->height * grids->merge, n, lines, of_line);
    stretch(grids, (uint32_t)places->column[m], picture->width * grids->merge, n, columns, of_column);
    for (uint32_t i = 0; i < n * n; i++) {
        places->taps[m * n * n + i] = lines[i / n] * (int32_t)grids->side + columns[i % n];
        places->shares[m * n * n + i] = of_line[i / n] * of_column[i % n];
    }
}

/* A row that pads the plan: it attends nothing. */
static void put_padding(const llmc_plan_grids *grids, const places *places, uint64_t m)
{
    put(places->positions, places->page_table, places->n_pages, m, 0, 0);
    places->positions[m] = -1;
    if (grids->window) {
        put(places->window_positions, places->window_page_table, places->n_pages, m, 0, 0);
        places->window_positions[m] = -1;
    }
    places->line[m] = places->column[m] = 0;
    for (uint64_t i = m * grids->n_taps; i < (m + 1) * grids->n_taps; i++) places->taps[i] = 0, places->shares[i] = 0;
}

/* Put the patches [height * width, merge * merge, patch] into the tower's order, and say where they are. */
static llmc_status lay_out(llmc_model *model, const float *patches, uint32_t height, uint32_t width, uint64_t n_patches)
{
    const llmc_plan_grids *grids = &model->plans.grids;
    const uint32_t merge = grids->merge, a_row = merge * merge, tokens = model->plans.header.page_tokens;
    const uint64_t row_numbers = (uint64_t)a_row * grids->patch;
    const places places = cut_places(model, n_patches);
    uint32_t next_page = 0, first_page = 0, position = 0;
    uint64_t m = 0;
    rows_walk at = begin_walk(height, width, grids->window);
    for (uint32_t row = 0; row < height * width; row++, step_walk(&at)) {
        if (begins_window(&at)) {
            first_page = next_page, position = 0;
            next_page += (window_rows(&at) * a_row + tokens - 1) / tokens;
            if (next_page > grids->pages)
                return fail(LLMC_ERROR_ARGUMENT, model->file.path, "give it another shape",
                            "a picture of %u by %u rows has more windows than there is room for", height, width);
        }
        memcpy(model->pixels + row * row_numbers, patches + ((uint64_t)at.line * width + at.column) * row_numbers,
               row_numbers * sizeof *patches);
        for (uint32_t i = 0; i < a_row; i++, m++, position++) {
            put(places.positions, places.page_table, places.n_pages, m, (uint32_t)m, 0);
            if (grids->window)
                put(places.window_positions, places.window_page_table, places.n_pages, m, position, first_page);
            places.line[m] = (int32_t)(at.line * merge + i / merge);
            places.column[m] = (int32_t)(at.column * merge + i % merge);
            put_taps(grids, &places, m, &at);
        }
    }
    memset(model->pixels + m * grids->patch, 0, (n_patches - m) * grids->patch * sizeof *patches);
    for (; m < n_patches; m++) put_padding(grids, &places, m);
    return LLMC_OK;
}

/* -- the run ------------------------------------------------------------------------------------------------------- */

static llmc_status check(llmc_model *model, const float *patches, uint32_t height, uint32_t width, const int32_t *first,
                         const size_t *n)
{
    if (!model || !patches || !first || !n)
        return fail(LLMC_ERROR_ARGUMENT, "picture_rows", NULL, "the %s", !model ? "model is NULL"
                    : !patches ? "patches are NULL" : "result is NULL");
    const llmc_plan_grids *grids = &model->plans.grids;
    if (!model->plans.tower || !grids->patch)
        return fail(LLMC_ERROR_ARGUMENT, model->file.path, model->plans.tower ? "call image_rows" : "compile it with --images",
                    "the artifact takes no pictures%s", model->plans.tower ? " of any size" : "");
    if (!height || !width || height % grids->merge || width % grids->merge)
        return fail(LLMC_ERROR_ARGUMENT, model->file.path, NULL, "a picture of %u by %u patches has no rows of %u by %u",
                    height, width, grids->merge, grids->merge);
    const uint32_t most = model->plans.tower[model->plans.n_towers - 1].n_rows;
    const uint64_t n_rows = (uint64_t)(height / grids->merge) * (width / grids->merge);
    if (n_rows > most)
        return fail(LLMC_ERROR_ARGUMENT, model->file.path, "make it smaller, or compile with a larger --max-image-rows",
                    "a picture of %llu rows is larger than the artifact takes, %u", (unsigned long long)n_rows, most);
    return LLMC_OK;
}

llmc_status picture_rows(llmc_model *model, const float *patches, uint32_t height, uint32_t width, int32_t *first, size_t *n)
{
    if (first) *first = -1;
    if (n) *n = 0;
    llmc_status status = check(model, patches, height, width, first, n);
    if (status) return status;
    const uint32_t lines = height / model->plans.grids.merge, columns = width / model->plans.grids.merge;
    const uint64_t n_rows = (uint64_t)lines * columns, n_row = model->plans.n_row;
    const plan *tower = plan_holding(model->plans.tower, model->plans.n_towers, n_rows);
    status = model->device->finish(model);
    if (!status) status = lay_out(model, patches, lines, columns, plans_patches(&model->plans, tower->n_rows));
    if (!status) status = model->device->run(model, tower, NULL);
    if (!status) status = rows_in_grid(model, model->made, lines, columns, first);
    if (status) return status;
    float *kept = (float *)(uintptr_t)rows_find(model, *first); /* which are nobody else's yet */
    rows_walk at = begin_walk(lines, columns, model->plans.grids.window);
    for (uint64_t row = 0; row < n_rows; row++, step_walk(&at))
        memcpy(kept + ((uint64_t)at.line * columns + at.column) * n_row, model->made + row * n_row, n_row * sizeof *kept);
    *n = n_rows;
    return LLMC_OK;
}
