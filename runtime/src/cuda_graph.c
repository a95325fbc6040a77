/* cuda_graph.c - kernels, and the launches of a plan.
 *
 * All that changes from step to step lies in the GPU's memory, so the launches of a plan are always the same: they are
 * captured once, as a graph, and a step is one call to the driver a plan. Where a step's input lies alternates, so what
 * runs ahead is captured for both turns. The body of a prompt is launched kernel by kernel: each takes longer than its
 * launch, and the GPU begins with the first of them while a graph would still be on its way. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_graph.h"

/* -- kernels ------------------------------------------------------------------------------------------------------ */

static llmc_status load_images(llmc_model *model)
{
    cuda *cuda = model->cuda;
    const range *images = &model->file.program.cuda;
    uint32_t n;
    memcpy(&n, images->bytes, sizeof n);
    cuda->modules = calloc(n + 1ull, sizeof *cuda->modules);
    if (!cuda->modules) return fail(LLMC_ERROR_MEMORY, model->file.path, NULL, "there is no memory for %u images", n);
    for (; cuda->n_modules < n; cuda->n_modules++) {
        CUmodule *module = cuda->modules + cuda->n_modules;
        CUresult result = cuda->driver.cuModuleLoadData(module, image_at(images, cuda->n_modules).bytes);
        if (result) return cuda_failed(model, result, "loading the kernels (is the driver older than the compiler?)");
    }
    return LLMC_OK;
}

/* The shared memory that a kernel's blocks take. A multiprocessor divides its memory into L1 and shared anew only when
 * it is empty: kernels that overlap all want it divided in the same way. */
static CUresult ask_shared(const cuda *cuda, CUfunction function, const llmc_kernel_record *record)
{
    const cuda_driver *driver = &cuda->driver;
    CUresult result = CUDA_SUCCESS;
    if (record->shared_bytes)
        result = driver->cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                            (int)record->shared_bytes);
    if (!result && record->flags & LLMC_KERNEL_DEPENDENT && cuda->is_dependent)
        result = driver->cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT,
                                            CU_SHAREDMEM_CARVEOUT_MAX_SHARED);
    return result;
}

/* Asking for an attribute also makes a driver that loads lazily load the kernel now. */
static llmc_status load_function(llmc_model *model, uint32_t index)
{
    cuda *cuda = model->cuda;
    const cuda_driver *driver = &cuda->driver;
    const llmc_kernel_record *record = model->plans.records + index;
    CUfunction *function = cuda->functions + index;
    int most = 0;
    char doing[160];
    snprintf(doing, sizeof doing, "preparing kernel '%s'", record->name);
    CUresult result = driver->cuModuleGetFunction(function, cuda->modules[record->image], record->name);
    if (!result) result = ask_shared(cuda, *function, record);
    if (!result) result = driver->cuFuncGetAttribute(&most, CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, *function);
    if (result) return cuda_failed(model, result, doing);
    if (record->n_threads <= (uint32_t)most) return LLMC_OK;
    return fail(LLMC_ERROR_FORMAT, model->file.path, "compile the model again with this llmc",
                "kernel '%s' has blocks of %u threads; its code allows %d", record->name, record->n_threads, most);
}

llmc_status cuda_load_kernels(llmc_model *model)
{
    uint32_t n = model->plans.header.n_kernels;
    llmc_status status = load_images(model);
    if (status) return status;
    model->cuda->functions = calloc(n + 1ull, sizeof *model->cuda->functions);
    if (!model->cuda->functions)
        return fail(LLMC_ERROR_MEMORY, model->file.path, NULL, "there is no memory for %u kernels", n);
    for (uint32_t i = 0; i < n && !status; i++) status = load_function(model, i);
    return status;
}

/* -- launches ----------------------------------------------------------------------------------------------------- */

/* is_first: of its graph, so that there is no kernel in front to overlap with. */
static CUresult launch(const llmc_model *model, const call *call, uint32_t turn, int is_first)
{
    const cuda *cuda = model->cuda;
    uint32_t index = (uint32_t)(call->kernel - model->plans.kernels);
    const llmc_kernel_record *record = model->plans.records + index;
    void *values[LLMC_MAX_POINTERS], *parameters[LLMC_MAX_POINTERS];
    for (uint32_t i = 0; i < record->n_pointers; i++) {
        values[i] = call->arguments[i].pointer + (turn ? cuda->shift[call->arguments[i].space] : 0);
        parameters[i] = values + i;
    }
    CUlaunchAttribute dependent = {.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION};
    dependent.value.programmaticStreamSerializationAllowed = 1;
    const CUlaunchConfig config = {
        .gridDimX = call->grid, .gridDimY = 1, .gridDimZ = 1,
        .blockDimX = record->n_threads, .blockDimY = 1, .blockDimZ = 1,
        .sharedMemBytes = record->shared_bytes,
        .hStream = cuda->stream,
        .attrs = &dependent,
        .numAttrs = record->flags & LLMC_KERNEL_DEPENDENT && cuda->is_dependent && !is_first,
    };
    return cuda->driver.cuLaunchKernelEx(&config, cuda->functions[index], parameters, NULL);
}

static CUresult launch_all(const llmc_model *model, const plan *plan, uint32_t turn, int is_first)
{
    CUresult result = CUDA_SUCCESS;
    for (uint32_t i = 0; i < plan->n_calls && !result; i++)
        result = launch(model, plan->calls + i, turn, is_first && !i);
    return result;
}

/* -- graphs ------------------------------------------------------------------------------------------------------- */

/* Rows of a body from which on it has no graph. An H200's host took 0.3 to 0.5 ms to launch one of 230 kernels. */
#define PROMPT_ROWS 65

static int is_prompt(const plans *plans, const plan *plan)
{
    const int is_body = plan < plans->heads || (plan >= plans->adapted && plan < plans->joined_adapted);
    return is_body && plan->n_rows >= PROMPT_ROWS;
}

static int is_joined(const plans *plans, const plan *plan)
{
    return (plan >= plans->joined && plan < plans->joined + plans->n_joined) || plan >= plans->joined_adapted;
}

static int is_sampler(const plans *plans, const plan *plan)
{
    return plan >= plans->samplers && plan < plans->joined;
}

/* Of one plan, or of two, the second behind the first. */
static CUresult capture(const llmc_model *model, const plan *plan, const struct plan *second, uint32_t turn,
                        CUgraphExec *executable)
{
    const cuda_driver *driver = &model->cuda->driver;
    CUstream stream = model->cuda->stream;
    CUgraph graph = NULL;
    CUresult result = driver->cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
    if (result) return result;
    result = launch_all(model, plan, turn, 1);
    if (!result && second) result = launch_all(model, second, turn, 0);
    CUresult ended = driver->cuStreamEndCapture(stream, &graph);
    if (!result) result = ended;
    if (!result) result = driver->cuGraphInstantiateWithFlags(executable, graph, 0);
    if (result) *executable = NULL;
    if (!ended && graph) driver->cuGraphDestroy(graph);
    if (!result) result = driver->cuGraphUpload(*executable, stream);
    return result;
}

/* The body that as many sequences take one token through as a head has rows, or NULL. */
static const plan *body_of(const plans *plans, const plan *head)
{
    const plan *body = plan_choose(plans->bodies, plans->n_bodies, head->n_rows, cuda_device.step_rows);
    return body->n_rows < head->n_rows ? NULL : body;
}

/* What a head and the body of as many tokens are as one plan, or NULL. */
static const plan *joined_of(const plans *plans, const plan *head, int is_adapted)
{
    const plan *joined = is_adapted ? plans->joined_adapted : plans->joined;
    for (uint32_t i = 0; i < plans->n_joined; i++)
        if (joined[i].n_rows == head->n_rows) return joined + i;
    return NULL;
}

/* The body that takes its place in a step in which a row has an adapter. */
static const plan *adapted_of(const plans *plans, const plan *body, int is_adapted)
{
    return body && is_adapted ? plans->adapted + (body - plans->bodies) : body;
}

static int is_adapted(const llmc_model *model, const plan *body)
{
    for (uint32_t row = 0; model->adapters && body && row < body->n_rows; row++)
        if (model->adapters[row] >= 0) return 1;
    return 0;
}

/* Of every plan that has one but for joined steps; in turn 1 of samplers alone. */
static CUresult capture_plans(llmc_model *model, uint32_t turn)
{
    const plans *plans = &model->plans;
    const uint32_t n = plans->header.n_plans;
    CUgraphExec *graphs = model->cuda->graphs + (uint64_t)turn * n;
    CUresult result = CUDA_SUCCESS;
    for (uint32_t i = 0; i < n && !result; i++) {
        const plan *plan = plans->all + i;
        const int is_ours = turn ? is_sampler(plans, plan) : !is_prompt(plans, plan) && !is_joined(plans, plan);
        if (is_ours) result = capture(model, plan, NULL, turn, graphs + i);
    }
    return result;
}

/* The graph of a body and a head, or what has been joined of them. */
static CUgraphExec *pair_at(const llmc_model *model, const plan *head, uint32_t turn, int is_adapted)
{
    const plans *plans = &model->plans;
    return model->cuda->pairs + (2ull * turn + (uint32_t)is_adapted) * plans->n_heads + (head - plans->heads);
}

static CUresult capture_pair(llmc_model *model, const plan *head, uint32_t turn, int is_adapted)
{
    const plans *plans = &model->plans;
    const plan *body = adapted_of(plans, body_of(plans, head), is_adapted);
    const plan *joined = joined_of(plans, head, is_adapted);
    CUgraphExec *pair = pair_at(model, head, turn, is_adapted);
    if (joined) return capture(model, joined, NULL, turn, pair);
    return body ? capture(model, body, head, turn, pair) : CUDA_SUCCESS;
}

static CUresult capture_pairs(llmc_model *model, uint32_t turn)
{
    const plans *plans = &model->plans;
    const uint32_t n = plans->n_heads * (plans->n_adapted ? 2 : 1);
    CUresult result = CUDA_SUCCESS;
    for (uint32_t i = 0; i < n && !result; i++)
        result = capture_pair(model, plans->heads + i % plans->n_heads, turn, i >= plans->n_heads);
    return result;
}

llmc_status cuda_capture(llmc_model *model)
{
    cuda *cuda = model->cuda;
    const plans *plans = &model->plans;
    uint32_t n = plans->header.n_plans;
    CUresult result = CUDA_SUCCESS;
    cuda->graphs = calloc(2ull * n + 1, sizeof *cuda->graphs);
    cuda->pairs = calloc(4ull * plans->n_heads + 1, sizeof *cuda->pairs); /* [turn][is_adapted][n_heads] */
    if (!cuda->graphs || !cuda->pairs)
        return fail(LLMC_ERROR_MEMORY, model->file.path, NULL, "there is no memory for %u graphs", n);
    for (uint32_t turn = 0; turn < 2 && !result; turn++) result = capture_plans(model, turn);
    for (uint32_t turn = 0; turn < 2 && !result; turn++) result = capture_pairs(model, turn);
    if (result) return cuda_failed(model, result, "making a graph of a plan");
    result = cuda->driver.cuStreamSynchronize(cuda->stream);
    return result ? cuda_failed(model, result, "making graphs of the plans") : LLMC_OK;
}

void cuda_drop_graphs(llmc_model *model)
{
    cuda *cuda = model->cuda;
    const plans *plans = &model->plans;
    for (uint32_t i = 0; cuda->graphs && i < 2 * plans->header.n_plans; i++)
        if (cuda->graphs[i]) cuda->driver.cuGraphExecDestroy(cuda->graphs[i]);
    for (uint32_t i = 0; cuda->pairs && i < 4 * plans->n_heads; i++)
        if (cuda->pairs[i]) cuda->driver.cuGraphExecDestroy(cuda->pairs[i]);
    free(cuda->graphs);
    free(cuda->pairs);
    cuda->graphs = cuda->pairs = NULL;
}

uint64_t cuda_count_nodes(const llmc_model *model)
{
    const plans *plans = &model->plans;
    uint64_t n_nodes = 0;
    if (model->cuda->is_one_by_one) return 0;
    for (uint32_t i = 0; i < plans->header.n_plans; i++) {
        const plan *plan = plans->all + i;
        const uint64_t n_graphs = is_prompt(plans, plan) || is_joined(plans, plan) ? 0 : is_sampler(plans, plan) ? 2 : 1;
        n_nodes += n_graphs * plan->n_calls;
    }
    for (uint32_t i = 0; i < plans->n_heads * (plans->n_adapted ? 2 : 1); i++) {
        const int is_adapted = i >= plans->n_heads;
        const plan *head = plans->heads + i % plans->n_heads, *joined = joined_of(plans, head, is_adapted);
        const plan *body = adapted_of(plans, body_of(plans, head), is_adapted);
        n_nodes += 2ull * (joined ? joined->n_calls : body ? body->n_calls + head->n_calls : 0);
    }
    return n_nodes;
}

/* -- one by one --------------------------------------------------------------------------------------------------- */

static llmc_status run_one_by_one(llmc_model *model, const plan *plan, uint32_t turn)
{
    const cuda_driver *driver = &model->cuda->driver;
    for (uint32_t i = 0; i < plan->n_calls; i++) {
        CUresult result = launch(model, plan->calls + i, turn, 1);
        if (!result) result = driver->cuStreamSynchronize(model->cuda->stream);
        if (!result) continue;
        char where[160];
        snprintf(where, sizeof where, "kernel '%s' (call %u of %u)", plan->calls[i].kernel->name, i + 1, plan->n_calls);
        return cuda_lose(model, result, where);
    }
    return LLMC_OK;
}

/* Events [n] at least. */
static CUresult have_events(cuda *cuda, uint32_t n)
{
    if (n <= cuda->n_events) return CUDA_SUCCESS;
    CUevent *more = realloc(cuda->events, n * sizeof *more);
    if (!more) return CUDA_ERROR_OUT_OF_MEMORY;
    cuda->events = more;
    for (; cuda->n_events < n; cuda->n_events++) {
        CUresult result = cuda->driver.cuEventCreate(cuda->events + cuda->n_events, CU_EVENT_DEFAULT);
        if (result) return result;
    }
    return CUDA_SUCCESS;
}

/* With an event before each kernel and after the last, which keeps kernels from overlapping. The GPU's clock is not the
 * host's: the last event is taken to happen when the host sees it. */
static llmc_status run_timed(llmc_model *model, const plan *plan, uint32_t turn)
{
    cuda *cuda = model->cuda;
    const cuda_driver *driver = &cuda->driver;
    engine *engine = &model->engine;
    uint32_t n = plan->n_calls;
    CUresult result = have_events(cuda, n + 1);
    if (!result) result = driver->cuEventRecord(cuda->events[0], cuda->stream);
    for (uint32_t i = 0; i < n && !result; i++) {
        result = launch(model, plan->calls + i, turn, 1);
        if (!result) result = driver->cuEventRecord(cuda->events[i + 1], cuda->stream);
    }
    if (!result) result = driver->cuStreamSynchronize(cuda->stream);
    float whole = 0, before = 0, after = 0; /* ms */
    if (!result) result = driver->cuEventElapsedTime(&whole, cuda->events[0], cuda->events[n]);
    uint64_t start = now_ns() - (uint64_t)(whole * 1e6);
    profile_begin(engine);
    for (uint32_t i = 0; i < n && !result; i++, before = after) {
        result = driver->cuEventElapsedTime(&after, cuda->events[0], cuda->events[i + 1]);
        profile_call(engine, plan->calls + i, start + (uint64_t)(before * 1e6), start + (uint64_t)(after * 1e6));
    }
    profile_end(engine);
    return result ? cuda_lose(model, result, "") : LLMC_OK;
}

llmc_status cuda_start(llmc_model *model, const plan *plan, uint32_t turn)
{
    cuda *cuda = model->cuda;
    if (model->engine.profile) return run_timed(model, plan, turn);
    if (cuda->is_one_by_one) return run_one_by_one(model, plan, turn);
    const uint32_t index = (uint32_t)(plan - model->plans.all);
    const CUgraphExec *graphs = cuda->graphs + (uint64_t)turn * model->plans.header.n_plans;
    CUresult result = is_prompt(&model->plans, plan) ? launch_all(model, plan, turn, 1)
                                                      : cuda->driver.cuGraphLaunch(graphs[index], cuda->stream);
    return result ? cuda_lose(model, result, "") : LLMC_OK;
}

/* Whether the head's rows that are wanted are those of the body, from the first on; what pads a head is row 0. */
static int are_rows_the_bodys(const llmc_model *model, const plan *head)
{
    uint32_t n = 0;
    while (n < head->n_rows && model->rows[n] == (int32_t)n) n++;
    for (uint32_t i = n; i < head->n_rows; i++)
        if (!n || model->rows[i]) return 0;
    return 1;
}

/* Whether both can be started as one: a joined step's rows must be the body's. */
static int is_pair(const llmc_model *model, const plan *body, const plan *head)
{
    if (!body || !head || body != body_of(&model->plans, head)) return 0;
    return !joined_of(&model->plans, head, 0) || are_rows_the_bodys(model, head);
}

static int has_graph(const llmc_model *model)
{
    return model->cuda->pairs && !model->engine.profile;
}

uint32_t cuda_next_turn(const llmc_model *model, const plan *body, const plan *head)
{
    return has_graph(model) && is_pair(model, body, head) ? !model->cuda->turn : 0;
}

llmc_status cuda_start_pair(llmc_model *model, const plan *body, const plan *head)
{
    cuda *cuda = model->cuda;
    const plans *plans = &model->plans;
    const int is_one = is_pair(model, body, head), has_adapter = is_adapted(model, body);
    cuda->turn = cuda_next_turn(model, body, head);
    if (head) cuda->n_told = head->n_rows;
    if (is_one && has_graph(model)) {
        CUgraphExec pair = *pair_at(model, head, cuda->turn, has_adapter);
        CUresult result = cuda->driver.cuGraphLaunch(pair, cuda->stream);
        return result ? cuda_lose(model, result, "") : LLMC_OK;
    }
    const plan *joined = is_one ? joined_of(plans, head, has_adapter) : NULL;
    if (joined) return cuda_start(model, joined, 0);
    body = adapted_of(plans, body, has_adapter);
    llmc_status status = body ? cuda_start(model, body, 0) : LLMC_OK;
    return status || !head ? status : cuda_start(model, head, 0);
}
