/* engine.c - walks the calls of a plan with all threads.
 *
 * A plan is one parallel region. Threads take the tasks of a call one by one, so the barrier after a call is "all
 * tasks are done", not "all threads have come": a thread that the system has put aside delays nobody. Whoever
 * finishes the last task runs the calls that have one task only, then rings the bell for the next call with more.
 * How many tasks are left and the turn of the call they belong to are one word, so that a late thread never takes a
 * task of another call. Which thread runs a task never changes its result. */
#include "runtime.h"

/* The bell's value: the turn, DONE when no plan is running, and how many tasks nobody has taken yet. */
#define TURN (1ull << 32)
#define DONE (1ull << 31)

static uint32_t tasks_left(uint64_t value)
{
    return (uint32_t)(value & (DONE - 1));
}

static uint64_t next_turn(engine *engine)
{
    return (atomic_load(&engine->bell.value) / TURN + 1) * TURN;
}

static void run_task(engine *engine, const call *call, int32_t thread, uint32_t task)
{
    uint64_t start = engine->profile ? now_ns() : 0;
    if (invoke(call, thread, (int32_t)task) != 0)
        atomic_store(&engine->failed, 1 + (uint32_t)(call - engine->plan->calls));
    if (engine->profile) profile_task(engine, call, thread, task, start);
}

/* Go on to the next call with several tasks, or to the end. One thread at a time is here: whoever has seen the last
 * task done. Once it has rung the bell the others, and the next plan, go on: so that is the last thing it does. */
static void move_on(engine *engine, int32_t thread)
{
    uint64_t turn = next_turn(engine);
    atomic_store(&engine->n_done, 0);
    while (engine->n_next < engine->plan->n_calls && !atomic_load(&engine->failed)) {
        const call *call = engine->plan->calls + engine->n_next++;
        if (call->n_tasks > 1) {
            engine->current = call;
            bell_ring(&engine->bell, turn + call->n_tasks);
            return;
        }
        run_task(engine, call, thread, 0);
    }
    bell_ring(&engine->bell, turn + DONE);
}

/* Take tasks of the current call until none is left. Returns the bell's last value. */
static uint64_t take_tasks(engine *engine, int32_t thread, uint64_t value)
{
    uint32_t n_done = 0;
    const call *call = NULL;
    while (tasks_left(value)) {
        if (!atomic_compare_exchange_weak(&engine->bell.value, &value, value - 1)) continue;
        call = engine->current; /* stays the same until this thread has said that the task is done */
        run_task(engine, call, thread, call->n_tasks - tasks_left(value));
        n_done++;
        value = atomic_load(&engine->bell.value);
    }
    if (n_done && atomic_fetch_add(&engine->n_done, n_done) + n_done == call->n_tasks) {
        move_on(engine, thread);
        value = atomic_load(&engine->bell.value);
    }
    return value;
}

static void work(void *context, int32_t thread)
{
    engine *engine = context;
    while (!atomic_load(&engine->stopping)) {
        uint64_t value = take_tasks(engine, thread, atomic_load(&engine->bell.value));
        if (!tasks_left(value) && !atomic_load(&engine->stopping)) bell_wait(&engine->bell, value);
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
    bell_ring(&engine->bell, next_turn(engine) + DONE);
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
    if (engine->profile) profile_begin(engine);
    move_on(engine, 0);
    uint64_t value = atomic_load(&engine->bell.value);
    while (!(value & DONE)) {
        value = take_tasks(engine, 0, value);
        if (value & DONE || tasks_left(value)) continue;
        bell_wait(&engine->bell, value);
        value = atomic_load(&engine->bell.value);
    }
    if (engine->profile) profile_end(engine);
    uint32_t failed = atomic_load(&engine->failed);
    if (!failed) return LLMC_OK;
    return fail(LLMC_ERROR_KERNEL, engine->path, NULL, "kernel '%s' failed (call %u of %u)",
                plan->calls[failed - 1].kernel->name, failed, plan->n_calls);
}
