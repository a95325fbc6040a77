/* plan_header.c - what the plan section begins with: its header, and what there is of states, of texts that are read
 * whole, of labels, of adapters, or of rows that stand for tokens. */
#include <string.h>

#include "runtime.h"

enum { MAX_ELEMENTS = 1 << 30 /* token ids are int32 */, MAX_PAGES = 65536 };

#define INVALID(...) fail(LLMC_ERROR_FORMAT, path, "compile the model again with this llmc", __VA_ARGS__)

/* Of the header's version: what stands behind it, `n_bytes` long, is copied to `more`. start: where the tables begin. */
static llmc_status read_more(const char *path, const range *section, void *more, uint64_t n_bytes, uint64_t *start)
{
    *start += n_bytes;
    if (section->n_bytes < *start)
        return INVALID("the plan section has %llu bytes, less than its header", (unsigned long long)section->n_bytes);
    memcpy(more, section->bytes + sizeof(llmc_plan_header), n_bytes);
    return LLMC_OK;
}

/* What is said of texts that are read whole, or given labels. */
static llmc_status read_texts(const char *path, plans *plans, const range *section, uint64_t *start)
{
    const llmc_plan_header *h = &plans->header;
    llmc_plan_labels said = {.n_types = 1, .is_whole = 1};
    llmc_plan_whole whole = {0};
    int has_labels = h->format_version == LLMC_FORMAT_LABELS;
    llmc_status status = has_labels ? read_more(path, section, &said, sizeof said, start)
                                    : read_more(path, section, &whole, sizeof whole, start);
    if (status) return status;
    if (!has_labels) said.n_tokens = whole.n_tokens;
    plans->n_tokens = said.n_tokens;
    plans->n_types = said.n_types;
    plans->is_whole = said.is_whole == 1;
    if (plans->is_whole && (said.n_tokens < 1 || said.n_tokens > MAX_ELEMENTS))
        return INVALID("the plan reads texts of %u tokens whole", said.n_tokens);
    if (said.is_whole > 1 || !said.n_tokens || !said.n_types || (uint64_t)said.n_tokens * said.n_types > MAX_ELEMENTS)
        return INVALID("the plan gives labels to texts of %u tokens of %u types", said.n_tokens, said.n_types);
    return LLMC_OK;
}

static llmc_status check_states(const char *path, const llmc_plan_states *states)
{
    if (!states->slot_bytes || states->slot_bytes % LLMC_ALIGNMENT || !states->default_slots)
        return INVALID("the plan has %u slots for states of %llu bytes each", states->default_slots,
                       (unsigned long long)states->slot_bytes);
    return LLMC_OK;
}

/* States, where there are some, and the names of at least so many adapters, behind what is said of them. */
static llmc_status read_names(const char *path, plans *plans, const range *section, const llmc_plan_adapters *said,
                              uint32_t least, uint64_t *start)
{
    plans->states = (llmc_plan_states){.slot_bytes = said->slot_bytes, .default_slots = said->default_slots};
    llmc_status status = said->slot_bytes ? check_states(path, &plans->states) : LLMC_OK;
    if (status) return status;
    uint64_t n_bytes = said->n_adapters * (uint64_t)sizeof *plans->adapters;
    if (said->n_adapters < least || said->n_adapters > LLMC_MAX_ADAPTERS || n_bytes > section->n_bytes - *start ||
        (plans->n_row && plans->header.device != LLMC_DEVICE_CPU))
        return INVALID("the plan has %u adapters for device %u", said->n_adapters, plans->header.device);
    plans->n_adapters = said->n_adapters;
    plans->adapters = (const llmc_adapter_record *)(section->bytes + *start); /* characters: aligned anywhere */
    *start += n_bytes;
    for (uint32_t i = 0; i < said->n_adapters; i++) {
        const char *name = plans->adapters[i].name;
        if (!*name || !memchr(name, 0, sizeof plans->adapters[i].name))
            return INVALID("adapter %u of the plan has no name", i);
    }
    return LLMC_OK;
}

/* What is said of adapters. */
static llmc_status read_adapters(const char *path, plans *plans, const range *section, uint64_t *start)
{
    llmc_plan_adapters said = {0};
    llmc_status status = read_more(path, section, &said, sizeof said, start);
    return status ? status : read_names(path, plans, section, &said, 1, start);
}

/* What is said of where rows are in their picture. */
static llmc_status check_grids(const char *path, const llmc_plan_grids *said)
{
    const uint32_t *tile = said->given.tile;
    int is_sized = said->merge || said->window || said->pages || said->side || said->n_taps || said->taps_aligned;
    int is_table = said->side ? said->side <= LLMC_MAX_SIDE && (said->n_taps == 4 || said->n_taps == 16)
                              : !said->n_taps && !said->taps_aligned;
    if (said->is_turned > 1 || (!said->patch && (is_sized || !said->is_turned)))
        return INVALID("the plan has rows that are turned %u, and patches of %u numbers", said->is_turned, said->patch);
    if (said->patch && (said->patch > LLMC_MAX_ROW || !said->merge || said->merge > LLMC_MAX_MERGE || tile[0] ||
                        said->window > LLMC_MAX_SIDE || !said->pages || said->pages > MAX_PAGES || !is_table ||
                        said->taps_aligned > 1))
        return INVALID("the plan makes rows of %u by %u patches of %u numbers, in %u pages, with a table of side %u",
                       said->merge, said->merge, said->patch, said->pages, said->side);
    return LLMC_OK;
}

/* What is said of rows that stand for tokens, and, if so, of where they are in their picture. */
static llmc_status read_given(const char *path, plans *plans, const range *section, uint64_t *start)
{
    const int has_grids = plans->header.format_version == LLMC_FORMAT_GRIDS;
    llmc_plan_grids *grids = &plans->grids;
    llmc_status status = read_more(path, section, grids, has_grids ? sizeof *grids : sizeof grids->given, start);
    if (!status && has_grids) status = check_grids(path, grids);
    if (status) return status;
    const llmc_plan_given said = grids->given;
    const uint32_t *tile = said.tile;
    int is_tile = (tile[0] && tile[1] && tile[2]) || (!tile[0] && !tile[1] && !tile[2]);
    if (!said.n_row || said.n_row > LLMC_MAX_ROW || !is_tile || (uint64_t)tile[0] * tile[1] > LLMC_MAX_TILE ||
        (uint64_t)tile[0] * tile[1] * tile[2] > LLMC_MAX_TILE)
        return INVALID("the plan takes rows of %u numbers, and tiles of %u by %u by %u", said.n_row, tile[0], tile[1],
                       tile[2]);
    if (plans->header.device != LLMC_DEVICE_CPU)
        return INVALID("the plan takes rows of %u numbers on device %u", said.n_row, plans->header.device);
    plans->n_row = said.n_row;
    plans->picture_rows = said.picture_rows;
    memcpy(plans->tile, tile, sizeof said.tile);
    const llmc_plan_adapters more = {said.slot_bytes, said.default_slots, said.n_adapters};
    return read_names(path, plans, section, &more, 0, start);
}

llmc_status plan_header_read(plans *plans, const range *section, const char *path, uint64_t *start)
{
    llmc_plan_header *h = &plans->header;
    llmc_plan_states *states = &plans->states;
    *start = sizeof *h;
    *states = (llmc_plan_states){0};
    if (section->n_bytes < sizeof *h)
        return INVALID("the plan section has %llu bytes, less than its header", (unsigned long long)section->n_bytes);
    memcpy(h, section->bytes, sizeof *h);
    int has_states = h->format_version == LLMC_FORMAT_WITH_STATES;
    int has_adapters = h->format_version == LLMC_FORMAT_ADAPTERS;
    int says_texts = h->format_version == LLMC_FORMAT_WHOLE || h->format_version == LLMC_FORMAT_LABELS;
    int has_given = h->format_version == LLMC_FORMAT_GIVEN || h->format_version == LLMC_FORMAT_GRIDS;
    int is_known = h->format_version == LLMC_FORMAT_VERSION || has_states || says_texts || has_adapters || has_given;
    plans->is_whole = 0;
    plans->n_tokens = h->n_vocab;
    plans->n_types = 1;
    plans->n_adapters = plans->n_row = plans->picture_rows = 0;
    memset(plans->tile, 0, sizeof plans->tile);
    memset(&plans->grids, 0, sizeof plans->grids);
    if (h->magic != LLMC_PLAN_MAGIC || !is_known)
        return INVALID("the plan section has magic %#x and version %u", h->magic, h->format_version);
    if (says_texts) return read_texts(path, plans, section, start);
    if (has_given) return read_given(path, plans, section, start);
    if (has_adapters) return read_adapters(path, plans, section, start);
    if (!has_states) return LLMC_OK;
    llmc_status status = read_more(path, section, states, sizeof *states, start);
    return status ? status : check_states(path, states);
}

/* -- what towers take --------------------------------------------------------------------------------------------- */

uint64_t plans_pixels(const plans *plans)
{
    if (plans->grids.patch && plans->tower)
        return plans_patches(plans, plans->tower[plans->n_towers - 1].n_rows) * plans->grids.patch;
    return (uint64_t)plans->tile[0] * plans->tile[1] * plans->tile[2];
}

uint64_t plans_patches(const plans *plans, uint64_t n_rows)
{
    return n_rows * plans->grids.merge * plans->grids.merge;
}

uint64_t plans_places(const plans *plans, uint64_t n_patches)
{
    const llmc_plan_grids *grids = &plans->grids;
    const uint64_t tokens = plans->header.page_tokens, n_pages = (n_patches + tokens - 1) / tokens;
    return n_patches * ((1 + n_pages) * (grids->window ? 2 : 1) + 2 + 2ull * grids->n_taps);
}
