/* profile.c - when each task began and ended, for a caller who gave memory for it. */
#include "runtime.h"

/* Before the first call of a plan, and after the last: in between, threads take places in the list one by one. */
void profile_begin(engine *engine)
{
    engine->n_runs++;
    atomic_store(&engine->n_events, engine->profile->n_events);
}

void profile_end(engine *engine)
{
    llmc_profile *profile = engine->profile;
    uint64_t n = atomic_load(&engine->n_events), kept = n < profile->capacity ? n : profile->capacity;
    profile->n_lost += n - kept;
    profile->n_events = kept;
}

static void keep(engine *engine, llmc_event event)
{
    uint64_t place = atomic_fetch_add(&engine->n_events, 1);
    if (place < engine->profile->capacity) engine->profile->events[place] = event;
}

void profile_task(engine *engine, const call *call, int32_t thread, uint32_t task, uint64_t start_ns)
{
    keep(engine, (llmc_event){
        .start_ns = start_ns,
        .end_ns = now_ns(),
        .run = engine->n_runs,
        .call = (uint32_t)(call - engine->first_call),
        .task = task,
        .thread = (uint32_t)thread,
    });
}

void profile_call(engine *engine, const call *call, uint64_t start_ns, uint64_t end_ns)
{
    uint32_t index = (uint32_t)(call - engine->first_call);
    keep(engine, (llmc_event){.start_ns = start_ns, .end_ns = end_ns, .run = engine->n_runs, .call = index});
}

llmc_status profile(llmc_model *model, llmc_profile *profile)
{
    if (!model) return fail(LLMC_ERROR_ARGUMENT, "profile", NULL, "the model is NULL");
    if (profile && profile->size < sizeof *profile)
        return fail(LLMC_ERROR_ARGUMENT, "profile", "set it to sizeof the struct", "llmc_profile.size is %u",
                    profile->size);
    if (profile && (profile->n_events > profile->capacity || (!profile->events && profile->capacity)))
        return fail(LLMC_ERROR_ARGUMENT, "profile", NULL, "%s",
                    profile->events ? "there are more events than the capacity" : "the events are NULL");
    model->engine.profile = profile;
    model->engine.first_call = model->plans.calls;
    model->engine.n_runs = 0;
    return LLMC_OK;
}
