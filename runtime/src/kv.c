/* kv.c - pages of the KV cache, and slots of states, with reference counts. On a CPU those that were never used before
 * cost no memory. */
#include "runtime.h"

/* Memory to count pages with, if there may be so many. */
static int count(kv_cache *kv, uint64_t n_pages)
{
    if (n_pages <= INT32_MAX && (!kv->page_bytes || n_pages <= UINT64_MAX / kv->page_bytes)) {
        kv->n_pages = (uint32_t)n_pages;
        kv->n_holders = memory_map(n_pages * sizeof *kv->n_holders);
        kv->released = memory_map(n_pages * sizeof *kv->released);
    }
    if (kv->n_holders && kv->released) return 1;
    kv_close(kv);
    return 0;
}

llmc_status kv_open(kv_cache *kv, const llmc_plan_header *header, uint64_t n_tokens, const char *path)
{
    uint64_t n_pages = n_tokens / header->page_tokens + (n_tokens % header->page_tokens != 0);
    *kv = (kv_cache){.page_bytes = header->kv_page_bytes, .page_tokens = header->page_tokens};
    return count(kv, n_pages) ? LLMC_OK : kv_no_memory(header, n_tokens, path);
}

llmc_status states_open(kv_cache *states, const llmc_plan_states *of, uint32_t n, const char *path)
{
    *states = (kv_cache){.page_bytes = of->slot_bytes};
    if (!of->slot_bytes) return LLMC_OK;
    return count(states, n) ? LLMC_OK : states_no_memory(of, n, path);
}

llmc_status states_no_memory(const llmc_plan_states *of, uint32_t n, const char *path)
{
    return fail(LLMC_ERROR_MEMORY, path, "ask for fewer slots",
                "there is no memory for the states of %u sequences: %llu bytes each", n,
                (unsigned long long)of->slot_bytes);
}

llmc_status kv_no_memory(const llmc_plan_header *header, uint64_t n_tokens, const char *path)
{
    uint64_t n_pages = n_tokens / header->page_tokens + (n_tokens % header->page_tokens != 0);
    return fail(LLMC_ERROR_MEMORY, path, "ask for room for fewer tokens",
                "there is no memory for a KV cache of %llu tokens: %llu pages of %llu bytes",
                (unsigned long long)n_tokens, (unsigned long long)n_pages, (unsigned long long)header->kv_page_bytes);
}

void kv_close(kv_cache *kv)
{
    memory_unmap(kv->n_holders, kv->n_pages * sizeof *kv->n_holders);
    memory_unmap(kv->released, kv->n_pages * sizeof *kv->released);
    *kv = (kv_cache){0};
}

uint32_t kv_free_pages(const kv_cache *kv)
{
    return kv->n_pages - kv->n_fresh + kv->n_released;
}

int32_t kv_take(kv_cache *kv)
{
    if (!kv_free_pages(kv)) return -1;
    int32_t page = kv->n_released ? kv->released[--kv->n_released] : (int32_t)kv->n_fresh++;
    kv->n_holders[page] = 1;
    return page;
}

void kv_share(kv_cache *kv, int32_t page)
{
    kv->n_holders[page]++;
}

int kv_is_shared(const kv_cache *kv, int32_t page)
{
    return kv->n_holders[page] > 1;
}

void kv_release(kv_cache *kv, int32_t page)
{
    if (--kv->n_holders[page] == 0) kv->released[kv->n_released++] = page;
}
