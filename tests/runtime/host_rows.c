/* host rows ARTIFACT SEED N_ACTIONS - random lives of rows that stand for tokens: kept, made of pictures, looked at, read by
 * a sequence, given back. What stands where is compared at every turn. The artifact's kernels may do nothing with them. */
#include <string.h>

#include "host.h"
#include "toy_model.h"

enum { MAX_KEPT = 40, MOST = 5 };

static uint64_t state;

static int pick(int n)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (int)((state >> 33) % (uint64_t)n);
}

typedef struct kept {
    int32_t first;
    size_t n;
    float numbers[MOST * TOY_CHANNELS];
} kept;

/* Keep some rows, or have the tower make them: of what it makes nothing is known before. */
static void keep(llmc_model *model, const llmc_info *info, kept *rows, int32_t next)
{
    float pixels[TOY_TILE + 8] = {0};
    const float *numbers;
    if (pick(4) == 0) {
        REQUIRE(!api->image_rows(model, pixels, &rows->first, &rows->n));
        REQUIRE(rows->n == (size_t)info->n_tile_rows && rows->n <= MOST);
        REQUIRE(!api->rows_numbers(model, rows->first, &numbers, &rows->n));
        memcpy(rows->numbers, numbers, rows->n * TOY_CHANNELS * sizeof *numbers);
    } else {
        rows->n = info->picture_rows ? info->picture_rows : 1 + (size_t)pick(MOST);
        for (size_t i = 0; i < rows->n * TOY_CHANNELS; i++) rows->numbers[i] = (float)pick(1000);
        REQUIRE(!api->rows_new(model, rows->numbers, rows->n, &rows->first));
    }
    REQUIRE(rows->first == next);
}

static void look(llmc_model *model, const kept *rows)
{
    const float *numbers;
    size_t n;
    REQUIRE(!api->rows_numbers(model, rows->first, &numbers, &n) && n == rows->n);
    REQUIRE(memcmp(numbers, rows->numbers, n * TOY_CHANNELS * sizeof *numbers) == 0);
    for (size_t i = 0; i < n; i++) REQUIRE(rows_find(model, rows->first + (int32_t)i) == numbers + i * TOY_CHANNELS);
    if (n > 1) REQUIRE(api->rows_numbers(model, rows->first + 1, &numbers, &n) == LLMC_ERROR_ARGUMENT);
}

/* Read tokens and rows, all that one call has kept at once, then cut the sequence anywhere: what is cut of a picture whose
 * rows see each other goes whole. */
static void read_some(llmc_sequence *sequence, const kept *all, size_t n_kept, const llmc_info *info)
{
    int32_t text[TOY_CONTEXT];
    int n = 0, n_wanted = 1 + pick(TOY_CONTEXT), place = 0;
    while (n < n_wanted) {
        const kept *rows = all + pick((int)n_kept);
        if (pick(2) && n + (int)rows->n <= TOY_CONTEXT)
            for (int i = 0; i < (int)rows->n; i++) text[n++] = rows->first + i;
        else text[n++] = pick(TOY_POISON);
    }
    REQUIRE(!api->sequence_truncate(sequence, 0) && !api->feed(sequence, text, (size_t)n));
    int cut = pick(n);
    if (info->picture_rows && text[cut] >= info->n_tokens)
        place = (text[cut] - info->n_tokens) % (int)info->picture_rows;
    REQUIRE(!api->sequence_truncate(sequence, cut) && api->sequence_length(sequence) == cut - place);
}

int host_rows(int argc, char **argv)
{
    if (argc != 3) return 2;
    static kept all[MAX_KEPT];
    const llmc_options options = {.size = sizeof options, .n_threads = 2};
    llmc_model *model;
    llmc_sequence *sequence;
    llmc_info info = {.size = sizeof info};
    state = strtoull(argv[1], NULL, 10);
    REQUIRE(!model_open(argv[0], &options, &model) && !api->sequence_new(model, &sequence));
    REQUIRE(!api->info(model, &info) && info.n_row == TOY_CHANNELS);
    int32_t next = info.n_tokens;
    size_t n_kept = 0, n_rows = 0;
    for (int i = atoi(argv[2]); i > 0; i--) {
        if (n_kept < MAX_KEPT && pick(2)) {
            kept *rows = all + n_kept++;
            keep(model, &info, rows, next);
            next += (int32_t)rows->n;
            n_rows += rows->n;
        } else if (n_kept) {
            kept *rows = all + pick((int)n_kept);
            const int32_t last = rows->first + (int32_t)rows->n - 1;
            look(model, rows);
            read_some(sequence, all, n_kept, &info);
            if (pick(3)) continue;
            REQUIRE(!api->rows_free(model, rows->first));
            REQUIRE(api->rows_free(model, rows->first) == LLMC_ERROR_ARGUMENT);
            REQUIRE(!api->sequence_truncate(sequence, 0));
            REQUIRE(api->feed(sequence, &last, 1) == LLMC_ERROR_ARGUMENT);
            n_rows -= rows->n;
            *rows = all[--n_kept];
        }
        REQUIRE(api->feed(sequence, &next, 1) == LLMC_ERROR_ARGUMENT);
        REQUIRE(!api->info(model, &info) && info.n_rows == n_rows);
    }
    api->sequence_free(sequence);
    api->close(model); /* with what is still kept */
    printf("ok, %zu kept\n", n_kept);
    return 0;
}
