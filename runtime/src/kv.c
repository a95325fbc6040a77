/* kv.c - pages of the KV cache, with reference counts. On a CPU pages never used before cost no memory. */
#include "runtime.h"

llmc_status kv_open(kv_cache *kv, const llmc_plan_header *header, uint64_t n_tokens, const char *path)
{
    uint64_t n_pages = n_tokens / header->page_tokens + (n_tokens % header->page_tokens != 0);
    uint64_t page_bytes = header->kv_page_bytes;
    *kv = (kv_cache){.page_bytes = page_bytes, .page_tokens = header->page_tokens};
    if (n_pages <= INT32_MAX && (!page_bytes || n_pages <= UINT64_MAX / page_bytes)) {
        kv->n_pages = (uint32_t)n_pages;
        kv->n_holders = memory_map(n_pages * sizeof *kv->n_holders);
        kv->released = memory_map(n_pages * sizeof *kv->released);
    }
    if (kv->n_holders && kv->released) return LLMC_OK;
    kv_close(kv);
    return kv_no_memory(header, n_tokens, path);
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
