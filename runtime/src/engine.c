/* engine.c - walks the calls of a plan with all threads.
 *
 * A plan is one parallel region. Threads take the tasks of a call one by one, so the barrier after a call is "all
 * tasks are done", not "all threads have come": a thread that the system has put aside delays nobody. Whoever
 * finishes the last task runs the calls that have one task only, then rings the bell for the next call with more.
 * How many tasks are left and the turn of the call they belong to are one word, so that a late thread never takes a
 * task of another call. Which thread runs a task never changes its result. */
#include "runtime.h"

static uint64_t bell_value(uint64_t turn, uint32_t n_left)
{
    return turn << 32 | n_left;
}

static void run_task(engine *engine, const call *call, int32_t thread, uint32_t task)
{
    if (invoke(call, thread, (int32_t)task) != 0)
        atomic_store(&engine->failed, 1 + (uint32_t)(call - engine->plan->calls));
}

/* Go on to the next call with several tasks, or to the end. Only one thread is here at a time: the one that has seen
 * the last task done, and while it is here no other thread touches the plan. */
static void advance(engine *engine, int32_t thread)
{
    uint64_t turn = (atomic_load(&engine->bell.value) >> 32) + 1;
    atomic_store(&engine->n_done, 0);
    while (engine->n_next < engine->plan->n_calls && !atomic_load(&engine->failed)) {
        const call *call = engine->plan->calls + engine->n_next++;
        if (call->n_tasks > 1) {
            engine->current = call;
            bell_ring(&engine->bell, bell_value(turn, call->n_tasks));
            return;
        }
        run_task(engine, call, thread, 0);
    }
    atomic_store(&engine->running, 0);
    bell_ring(&engine->bell, bell_value(turn, 0));
}

/* Take tasks of the current call until none is left. Returns the bell's last value. */
static uint64_t take_tasks(engine *engine, int32_t thread, uint64_t value)
{
    uint32_t n_done = 0;
    const call *call = NULL;
    while ((uint32_t)value) {
        if (!atomic_compare_exchange_weak(&engine->bell.value, &value, value - 1)) continue;
        call = engine->current; /* stays the same until this thread has said that the task is done */
        run_task(engine, call, thread, (uint32_t)value - 1);
        n_done++;
        value = atomic_load(&engine->bell.value);
    }
    if (n_done && atomic_fetch_add(&engine->n_done, n_done) + n_done == call->n_tasks) {
        advance(engine, thread);
        value = atomic_load(&engine->bell.value);
    }
    return value;
}

static void work(void *context, int32_t thread)
{
    engine *engine = context;
    while (!atomic_load(&engine->stopping)) {
        uint64_t value = take_tasks(engine, thread, atomic_load(&engine->bell.value));
        if ((uint32_t)value == 0 && !atomic_load(&engine->stopping)) bell_wait(&engine->bell, value);
    }
}

llmc_status engine_start(engine *engine, int32_t n_threads, const char *path)
{
    engine->path = path;
    llmc_status status = pool_start(&engine->pool, n_threads, work, engine);
    if (status) engine_stop(engine);
    return status;
}

void engine_stop(engine *engine)
{
    atomic_store(&engine->stopping, 1);
    bell_ring(&engine->bell, bell_value((atomic_load(&engine->bell.value) >> 32) + 1, 0));
    pool_join(&engine->pool);
}

llmc_status engine_run(engine *engine, const plan *plan)
{
    if (!pool_alive(&engine->pool))
        return fail(LLMC_ERROR_ARGUMENT, engine->path, "open the model after fork()",
                    "this process was forked after the model was opened; the model's threads are not here");
    engine->plan = plan;
    engine->n_next = 0;
    atomic_store(&engine->failed, 0);
    atomic_store(&engine->running, 1);
    advance(engine, 0);
    while (atomic_load(&engine->running)) {
        uint64_t value = take_tasks(engine, 0, atomic_load(&engine->bell.value));
        if ((uint32_t)value == 0 && atomic_load(&engine->running)) bell_wait(&engine->bell, value);
    }
    uint32_t failed = atomic_load(&engine->failed);
    if (!failed) return LLMC_OK;
    return fail(LLMC_ERROR_KERNEL, engine->path, NULL, "kernel '%s' failed (call %u of %u)",
                plan->calls[failed - 1].kernel->name, failed, plan->n_calls);
}
