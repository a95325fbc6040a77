/* rows.c - rows of numbers that stand for tokens, in place of their embeddings: the caller's, or what the tower makes of
 * a tile of a picture.
 *
 * A row has a number as a token has, the next one that no row of this model has had. So whatever compares texts by their
 * tokens, forks of sequences and prefixes that are found again, tells rows apart too; and what a sequence has read of a
 * row that is given back stays as it is. */
#include <stdlib.h>
#include <string.h>

#include "runtime.h"

/* Rows that came in one call. */
struct given_rows {
    int32_t first;   /* the number of the first */
    uint32_t n;
    uint32_t width; /* columns of the lines that they lie in, one behind the other; 0: in none */
    float *numbers; /* [n, n_row] */
};

uint32_t rows_first(const llmc_model *model)
{
    return model->plans.n_tokens * model->plans.n_types;
}

/* The index of the rows among which `token` is, or of those behind where it would be. */
static uint32_t place_of(const given *given, int32_t token)
{
    uint32_t low = 0, high = given->n_kept;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        const given_rows *rows = given->kept + middle;
        if ((int64_t)rows->first + rows->n <= token) low = middle + 1;
        else high = middle;
    }
    return low;
}

/* The rows among which `token` is; NULL: none that are kept. */
static const given_rows *rows_of(const llmc_model *model, int32_t token)
{
    const given *given = &model->given;
    uint32_t at = place_of(given, token);
    return at == given->n_kept || token < given->kept[at].first ? NULL : given->kept + at;
}

const float *rows_find(const llmc_model *model, int32_t token)
{
    const given_rows *rows = rows_of(model, token);
    return rows ? rows->numbers + (uint64_t)(token - rows->first) * model->plans.n_row : NULL;
}

void rows_find_in_grid(const llmc_model *model, int32_t token, uint32_t *place, uint32_t *width)
{
    const given_rows *rows = rows_of(model, token);
    *width = rows ? rows->width : 0;
    *place = *width ? (uint32_t)(token - rows->first) : 0;
}

int rows_is_one(const llmc_model *model, int32_t token)
{
    return token >= (int64_t)rows_first(model) && token < (int64_t)rows_first(model) + model->given.n_ever;
}

uint32_t rows_place(const llmc_model *model, int32_t token)
{
    const uint32_t n = model->plans.picture_rows;
    return n && token >= (int64_t)rows_first(model) ? ((uint32_t)token - rows_first(model)) % n : 0;
}

uint32_t rows_together(const llmc_model *model, int32_t token)
{
    const uint32_t n = model->plans.picture_rows;
    return n && token >= (int64_t)rows_first(model) ? n - rows_place(model, token) : 1;
}

llmc_status rows_check_order(const llmc_model *model, const int32_t *tokens, size_t n)
{
    for (size_t i = 0; i < n;) {
        const uint32_t n_here = rows_together(model, tokens[i]);
        uint32_t found = 1;
        while (found < n_here && i + found < n && tokens[i + found] == tokens[i] + (int32_t)found) found++;
        if (found < n_here || rows_place(model, tokens[i]))
            return fail(LLMC_ERROR_ARGUMENT, model->file.path, "give the rows of a picture in one input, in their order",
                        "row %u of a picture of %u stands for token %zu of an input without the others",
                        rows_place(model, tokens[i]), model->plans.picture_rows, i);
        i += n_here;
    }
    return LLMC_OK;
}

llmc_status rows_check(const llmc_model *model, int32_t token)
{
    const uint32_t n_tokens = rows_first(model);
    if (token >= 0 && ((uint32_t)token < n_tokens || rows_find(model, token))) return LLMC_OK;
    if (rows_is_one(model, token))
        return fail(LLMC_ERROR_ARGUMENT, model->file.path, "keep rows until the texts that have them are read",
                    "token %d stands for a row that was given back", token);
    return fail(LLMC_ERROR_ARGUMENT, model->file.path, NULL, "token %d is out of range: the vocabulary has %u", token,
                n_tokens);
}

/* -- keeping and giving back --------------------------------------------------------------------------------------- */

/* Room for the numbers of n rows, kept as the last ones; NULL: there is no memory. */
static given_rows *keep(llmc_model *model, uint32_t n)
{
    given *given = &model->given;
    if (given->n_kept == given->n_room) {
        uint32_t n_room = given->n_room ? 2 * given->n_room : 16;
        given_rows *kept = calloc(n_room, sizeof *kept);
        if (!kept) return NULL;
        if (given->n_kept) memcpy(kept, given->kept, given->n_kept * sizeof *kept);
        free(given->kept);
        given->kept = kept;
        given->n_room = n_room;
    }
    given_rows *rows = given->kept + given->n_kept;
    *rows = (given_rows){.first = (int32_t)(rows_first(model) + given->n_ever), .n = n};
    rows->numbers = calloc(n, model->plans.n_row * sizeof *rows->numbers);
    if (!rows->numbers) return NULL;
    given->n_kept++;
    given->n_ever += n;
    given->n_rows += n;
    return rows;
}

/* Rows [n] that lie in no grid, width being 0, or in one. function: who asks, for messages. */
static llmc_status new_rows(llmc_model *model, const char *function, const float *numbers, size_t n, uint32_t width,
                            int32_t *first)
{
    if (first) *first = -1;
    if (!model || !numbers || !first)
        return fail(LLMC_ERROR_ARGUMENT, function, NULL, "the %s", !model ? "model is NULL"
                    : !numbers ? "rows are NULL" : "result is NULL");
    if (!model->plans.n_row)
        return fail(LLMC_ERROR_ARGUMENT, model->file.path, "compile it with --images",
                    "the artifact takes no rows in the place of tokens");
    if (model->plans.picture_rows && n != model->plans.picture_rows)
        return fail(LLMC_ERROR_ARGUMENT, model->file.path, NULL,
                    "the rows of a picture see each other here, and there are %u of them, not %zu",
                    model->plans.picture_rows, n);
    if (n < 1 || n > (uint32_t)INT32_MAX - rows_first(model) - model->given.n_ever)
        return fail(LLMC_ERROR_ARGUMENT, function, n ? "open the model anew" : NULL, "%zu rows cannot be kept", n);
    given_rows *rows = keep(model, (uint32_t)n);
    if (!rows)
        return fail(LLMC_ERROR_MEMORY, model->file.path, "give rows back", "there is no memory for %zu rows", n);
    memcpy(rows->numbers, numbers, n * model->plans.n_row * sizeof *numbers);
    rows->width = width;
    *first = rows->first;
    return LLMC_OK;
}

llmc_status rows_new(llmc_model *model, const float *numbers, size_t n, int32_t *first)
{
    return new_rows(model, "rows_new", numbers, n, 0, first);
}

llmc_status rows_in_grid(llmc_model *model, const float *numbers, uint32_t height, uint32_t width, int32_t *first)
{
    return new_rows(model, "rows_in_grid", numbers, (size_t)height * width, width, first);
}

/* The index of the rows that begin with this number; fails where none do. */
static llmc_status find(const llmc_model *model, const char *function, int32_t first, uint32_t *at)
{
    if (!model) return fail(LLMC_ERROR_ARGUMENT, function, NULL, "the model is NULL");
    *at = place_of(&model->given, first);
    if (*at < model->given.n_kept && model->given.kept[*at].first == first) return LLMC_OK;
    return fail(LLMC_ERROR_ARGUMENT, function, "rows are named by the first that rows_new or image_rows gave",
                "no rows are kept from %d on", first);
}

llmc_status rows_free(llmc_model *model, int32_t first)
{
    uint32_t at;
    llmc_status status = find(model, "rows_free", first, &at);
    if (status) return status;
    given *given = &model->given;
    given_rows *rows = given->kept + at;
    free(rows->numbers);
    given->n_rows -= rows->n;
    given->n_kept--;
    memmove(rows, rows + 1, (given->n_kept - at) * sizeof *rows);
    return LLMC_OK;
}

llmc_status rows_numbers(const llmc_model *model, int32_t first, const float **out, size_t *n)
{
    uint32_t at;
    if (!out || !n) return fail(LLMC_ERROR_ARGUMENT, "rows_numbers", NULL, "the result is NULL");
    *out = NULL;
    *n = 0;
    llmc_status status = find(model, "rows_numbers", first, &at);
    if (status) return status;
    *out = model->given.kept[at].numbers;
    *n = model->given.kept[at].n;
    return LLMC_OK;
}

void rows_close(given *given)
{
    for (uint32_t i = 0; i < given->n_kept; i++) free(given->kept[i].numbers);
    free(given->kept);
    *given = (struct given){0};
}

/* -- pictures ------------------------------------------------------------------------------------------------------ */

llmc_status image_rows(llmc_model *model, const float *pixels, int32_t *first, size_t *n)
{
    if (first) *first = -1;
    if (n) *n = 0;
    if (!model || !pixels || !first || !n)
        return fail(LLMC_ERROR_ARGUMENT, "image_rows", NULL, "the %s", !model ? "model is NULL"
                    : !pixels ? "pixels are NULL" : "result is NULL");
    const plan *tower = model->plans.tower;
    if (!tower)
        return fail(LLMC_ERROR_ARGUMENT, model->file.path, "compile it with --images", "the artifact takes no pictures");
    if (model->plans.grids.patch)
        return fail(LLMC_ERROR_ARGUMENT, model->file.path, "call picture_rows",
                    "the artifact takes patches of pictures of any size, and no tiles");
    memcpy(model->pixels, pixels, plans_pixels(&model->plans) * sizeof *pixels);
    llmc_status status = model->device->finish(model);
    if (!status) status = model->device->run(model, tower, NULL);
    if (!status) status = rows_new(model, model->made, tower->n_rows, first);
    if (!status) *n = tower->n_rows;
    return status;
}
