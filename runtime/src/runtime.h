/* runtime.h - the parts of the runtime, from the file up to a step. One .c file a part, in this order:
 *
 *   error    the words of the last failure, one text a thread
 *   sha256   checks sections
 *   cpu      which instructions this machine has, and how many threads to run
 *   file     the artifact: trailer, directory, sections
 *   plan     the plan section, checked and turned into calls
 *   pool     threads, and the bell that they wait on
 *   invoke   calls a kernel
 *   engine   walks the calls of a plan with all threads
 *   kv       pages of the KV cache, with reference counts
 *   sequence tokens of one text: its pages and its last logits
 *   step     tokens of several sequences through bodies and heads
 *   sample   the next token
 *   api      open, close, and the table that llmc_get_api returns
 *
 * Every symbol but llmc_get_api is hidden. Nothing here prints, exits, or allocates during a step.
 */
#ifndef LLMC_RUNTIME_H
#define LLMC_RUNTIME_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/types.h>

#include "format.h"
#include "llmc.h"

enum { LLMC_ALIGNMENT = 64 }; /* bytes; of every pointer a kernel sees */

/* -- error.c ------------------------------------------------------------------------------------------------------ */

/* Remember fact, place and hint (either may be NULL) as this thread's last error; returns status. */
llmc_status fail(llmc_status status, const char *place, const char *hint, const char *fact, ...)
    __attribute__((format(printf, 4, 5)));
const char *error_text(void);

/* -- sha256.c ----------------------------------------------------------------------------------------------------- */

void sha256(const uint8_t *bytes, uint64_t n_bytes, uint8_t digest[32]);
void sha256_portable(const uint8_t *bytes, uint64_t n_bytes, uint8_t digest[32]);

/* -- cpu.c -------------------------------------------------------------------------------------------------------- */

/* Bits LLMC_CPU_*: instructions that both the processor and the operating system offer. */
uint32_t cpu_features(void);
/* Fails with LLMC_ERROR_TARGET, naming what is needed but not present. */
llmc_status cpu_check(uint32_t needed, uint32_t present, const char *path);
/* CPUs this process may use: its affinity and its cgroup's quota, rounded up. At least 1. */
int32_t cpu_count(void);

/* -- file.c ------------------------------------------------------------------------------------------------------- */

typedef struct range {
    const uint8_t *bytes; /* [n_bytes], inside the mapped file; NULL when the section is absent */
    uint64_t n_bytes;
} range;

typedef struct artifact {
    char path[4096];
    const uint8_t *bytes; /* [n_bytes] the whole file, mapped read-only */
    uint64_t n_bytes;
    range weights, plan, vocabulary;
} artifact;

/* Find the file that this code was loaded from. */
llmc_status artifact_find(artifact *file);
/* Map the file at file->path; check trailer and directory, and the SHA-256 of every section but the weights. */
llmc_status artifact_open(artifact *file);
void artifact_close(artifact *file);
/* Zeroed memory straight from the system, untouched until used; NULL when there is none. n_bytes may be 0. */
void *memory_map(uint64_t n_bytes);
void memory_unmap(void *bytes, uint64_t n_bytes);

/* -- plan.c ------------------------------------------------------------------------------------------------------- */

typedef struct argument {
    uint32_t space;         /* LLMC_SPACE_* */
    uint64_t offset;        /* bytes from the start of the space */
    char *pointer;          /* where that is in memory, for thread 0; set by plan_bind */
    uint64_t thread_stride; /* bytes from one thread's to the next one's: 0 but in scratch memory */
} argument;

typedef struct call {
    const llmc_kernel_entry *kernel;
    const argument *arguments; /* [kernel->n_pointers] */
    uint32_t grid;
    uint32_t n_tasks; /* 1 runs on one thread; set by plan_bind */
} call;

typedef struct plan {
    uint32_t n_rows; /* M of a body, R of a head */
    uint32_t n_calls;
    const call *calls; /* [n_calls] */
} plan;

typedef struct plans {
    llmc_plan_header header;
    plan *bodies; /* [n_bodies], by rising n_rows */
    plan *heads;  /* [n_heads], by rising n_rows */
    uint32_t n_bodies, n_heads;
    uint32_t max_body_rows, max_head_rows;
    plan *all;           /* [header.n_plans] */
    call *calls;         /* [header.n_calls] */
    argument *arguments; /* [header.n_arguments] */
} plans;

/* Where the spaces lie in memory. */
typedef struct spaces {
    char *base[LLMC_N_SPACES];
    uint64_t scratch_stride; /* bytes from one thread's scratch memory to the next one's */
} spaces;

/* Check and copy the plan section. Every argument of every call lies inside its space afterwards. */
llmc_status plans_load(plans *plans, const artifact *file);
/* Give every argument its address and every call its number of tasks. */
void plans_bind(plans *plans, const spaces *spaces, int32_t n_threads);
void plans_free(plans *plans);
/* Which plan [n_plans, by rising n_rows] to run next when n_rows rows are left. */
const plan *plan_choose(const plan *plans, uint32_t n_plans, uint64_t n_rows);

/* -- pool.c ------------------------------------------------------------------------------------------------------- */

/* A word that threads watch: they spin for a moment, then yield, then sleep. */
typedef struct bell {
    _Alignas(64) _Atomic uint64_t value;
    _Alignas(64) _Atomic uint32_t epoch; /* what sleepers sleep on */
    _Atomic uint32_t n_sleeping;
} bell;

/* Change the value and wake whoever sleeps. What was written before is seen by who sees the new value. */
void bell_ring(bell *bell, uint64_t value);
/* Return when the value is no longer `old`. */
void bell_wait(bell *bell, uint64_t old);

typedef struct pool {
    struct pool_thread *threads; /* [n_threads - 1]: the caller of a step is thread 0 */
    int32_t n_threads;
    int32_t n_started;
    pid_t process; /* threads do not survive fork() */
} pool;

/* Start threads 1 … n_threads - 1, each running work(context, thread) until that returns. */
llmc_status pool_start(pool *pool, int32_t n_threads, void (*work)(void *context, int32_t thread), void *context);
void pool_join(pool *pool);
/* Whether the threads are there: false in a child that was forked after pool_start. */
int pool_alive(const pool *pool);

/* -- invoke.c ------------------------------------------------------------------------------------------------------ */

/* Run one task of a call on thread 0 <= thread < n_threads. Not 0: the kernel failed. */
int32_t invoke(const call *call, int32_t thread, int32_t task);

/* -- engine.c ----------------------------------------------------------------------------------------------------- */

typedef struct engine {
    bell bell;                            /* whose turn it is, and how many of its tasks are left: see engine.c */
    _Alignas(64) _Atomic uint32_t n_done; /* of the current call's tasks */
    const plan *plan;         /* this and the next two are written by whoever advances, before the bell rings */
    uint32_t n_next;          /* calls before this one are done, or running */
    const call *current;      /* whose tasks are being taken */
    _Atomic uint32_t failed;   /* 1 + index of a call whose kernel failed, or 0 */
    _Atomic uint32_t stopping;
    const char *path; /* of the artifact, for errors */
    pool pool;
} engine;

llmc_status engine_start(engine *engine, int32_t n_threads, const char *path);
void engine_stop(engine *engine);
/* Run the calls of a plan in order. Fails with LLMC_ERROR_KERNEL when a kernel does. */
llmc_status engine_run(engine *engine, const plan *plan);

/* -- kv.c --------------------------------------------------------------------------------------------------------- */

typedef struct kv_cache {
    char *pages;         /* [n_pages, page_bytes] */
    uint64_t page_bytes; /* 0: the model keeps no cache */
    uint32_t page_tokens;
    uint32_t n_pages;
    uint32_t n_fresh;    /* pages from here on were never used */
    uint32_t n_released;
    uint32_t *n_holders; /* [n_pages] sequences that hold a page */
    int32_t *released;   /* [n_pages] a stack: used before, held by nobody */
} kv_cache;

llmc_status kv_open(kv_cache *kv, const llmc_plan_header *header, uint64_t n_tokens, const char *path);
void kv_close(kv_cache *kv);
uint32_t kv_free_pages(const kv_cache *kv);
int32_t kv_take(kv_cache *kv); /* a page with one holder, or -1 */
void kv_share(kv_cache *kv, int32_t page);
void kv_release(kv_cache *kv, int32_t page);
/* A page that only the caller holds, with the same contents; the caller's hold on `page` passes to it. -1: none. */
int32_t kv_own(kv_cache *kv, int32_t page);

/* -- a model, and what steps write into --------------------------------------------------------------------------- */

typedef struct candidate {
    float logit;
    int32_t token;
} candidate;

struct llmc_model {
    engine engine; /* first: it is aligned to cache lines */
    artifact file;
    plans plans;
    kv_cache kv;
    spaces spaces;
    int32_t *tokens;     /* [max_body_rows] */
    int32_t *positions;  /* [max_body_rows] */
    int32_t *page_table; /* [max_body_rows, pages_per_sequence] */
    int32_t *rows;       /* [max_head_rows] */
    float *logits;       /* [max_head_rows, n_vocab] */
    candidate *candidates; /* [n_vocab] scratch memory of sample.c */
    char *memory;          /* [memory_bytes] all of these, the arena and the threads' scratch memory */
    uint64_t memory_bytes;
};

/* -- sequence.c --------------------------------------------------------------------------------------------------- */

struct llmc_sequence {
    llmc_model *model;
    uint32_t length;  /* tokens */
    uint32_t n_pages; /* ceil(length / page_tokens), more during a step */
    int has_logits;
    int in_step;    /* already an input of the step that is being prepared */
    int32_t *pages; /* [pages_per_sequence] */
    float *logits;  /* [n_vocab] after the last token */
};

llmc_status sequence_new(llmc_model *model, llmc_sequence **out);
llmc_status sequence_fork(const llmc_sequence *sequence, llmc_sequence **out);
void sequence_free(llmc_sequence *sequence);
int32_t sequence_length(const llmc_sequence *sequence);
llmc_status sequence_truncate(llmc_sequence *sequence, int32_t n);
llmc_status sequence_logits(const llmc_sequence *sequence, const float **out);
/* Hold pages of its own for n_tokens more. 0: the cache is full; sequence_settle then gives back what was taken. */
int sequence_reserve(llmc_sequence *sequence, uint64_t n_tokens);
/* Give back the pages beyond its length. */
void sequence_settle(llmc_sequence *sequence);

/* -- step.c, sample.c, api.c -------------------------------------------------------------------------------------- */

llmc_status step(llmc_model *model, const llmc_step_input *inputs, size_t n_inputs);
llmc_status feed(llmc_sequence *sequence, const int32_t *tokens, size_t n_tokens);
llmc_status sample(const llmc_sequence *sequence, const llmc_sampling *how, int32_t *out);

/* Open the artifact at `path` with the kernels that this code is linked with; NULL: the file this code came from. */
llmc_status model_open(const char *path, const llmc_options *options, llmc_model **out);

#endif
