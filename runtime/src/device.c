/* device.c - the CPU as what runs plans, and how memory is cut up.
 *
 * A step on the CPU is done when engine_run returns, so there is never anything to wait for. */
#include <string.h>

#include "runtime.h"

/* -- one piece of memory, cut up ---------------------------------------------------------------------------------- */

uint64_t memory_measure(memory_part *parts, int n_parts)
{
    uint64_t n_bytes = 0;
    for (int i = 0; i < n_parts; i++) {
        parts[i].n_bytes = (parts[i].n_bytes + LLMC_ALIGNMENT - 1) / LLMC_ALIGNMENT * LLMC_ALIGNMENT;
        n_bytes += parts[i].n_bytes;
    }
    return n_bytes;
}

void memory_cut(char *memory, const memory_part *parts, int n_parts)
{
    for (int i = 0; i < n_parts; memory += parts[i++].n_bytes)
        if (parts[i].at) memcpy(parts[i].at, &memory, sizeof memory);
}

/* -- the CPU ------------------------------------------------------------------------------------------------------ */

static llmc_status allocate(llmc_model *model, uint64_t n_threads)
{
    const llmc_plan_header *h = &model->plans.header;
    const uint64_t m = model->plans.max_body_rows, r = model->plans.max_head_rows; /* at most 2^16 each */
    const uint64_t n_row = model->plans.n_row, n_pixels = plans_pixels(&model->plans);
    const uint64_t most_made = n_pixels ? model->plans.tower[model->plans.n_towers - 1].n_rows : 0;
    const uint64_t n_patches = plans_patches(&model->plans, most_made); /* at most 2^16 */
    const uint64_t scratch = h->scratch_bytes, largest = 1ull << 46; /* no product of these overflows */
    if (scratch < largest) model->spaces.scratch_stride = (scratch + 4095) / 4096 * 4096;
    memory_part parts[] = {
        {h->arena_bytes, &model->spaces.base[LLMC_SPACE_ARENA]},
        {model->spaces.scratch_stride * n_threads, &model->spaces.base[LLMC_SPACE_SCRATCH]},
        {m * sizeof *model->tokens, &model->tokens},
        {m * sizeof *model->positions, &model->positions},
        {m * h->pages_per_sequence * sizeof *model->page_table, &model->page_table},
        {model->states.page_bytes ? m * sizeof *model->slots : 0, &model->slots},
        {model->plans.n_adapters ? m * sizeof *model->adapters : 0, &model->adapters},
        {m * n_row * sizeof *model->taken, &model->taken},
        {n_row ? m * sizeof *model->is_given : 0, &model->is_given},
        {model->plans.picture_rows ? m * sizeof *model->sees : 0, &model->sees},
        {n_pixels * sizeof *model->pixels, &model->pixels},
        {n_pixels ? most_made * n_row * sizeof *model->made : 0, &model->made},
        {n_patches ? plans_places(&model->plans, n_patches) * sizeof *model->places : 0, &model->places},
        {model->plans.grids.is_turned ? 3 * m * sizeof *model->turns : 0, &model->turns},
        {r * sizeof *model->rows, &model->rows},
        {r * h->n_vocab * sizeof *model->logits, &model->logits},
        {r * sizeof *model->owners, &model->owners},
        {m * sizeof *model->turn, &model->turn},
        {model->states.page_bytes ? m * sizeof *model->turn_states : 0, &model->turn_states},
        {h->n_vocab * sizeof *model->candidates, &model->candidates},
        {h->n_vocab * sizeof *model->adjusted, &model->adjusted},
        {h->n_vocab * sizeof *model->counts, &model->counts},
    };
    enum { N_PARTS = sizeof parts / sizeof *parts };
    if (scratch < largest && h->arena_bytes < largest) {
        model->memory_bytes = memory_measure(parts, N_PARTS);
        model->memory = memory_map(model->memory_bytes);
    }
    if (!model->memory)
        return fail(LLMC_ERROR_MEMORY, model->file.path, "ask for fewer threads, or compile for smaller batches",
                    "there is no memory for activations: %llu bytes, and %llu for each of %llu threads",
                    (unsigned long long)h->arena_bytes, (unsigned long long)scratch, (unsigned long long)n_threads);
    memory_cut(model->memory, parts, N_PARTS);
    if (!model->states.page_bytes) model->slots = NULL;
    if (!model->plans.n_adapters) model->adapters = NULL;
    if (!n_row) model->is_given = NULL;
    if (!model->plans.picture_rows) model->sees = NULL;
    if (!model->plans.grids.is_turned) model->turns = NULL;
    return LLMC_OK;
}

static void set_spaces(llmc_model *model)
{
    char **base = model->spaces.base; /* of the arena and the scratch memory: set by allocate */
    base[LLMC_SPACE_WEIGHTS] = (char *)(uintptr_t)model->file.program.weights.bytes; /* kernels only read them */
    base[LLMC_SPACE_KV] = model->kv.pages;
    base[LLMC_SPACE_TOKENS] = (char *)model->tokens;
    base[LLMC_SPACE_POSITIONS] = (char *)model->positions;
    base[LLMC_SPACE_PAGE_TABLE] = (char *)model->page_table;
    base[LLMC_SPACE_ROWS] = (char *)model->rows;
    base[LLMC_SPACE_LOGITS] = (char *)model->logits;
    base[LLMC_SPACE_STATES] = model->states.pages;
    base[LLMC_SPACE_SLOTS] = (char *)model->slots;
    base[LLMC_SPACE_ADAPTERS] = (char *)model->adapters;
    base[LLMC_SPACE_GIVEN] = (char *)model->taken;
    base[LLMC_SPACE_IS_GIVEN] = (char *)model->is_given;
    base[LLMC_SPACE_SEES] = (char *)model->sees;
    base[LLMC_SPACE_PIXELS] = (char *)model->pixels;
    base[LLMC_SPACE_MADE] = (char *)model->made;
    base[LLMC_SPACE_PLACES] = (char *)model->places;
    base[LLMC_SPACE_TURNS] = (char *)model->turns;
}

static llmc_status open_states(llmc_model *model, uint32_t n)
{
    const llmc_plan_states *of = &model->plans.states;
    kv_cache *states = &model->states;
    if (!n) n = of->default_slots;
    llmc_status status = states_open(states, of, n, model->file.path);
    if (status || !of->slot_bytes) return status;
    states->pages = memory_map(states->n_pages * states->page_bytes);
    return states->pages ? LLMC_OK : states_no_memory(of, n, model->file.path);
}

static llmc_status cpu_open(llmc_model *model, const llmc_options *options)
{
    const llmc_plan_header *h = &model->plans.header;
    kv_cache *kv = &model->kv;
    int32_t n_threads = options->n_threads ? options->n_threads : cpu_count();
    if (n_threads > LLMC_MAX_THREADS) n_threads = LLMC_MAX_THREADS;
    uint64_t n_tokens = options->kv_tokens ? options->kv_tokens : h->default_kv_tokens;
    if (!n_tokens) n_tokens = h->n_context;
    llmc_status status = kv_open(kv, h, n_tokens, model->file.path);
    if (status) return status;
    kv->pages = memory_map(kv->n_pages * kv->page_bytes);
    if (!kv->pages) return kv_no_memory(h, n_tokens, model->file.path);
    status = open_states(model, options->n_slots);
    if (!status) status = allocate(model, (uint64_t)n_threads);
    if (status) return status;
    set_spaces(model);
    plans_bind(&model->plans, &model->spaces, n_threads);
    return engine_start(&model->engine, n_threads, model->file.path);
}

static void cpu_close(llmc_model *model)
{
    engine_stop(&model->engine);
    memory_unmap(model->kv.pages, model->kv.n_pages * model->kv.page_bytes);
    memory_unmap(model->states.pages, model->states.n_pages * model->states.page_bytes);
}

static llmc_status cpu_run(llmc_model *model, const plan *body, const plan *head)
{
    llmc_status status = body ? engine_run(&model->engine, body) : LLMC_OK;
    return status || !head ? status : engine_run(&model->engine, head);
}

static llmc_status cpu_finish(llmc_model *model)
{
    (void)model;
    return LLMC_OK;
}

static llmc_status cpu_read_logits(llmc_model *model, uint32_t row, float *out)
{
    size_t n_vocab = model->plans.header.n_vocab;
    memcpy(out, model->logits + row * n_vocab, n_vocab * sizeof *out);
    return LLMC_OK;
}

static void copy(const kv_cache *kv, int32_t to, int32_t from)
{
    memcpy(kv->pages + (uint64_t)to * kv->page_bytes, kv->pages + (uint64_t)from * kv->page_bytes, kv->page_bytes);
}

static void cpu_copy_page(llmc_model *model, int32_t to, int32_t from)
{
    copy(&model->kv, to, from);
}

static void cpu_copy_state(llmc_model *model, int32_t to, int32_t from)
{
    copy(&model->states, to, from);
}

static llmc_status cpu_read(llmc_model *model, void *to, const char *from, uint64_t n_bytes)
{
    (void)model;
    memcpy(to, from, n_bytes);
    return LLMC_OK;
}

static llmc_status cpu_write(llmc_model *model, char *to, const void *from, uint64_t n_bytes)
{
    (void)model;
    memcpy(to, from, n_bytes);
    return LLMC_OK;
}

const device cpu_device = {
    .step_rows = 16,
    .open = cpu_open,
    .close = cpu_close,
    .run = cpu_run,
    .finish = cpu_finish,
    .read_logits = cpu_read_logits,
    .copy_page = cpu_copy_page,
    .copy_state = cpu_copy_state,
    .read = cpu_read,
    .write = cpu_write,
};
