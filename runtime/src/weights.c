/* weights.c - which of the weights a program reads.
 *
 * Programs may share a weights section. A CPU's finds it mapped, and touches no more of it than its calls name; to a GPU
 * just that is copied, one stretch right behind the other. */
#include <stdlib.h>
#include <string.h>

#include "runtime.h"

enum {
    ALIGNMENT = 256,  /* of extents, which the weights of a GPU's kernels keep: the compiler places them so */
    LEAST_GAP = 4096, /* what is closer together is one extent */
};

static int by_offset(const void *left, const void *right)
{
    const extent *a = left, *b = right;
    return (a->offset > b->offset) - (a->offset < b->offset);
}

/* The arguments of calls that lie in the weights, as extents by rising offset. Returns how many. */
static uint32_t list_arguments(const plans *plans, extent *extents)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < plans->header.n_arguments; i++) {
        const argument *a = plans->arguments + i;
        if (a->space != LLMC_SPACE_WEIGHTS || !a->n_bytes) continue;
        extents[n++] = (extent){.offset = a->offset / ALIGNMENT * ALIGNMENT, .n_bytes = a->offset % ALIGNMENT + a->n_bytes};
    }
    qsort(extents, n, sizeof *extents, by_offset);
    return n;
}

/* Joins extents [n] that overlap, or nearly touch. Returns how many are left. */
static uint32_t join(extent *extents, uint32_t n)
{
    uint32_t last = 0;
    if (!n) return 0;
    for (uint32_t i = 1; i < n; i++) {
        extent *one = extents + last, *next = extents + i;
        uint64_t end = one->offset + one->n_bytes, next_end = next->offset + next->n_bytes;
        if (next->offset > end && next->offset - end >= LEAST_GAP) extents[++last] = *next;
        else if (next_end > end) one->n_bytes = next_end - one->offset;
    }
    return last + 1;
}

llmc_status weights_find(plans *plans, uint64_t section_bytes, const char *path)
{
    plans->extents = calloc(plans->header.n_arguments + 1ull, sizeof *plans->extents);
    if (!plans->extents)
        return fail(LLMC_ERROR_MEMORY, path, NULL, "there is no memory for %u arguments", plans->header.n_arguments);
    plans->n_extents = join(plans->extents, list_arguments(plans, plans->extents));
    plans->weight_bytes = 0;
    for (uint32_t i = 0; i < plans->n_extents; i++) {
        extent *extent = plans->extents + i;
        uint64_t end = (extent->offset + extent->n_bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        extent->n_bytes = (end < section_bytes ? end : section_bytes) - extent->offset;
        extent->packed = plans->weight_bytes; /* aligned: only the last extent can end at the section's end */
        plans->weight_bytes += extent->n_bytes;
    }
    return LLMC_OK;
}

/* The last extent whose `packed` (or `offset`, when by_section) is not above `place`; NULL when there is none. */
static const extent *extent_at(const plans *plans, uint64_t place, int by_section)
{
    uint32_t low = 0, high = plans->n_extents;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        const extent *extent = plans->extents + middle;
        if ((by_section ? extent->offset : extent->packed) <= place) low = middle + 1;
        else high = middle;
    }
    return low ? plans->extents + low - 1 : NULL;
}

void weights_pack(plans *plans)
{
    for (uint32_t i = 0; i < plans->header.n_arguments; i++) {
        argument *a = plans->arguments + i;
        if (a->space != LLMC_SPACE_WEIGHTS) continue;
        const extent *extent = a->n_bytes ? extent_at(plans, a->offset, 1) : NULL; /* of no bytes: anywhere */
        a->offset = extent ? extent->packed + (a->offset - extent->offset) : 0;
    }
}

void weights_copy(const plans *plans, const uint8_t *section, uint64_t first, uint64_t n, char *to)
{
    const extent *extent = extent_at(plans, first, 0);
    for (uint64_t n_copied; extent && n; extent++, n -= n_copied, first += n_copied, to += n_copied) {
        uint64_t skipped = first - extent->packed, left = extent->n_bytes - skipped;
        n_copied = left < n ? left : n;
        memcpy(to, section + extent->offset + skipped, n_copied);
    }
}
