/* turns.c - what queries and keys are turned by where positions have three directions: time, lines and columns.
 *
 * A token of a text has one number in all three. The rows of a picture that begins at b have b, b + line and b + column,
 * and what is behind it goes on behind the furthest of them: so with pictures a text is shorter, in these numbers, than it
 * has tokens, and without any they are its tokens' places. Where a text goes on behind each of its tokens is all that a
 * sequence keeps of it (`behind`): where a picture begins, its rows say, which are in it in their order. */
#include "runtime.h"

/* A row's picture: which of its rows it is, and of how many columns; a token's, and a row's of no picture: 0 of 0. */
typedef struct in_picture {
    uint32_t place, width;
} in_picture;

static in_picture picture_of(const llmc_model *model, int32_t token)
{
    in_picture found = {0, 0};
    if ((uint32_t)token >= rows_first(model)) rows_find_in_grid(model, token, &found.place, &found.width);
    return found;
}

llmc_status turns_check(const llmc_sequence *sequence, const int32_t *tokens, size_t n)
{
    const llmc_model *model = sequence->model;
    for (size_t i = 0; i < n; i++) {
        const uint32_t place = picture_of(model, tokens[i]).place;
        const int32_t before = i ? tokens[i - 1] : sequence->length ? sequence->tokens[sequence->length - 1] : -1;
        if (place && before != tokens[i] - 1)
            return fail(LLMC_ERROR_ARGUMENT, model->file.path, "give a picture's rows in their order, from the first one on",
                        "row %u of a picture stands for token %zu of an input, and not behind the row before it", place, i);
    }
    return LLMC_OK;
}

void turns_fill(llmc_model *model, uint32_t row, llmc_sequence *sequence, int32_t token, uint32_t position)
{
    const in_picture picture = picture_of(model, token);
    const uint32_t line = picture.width ? picture.place / picture.width : 0;
    const uint32_t column = picture.width ? picture.place % picture.width : 0;
    const int32_t begin = position > picture.place ? sequence->behind[position - picture.place - 1] : 0;
    int32_t *turns = model->turns + 3 * (uint64_t)row; /* [3] */
    turns[0] = begin;
    turns[1] = begin + (int32_t)line;
    turns[2] = begin + (int32_t)column;
    /* The furthest row so far: in lines behind the first one it may be the last of the line before. */
    const uint32_t wide = line ? picture.width - 1 : column;
    sequence->behind[position] = begin + (int32_t)(line > wide ? line : wide) + 1;
}

void turns_of_text(llmc_sequence *sequence)
{
    for (uint32_t i = 0; sequence->behind && i < sequence->length; i++) sequence->behind[i] = (int32_t)i + 1;
}
