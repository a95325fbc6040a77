/* plan.c - the plan section, checked field by field and turned into calls. */
#include <stdlib.h>
#include <string.h>

#include "runtime.h"

enum {
    MAX_ROWS = 65536,
    MAX_PLANS = 1024,
    MAX_ELEMENTS = 1 << 30, /* of the vocabulary and the context: token ids and positions are int32 */
    TASKS_PER_THREAD = 4,   /* for calls with enough units: a thread that was interrupted is not waited for long */
    UNITS_PER_TASK = 4,
    MAX_TASKS = 4096,
    MAX_BLOCK_THREADS = 1024, /* of a GPU's kernel: what every GPU allows */
    MAX_SHARED_BYTES = 1 << 20,
};

static const char *const SPACE_NAMES[LLMC_N_SPACES] = {
    "arena",  "weights", "kv",     "tokens", "positions",   "page table",  "rows",
    "logits", "scratch", "chosen", "draws",  "next tokens", "told tokens", "states", "slots",
    "adapters", "given rows", "marks of given rows", "pixels", "made rows", "sight",
    "turns", "places of patches",
};

/* The section as it lies in the file; the tables need not be aligned there, so they are copied out record by record. */
typedef struct tables {
    const char *path;
    const uint8_t *kernels, *plans, *calls, *arguments;
    uint64_t weights_bytes;
    uint64_t first_kernel, n_code_kernels; /* in the code's table; of all programs for CPUs */
    range images; /* the section "cuda" */
    uint32_t n_images;
} tables;

#define INVALID(...) fail(LLMC_ERROR_FORMAT, tables->path, "compile the model again with this llmc", __VA_ARGS__)

range image_at(const range *images, uint32_t index)
{
    llmc_image image;
    memcpy(&image, images->bytes + 8 + (uint64_t)index * sizeof image, sizeof image);
    return (range){images->bytes + image.offset, image.n_bytes, NULL};
}

/* -- checks ------------------------------------------------------------------------------------------------------- */

/* start: where the tables begin in the section's n_bytes. */
static llmc_status check_header(const tables *tables, const llmc_plan_header *h, uint64_t start, uint64_t n_bytes)
{
    uint64_t expected = start + h->n_kernels * (uint64_t)sizeof(llmc_kernel_record) +
                        h->n_plans * (uint64_t)sizeof(llmc_plan_record) +
                        h->n_calls * (uint64_t)sizeof(llmc_call_record) +
                        h->n_arguments * (uint64_t)sizeof(llmc_argument);
    if (expected != n_bytes)
        return INVALID("the plan section has %llu bytes; its tables take %llu", (unsigned long long)n_bytes,
                       (unsigned long long)expected);
    if (h->n_vocab < 1 || h->n_vocab > MAX_ELEMENTS || h->n_context < 1 || h->n_context > MAX_ELEMENTS)
        return INVALID("the plan has a vocabulary of %u and a context of %u tokens", h->n_vocab, h->n_context);
    if (h->page_tokens < 1 || h->pages_per_sequence != (h->n_context - 1) / h->page_tokens + 1)
        return INVALID("the plan has %u pages of %u tokens for a context of %u", h->pages_per_sequence, h->page_tokens,
                       h->n_context);
    if (h->n_plans > MAX_PLANS || h->n_eos > LLMC_MAX_EOS)
        return INVALID("the plan section has %u plans and %u end tokens", h->n_plans, h->n_eos);
    if (h->kv_page_bytes % LLMC_ALIGNMENT)
        return INVALID("a page of the KV cache has %llu bytes", (unsigned long long)h->kv_page_bytes);
    if (h->device > LLMC_DEVICE_CUDA || (h->device == LLMC_DEVICE_CUDA) != (h->cuda_arch != 0))
        return INVALID("the plan is for device %u of architecture %u", h->device, h->cuda_arch);
    return LLMC_OK;
}

/* A name from the file, for a message. */
static void make_printable(char *name, size_t n)
{
    name[n - 1] = '\0';
    for (; *name; name++)
        if (*name < ' ' || *name > '~') *name = '?';
}

/* A CPU's kernels are in the code, which says the same about them. */
static llmc_status check_kernels(const tables *tables, uint32_t n_kernels)
{
    if (tables->n_code_kernels != llmc_kernel_count || tables->first_kernel + n_kernels > llmc_kernel_count)
        return INVALID("the plan names %llu kernels, the code has %u", (unsigned long long)tables->n_code_kernels,
                       llmc_kernel_count);
    for (uint32_t i = 0; i < n_kernels; i++) {
        llmc_kernel_record record;
        const llmc_kernel_entry *entry = llmc_kernel_table + tables->first_kernel + i;
        memcpy(&record, tables->kernels + i * sizeof record, sizeof record);
        make_printable(record.name, sizeof record.name);
        if (strcmp(record.name, entry->name) != 0 || record.n_pointers != entry->n_pointers)
            return INVALID("kernel %u of the plan is '%s' with %u pointers; the code has '%s' with %u", i, record.name,
                           record.n_pointers, entry->name, entry->n_pointers);
        if (record.n_pointers < 1 || record.n_pointers > LLMC_MAX_POINTERS)
            return INVALID("kernel '%s' takes %u pointers; 1 to %d can be passed", entry->name, record.n_pointers,
                           LLMC_MAX_POINTERS);
    }
    return LLMC_OK;
}

static llmc_status check_images(tables *tables)
{
    const range *images = &tables->images;
    uint64_t n_bytes = images->n_bytes;
    if (!images->bytes || n_bytes < 8) return INVALID("the artifact is for a GPU and has no kernels for one");
    memcpy(&tables->n_images, images->bytes, sizeof tables->n_images);
    if (tables->n_images > (n_bytes - 8) / sizeof(llmc_image))
        return INVALID("section 'cuda' has %llu bytes, too few for %u images", (unsigned long long)n_bytes,
                       tables->n_images);
    for (uint32_t i = 0; i < tables->n_images; i++) {
        range image = image_at(images, i);
        uint64_t offset = (uint64_t)(image.bytes - images->bytes);
        if (offset > n_bytes || image.n_bytes > n_bytes - offset)
            return INVALID("image %u, %llu bytes at %llu, is not in the %llu bytes of section 'cuda'", i,
                           (unsigned long long)image.n_bytes, (unsigned long long)offset, (unsigned long long)n_bytes);
    }
    return LLMC_OK;
}

/* One record of a GPU's kernel, copied to plans->records. */
static llmc_status load_gpu_kernel(const tables *tables, plans *plans, uint32_t index)
{
    llmc_kernel_record *record = plans->records + index;
    memcpy(record, tables->kernels + (uint64_t)index * sizeof *record, sizeof *record);
    make_printable(record->name, sizeof record->name);
    if (record->n_pointers < 1 || record->n_pointers > LLMC_MAX_POINTERS)
        return INVALID("kernel '%s' takes %u pointers; 1 to %d can be passed", record->name, record->n_pointers,
                       LLMC_MAX_POINTERS);
    if (record->n_threads < 1 || record->n_threads > MAX_BLOCK_THREADS || record->shared_bytes > MAX_SHARED_BYTES)
        return INVALID("kernel '%s' has blocks of %u threads with %u bytes of shared memory", record->name,
                       record->n_threads, record->shared_bytes);
    if (record->flags & ~(uint32_t)LLMC_KERNEL_DEPENDENT || record->image >= tables->n_images)
        return INVALID("kernel '%s' has flags %#x and is in image %u of %u", record->name, record->flags,
                       record->image, tables->n_images);
    plans->gpu_kernels[index] = (llmc_kernel_entry){.name = record->name, .n_pointers = record->n_pointers};
    return LLMC_OK;
}

static llmc_status load_gpu_kernels(tables *tables, plans *plans)
{
    uint32_t n = plans->header.n_kernels;
    llmc_status status = check_images(tables);
    if (status) return status;
    plans->records = calloc(n + 1ull, sizeof *plans->records);
    plans->gpu_kernels = calloc(n + 1ull, sizeof *plans->gpu_kernels);
    if (!plans->records || !plans->gpu_kernels)
        return fail(LLMC_ERROR_MEMORY, tables->path, NULL, "there is no memory for %u kernels", n);
    for (uint32_t i = 0; i < n && !status; i++) status = load_gpu_kernel(tables, plans, i);
    plans->kernels = plans->gpu_kernels;
    return status;
}

/* Bytes of each space as a plan sees it. A body has no rows and logits, a head no tokens, a sampler logits alone. A joined
 * step has what its body has, and logits; a tower neither sequences nor what is theirs. */
static void measure_spaces(const tables *tables, const plans *plans, const llmc_plan_record *plan,
                           uint64_t n_bytes[LLMC_N_SPACES])
{
    const llmc_plan_header *h = &plans->header;
    int is_sampler = plan->kind == LLMC_PLAN_SAMPLER, on_gpu = h->device != LLMC_DEVICE_CPU;
    int is_joined = plan->kind == LLMC_PLAN_JOINED || plan->kind == LLMC_PLAN_JOINED_ADAPTED;
    int is_body = plan->kind == LLMC_PLAN_BODY || plan->kind == LLMC_PLAN_ADAPTED;
    uint64_t body_ids = is_body || is_joined ? plan->n_rows * 4ull : 0;
    uint64_t head_ids = plan->kind == LLMC_PLAN_HEAD || is_joined ? plan->n_rows * 4ull : 0;
    uint64_t logits = is_sampler ? plans->max_head_rows : head_ids / 4;
    uint64_t made = plan->kind == LLMC_PLAN_TOWER ? plan->n_rows * 4ull : 0;
    n_bytes[LLMC_SPACE_ARENA] = h->arena_bytes;
    n_bytes[LLMC_SPACE_WEIGHTS] = tables->weights_bytes;
    n_bytes[LLMC_SPACE_KV] = made ? 0 : h->kv_page_bytes;
    n_bytes[LLMC_SPACE_TOKENS] = n_bytes[LLMC_SPACE_POSITIONS] = body_ids;
    if (plans->is_whole && plan->kind == LLMC_PLAN_HEAD) n_bytes[LLMC_SPACE_POSITIONS] = plans->max_body_rows * 4ull;
    n_bytes[LLMC_SPACE_PAGE_TABLE] = body_ids * h->pages_per_sequence;
    n_bytes[LLMC_SPACE_ROWS] = head_ids;
    n_bytes[LLMC_SPACE_LOGITS] = logits * 4 * h->n_vocab;
    n_bytes[LLMC_SPACE_SCRATCH] = h->scratch_bytes;
    n_bytes[LLMC_SPACE_CHOSEN] = on_gpu && !is_body ? plan->n_rows * 4ull : 0;
    n_bytes[LLMC_SPACE_NEXT] = n_bytes[LLMC_SPACE_TOLD] = n_bytes[LLMC_SPACE_CHOSEN];
    n_bytes[LLMC_SPACE_STATES] = made ? 0 : plans->states.slot_bytes;
    n_bytes[LLMC_SPACE_SLOTS] = plans->states.slot_bytes ? body_ids : 0;
    n_bytes[LLMC_SPACE_ADAPTERS] = plans->n_adapters ? body_ids : 0;
    n_bytes[LLMC_SPACE_GIVEN] = body_ids * plans->n_row;
    n_bytes[LLMC_SPACE_IS_GIVEN] = plans->n_row ? body_ids : 0;
    n_bytes[LLMC_SPACE_SEES] = plans->picture_rows ? body_ids : 0;
    const uint64_t n_patches = made ? plans_patches(plans, plan->n_rows) : 0;
    n_bytes[LLMC_SPACE_PIXELS] = n_patches ? 4 * n_patches * plans->grids.patch : made ? 4 * plans_pixels(plans) : 0;
    n_bytes[LLMC_SPACE_PLACES] = n_patches ? 4 * plans_places(plans, n_patches) : 0;
    n_bytes[LLMC_SPACE_TURNS] = plans->grids.is_turned ? 3 * body_ids : 0;
    n_bytes[LLMC_SPACE_MADE] = made * plans->n_row;
    n_bytes[LLMC_SPACE_DRAWS] = is_sampler ? plan->n_rows * sizeof(llmc_draw_record) : 0;
}

/* One call of a plan; its record is copied to `plans`, its arguments too. */
static llmc_status load_call(const tables *tables, plans *plans, const llmc_plan_record *plan, uint32_t index)
{
    const llmc_plan_header *h = &plans->header;
    llmc_call_record record;
    uint64_t room[LLMC_N_SPACES];
    measure_spaces(tables, plans, plan, room);
    memcpy(&record, tables->calls + (uint64_t)index * sizeof record, sizeof record);
    if (record.kernel >= h->n_kernels)
        return INVALID("call %u names kernel %u of %u", index, record.kernel, h->n_kernels);
    const llmc_kernel_entry *kernel = plans->kernels + record.kernel;
    if (record.grid < 1 || record.grid > INT32_MAX)
        return INVALID("call %u of '%s' has grid %u", index, kernel->name, record.grid);
    if (record.n_arguments != kernel->n_pointers || record.first_argument > h->n_arguments ||
        record.n_arguments > h->n_arguments - record.first_argument)
        return INVALID("call %u of '%s' has arguments %u + %u of %u; the kernel takes %u", index, kernel->name,
                       record.first_argument, record.n_arguments, h->n_arguments, kernel->n_pointers);
    for (uint32_t i = 0; i < record.n_arguments; i++) {
        llmc_argument a;
        uint64_t number = (uint64_t)record.first_argument + i;
        memcpy(&a, tables->arguments + number * sizeof a, sizeof a);
        if (a.space >= LLMC_N_SPACES)
            return INVALID("call %u of '%s': argument %u has space %u", index, kernel->name, i, a.space);
        if (a.offset % LLMC_ALIGNMENT)
            return INVALID("call %u of '%s': argument %u is at %llu of the %s, which is not aligned", index,
                           kernel->name, i, (unsigned long long)a.offset, SPACE_NAMES[a.space]);
        if (a.offset > room[a.space] || a.n_bytes > room[a.space] - a.offset)
            return INVALID("call %u of '%s': argument %u, %llu bytes at %llu, is not in the %llu bytes of the %s",
                           index, kernel->name, i, (unsigned long long)a.n_bytes, (unsigned long long)a.offset,
                           (unsigned long long)room[a.space], SPACE_NAMES[a.space]);
        plans->arguments[number] = (argument){.space = a.space, .offset = a.offset, .n_bytes = a.n_bytes};
    }
    const argument *arguments = plans->arguments + record.first_argument;
    plans->calls[index] = (call){.kernel = kernel, .arguments = arguments, .grid = record.grid};
    return LLMC_OK;
}

/* -- loading ------------------------------------------------------------------------------------------------------ */

/* Whether there may be a plan of this kind. */
static int is_kind_of(const plans *plans, uint32_t kind)
{
    const int on_gpu = plans->header.device != LLMC_DEVICE_CPU;
    if (kind == LLMC_PLAN_TOWER) return plans->tile[0] || plans->grids.patch;
    if (kind == LLMC_PLAN_ADAPTED || kind == LLMC_PLAN_JOINED_ADAPTED) return on_gpu && plans->n_adapters;
    return kind <= (on_gpu && !plans->is_whole ? LLMC_PLAN_JOINED : LLMC_PLAN_HEAD);
}

static void count_plan(plans *plans, uint32_t kind, uint32_t n_rows)
{
    switch (kind) {
    case LLMC_PLAN_BODY: plans->n_bodies++, plans->max_body_rows = n_rows; break;
    case LLMC_PLAN_HEAD: plans->n_heads++, plans->max_head_rows = n_rows; break;
    case LLMC_PLAN_SAMPLER: plans->n_samplers++, plans->max_sampler_rows = n_rows; break;
    case LLMC_PLAN_JOINED: plans->n_joined++; break;
    case LLMC_PLAN_TOWER: plans->n_towers++; break;
    case LLMC_PLAN_ADAPTED: plans->n_adapted++; break;
    default: plans->n_joined_adapted++;
    }
}

static llmc_status load_plan(const tables *tables, plans *plans, uint32_t index)
{
    const llmc_plan_header *h = &plans->header;
    llmc_plan_record record, before;
    memcpy(&record, tables->plans + (uint64_t)index * sizeof record, sizeof record);
    if (!is_kind_of(plans, record.kind) || record.n_rows < 1 || record.n_rows > MAX_ROWS)
        return INVALID("plan %u has kind %u and %u rows", index, record.kind, record.n_rows);
    if (index) {
        memcpy(&before, tables->plans + (index - 1ull) * sizeof before, sizeof before);
        if (before.kind > record.kind || (before.kind == record.kind && before.n_rows >= record.n_rows))
            return INVALID("plan %u is out of order: kind %u with %u rows after kind %u with %u", index, record.kind,
                           record.n_rows, before.kind, before.n_rows);
    }
    if (record.first_call > h->n_calls || record.n_calls > h->n_calls - record.first_call)
        return INVALID("plan %u has calls %u + %u of %u", index, record.first_call, record.n_calls, h->n_calls);
    for (uint32_t i = 0; i < record.n_calls; i++) {
        llmc_status status = load_call(tables, plans, &record, record.first_call + i);
        if (status) return status;
    }
    plans->all[index] = (plan){record.n_rows, record.n_calls, plans->calls + record.first_call};
    count_plan(plans, record.kind, record.n_rows);
    return LLMC_OK;
}

/* A GPU's heads, samplers and joined steps say which token they choose, in all places. */
static llmc_status check_choices(const plans *plans, const tables *tables)
{
    const uint32_t places = 1u << LLMC_SPACE_CHOSEN | 1u << LLMC_SPACE_NEXT | 1u << LLMC_SPACE_TOLD;
    for (uint32_t i = plans->n_bodies; i < plans->header.n_plans; i++) {
        uint32_t found = 0;
        const plan *plan = plans->all + i;
        if (plan >= plans->adapted && plan < plans->joined_adapted) continue;
        for (uint32_t k = 0; k < plan->n_calls; k++)
            for (uint32_t a = 0; a < plan->calls[k].kernel->n_pointers; a++) {
                const argument *to = plan->calls[k].arguments + a;
                if (!to->offset && to->n_bytes == plan->n_rows * 4ull) found |= 1u << to->space;
            }
        if ((found & places) != places) return INVALID("plan %u, of %u rows, chooses no tokens", i, plan->n_rows);
    }
    return LLMC_OK;
}

/* Where there are adapters, each body and each joined step of a GPU has another one for them. */
static llmc_status check_adapted(const plans *plans, const tables *tables)
{
    const int on_gpu = plans->header.device != LLMC_DEVICE_CPU;
    int is_paired = !on_gpu || !plans->n_adapters ||
                    (plans->n_adapted == plans->n_bodies && plans->n_joined_adapted == plans->n_joined);
    for (uint32_t i = 0; i < plans->n_adapted && is_paired; i++)
        is_paired = plans->adapted[i].n_rows == plans->bodies[i].n_rows;
    for (uint32_t i = 0; i < plans->n_joined_adapted && is_paired; i++)
        is_paired = plans->joined_adapted[i].n_rows == plans->joined[i].n_rows;
    return is_paired ? LLMC_OK : INVALID("the artifact lacks plans for steps with an adapter");
}

static llmc_status load_tables(plans *plans, tables *tables)
{
    llmc_status status = LLMC_OK;
    for (uint32_t i = 0; i < plans->header.n_plans && !status; i++) status = load_plan(tables, plans, i);
    if (!status && (!plans->n_bodies || !plans->n_heads))
        status = INVALID("the artifact has no %s plan", plans->n_bodies ? "head" : "body");
    plans->bodies = plans->all;
    plans->heads = plans->all + plans->n_bodies;
    plans->samplers = plans->heads + plans->n_heads;
    plans->joined = plans->samplers + plans->n_samplers;
    plans->tower = plans->n_towers ? plans->joined + plans->n_joined : NULL;
    plans->adapted = plans->joined + plans->n_joined + plans->n_towers;
    plans->joined_adapted = plans->adapted + plans->n_adapted;
    if (!status) status = check_adapted(plans, tables);
    const int is_sized = plans->grids.patch > 0, has_tower = is_sized || plans->tile[0];
    if (!status && (is_sized ? !plans->n_towers : plans->n_towers != (uint32_t)has_tower))
        status = INVALID("the artifact has %u towers for tiles of %u by %u pixels", plans->n_towers, plans->tile[1],
                         plans->tile[2]);
    if (!status && is_sized && plans_patches(plans, plans->tower[plans->n_towers - 1].n_rows) > MAX_ROWS)
        status = INVALID("the artifact makes %u rows of a picture", plans->tower[plans->n_towers - 1].n_rows);
    uint32_t made = plans->tower ? plans->tower->n_rows : plans->picture_rows;
    if (!status && plans->picture_rows && (plans->picture_rows > plans->max_body_rows || plans->picture_rows != made))
        status = INVALID("the plan reads pictures of %u rows, makes some of %u, and takes steps of %u",
                         plans->picture_rows, made, plans->max_body_rows);
    if (!status && plans->is_whole && plans->max_body_rows < plans->header.n_context)
        status = INVALID("a text of %u tokens does not fit the largest step, of %u", plans->header.n_context,
                         plans->max_body_rows);
    if (status || plans->header.device == LLMC_DEVICE_CPU || plans->is_whole) return status; /* none chooses tokens */
    return plans->n_samplers ? check_choices(plans, tables) : INVALID("the artifact has no sampler plan");
}

llmc_status plans_load(plans *plans, const artifact *file)
{
    llmc_plan_header *h = &plans->header;
    const range *section = &file->program.plan;
    struct tables at = {.path = file->path, .images = file->program.cuda}, *tables = &at;
    at.weights_bytes = file->program.weights.n_bytes;
    at.first_kernel = file->program.first_kernel;
    at.n_code_kernels = file->n_kernels;
    uint64_t start;
    llmc_status status = plan_header_read(plans, section, file->path, &start);
    if (!status) status = check_header(tables, h, start, section->n_bytes);
    if (!status) status = cpu_check(h->cpu_features, cpu_features(), file->path);
    if (!status) status = cpu_allow(h->cpu_features, file->path);
    if (status) return status;
    at.kernels = section->bytes + start;
    at.plans = at.kernels + (uint64_t)h->n_kernels * sizeof(llmc_kernel_record);
    at.calls = at.plans + (uint64_t)h->n_plans * sizeof(llmc_plan_record);
    at.arguments = at.calls + (uint64_t)h->n_calls * sizeof(llmc_call_record);
    if (h->device == LLMC_DEVICE_CPU) status = check_kernels(tables, h->n_kernels);
    else status = load_gpu_kernels(tables, plans);
    if (!status && h->device == LLMC_DEVICE_CPU) plans->kernels = llmc_kernel_table + at.first_kernel;
    if (status) {
        plans_free(plans);
        return status;
    }

    plans->all = calloc(h->n_plans + 1ull, sizeof *plans->all);
    plans->calls = calloc(h->n_calls + 1ull, sizeof *plans->calls);
    plans->arguments = calloc(h->n_arguments + 1ull, sizeof *plans->arguments);
    if (!plans->all || !plans->calls || !plans->arguments)
        status = fail(LLMC_ERROR_MEMORY, file->path, NULL, "there is no memory for a plan of %u calls", h->n_calls);
    else
        status = load_tables(plans, tables);
    if (!status) status = weights_find(plans, at.weights_bytes, file->path);
    if (status) plans_free(plans);
    return status;
}

void plans_free(plans *plans)
{
    free(plans->all);
    free(plans->calls);
    free(plans->arguments);
    free(plans->records);
    free(plans->gpu_kernels);
    free(plans->extents);
    plans->extents = NULL;
    plans->records = NULL;
    plans->gpu_kernels = NULL;
    plans->all = NULL;
    plans->calls = NULL;
    plans->arguments = NULL;
}

/* -- use ---------------------------------------------------------------------------------------------------------- */

static uint32_t count_tasks(uint32_t grid, int32_t n_threads)
{
    uint32_t n = (uint32_t)n_threads;
    if (n == 1) return 1;
    if (grid / n >= TASKS_PER_THREAD * UNITS_PER_TASK) n *= TASKS_PER_THREAD;
    if (n > MAX_TASKS) n = MAX_TASKS;
    if (n > grid) n = grid;
    /* Kernels compute grid * (task + 1) in int32. */
    return n > INT32_MAX / grid ? INT32_MAX / grid : n;
}

void plans_bind(plans *plans, const spaces *spaces, int32_t n_threads)
{
    for (uint32_t i = 0; i < plans->header.n_arguments; i++) {
        argument *a = plans->arguments + i;
        a->pointer = spaces->base[a->space] + a->offset;
        a->thread_stride = a->space == LLMC_SPACE_SCRATCH ? spaces->scratch_stride : 0;
    }
    for (uint32_t i = 0; i < plans->header.n_calls; i++)
        if (plans->calls[i].grid) plans->calls[i].n_tasks = count_tasks(plans->calls[i].grid, n_threads);
}

const plan *plan_holding(const plan *plans, uint32_t n_plans, uint64_t n_rows)
{
    uint32_t i = 0;
    while (i + 1 < n_plans && plans[i].n_rows < n_rows) i++;
    return plans + i;
}

/* A step reads all weights however few rows it has: that costs about as much as computing step_rows rows. So a few
 * rows of padding are cheaper than another step, and another step is cheaper than many rows of padding. */
const plan *plan_choose(const plan *plans, uint32_t n_plans, uint64_t n_rows, uint32_t step_rows)
{
    uint32_t above = 0;
    while (above < n_plans && plans[above].n_rows < n_rows) above++;
    if (above == n_plans) return plans + n_plans - 1;
    if (above == 0 || plans[above].n_rows == n_rows) return plans + above;
    /* Cover the rows with smaller plans, the largest that fits each time, while that stays the cheaper way. */
    uint64_t padded = step_rows + plans[above].n_rows, split = 0, left = n_rows;
    for (uint32_t i = above; i-- && left && split < padded;) {
        uint64_t n = left / plans[i].n_rows;
        split += n * (step_rows + plans[i].n_rows);
        left -= n * plans[i].n_rows;
    }
    if (left) split += step_rows + plans[0].n_rows;
    return split < padded ? plans + above - 1 : plans + above;
}
