/* runtime.h - the parts of the runtime, from the file up to a step. One .c file a part, in this order:
 *
 *   error    the words of the last failure, one text a thread
 *   sha256   checks sections
 *   cpu      which instructions this machine has, and how many threads to run
 *   file     the artifact: trailer, directory, sections; this and the next two: artifact.h
 *   plan     the plan section, checked and turned into calls; its header: plan_header.c
 *   weights  which of the weights a program reads
 *   pool     threads, and the bell that they wait on
 *   invoke   calls a kernel
 *   profile  when each task began and ended, for who asks
 *   engine   walks the calls of a plan with all threads
 *   device   what runs plans: the CPU by the engine, or a GPU by
 *   cuda     its driver, context, memory, graphs, and steps that run ahead (cuda_*.c, each with a header)
 *   kv       pages of the KV cache, and slots of states, with reference counts
 *   sequence tokens of one text: its pages, its state and its last logits
 *   rows     rows of numbers that stand for tokens, and what makes them of pictures
 *   step     tokens of several sequences through bodies and heads
 *   sample   the next token
 *   advance  the next token and the step on it; a GPU goes on meanwhile
 *   speculate  a token and guesses behind it, in one step
 *   saved    what the file of a sequence has, and belongs to
 *   save     a sequence into a file
 *   restore  and back
 *   program  which of an artifact's programs this machine runs
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

#include "artifact.h"
#include "llmc.h"

enum { LLMC_ALIGNMENT = 64 }; /* bytes; of every pointer a kernel sees */
enum { LLMC_MAX_THREADS = 1024 };

/* -- error.c ------------------------------------------------------------------------------------------------------ */

/* Remember fact, place and hint (either may be NULL) as this thread's last error; returns status. */
llmc_status fail(llmc_status status, const char *place, const char *hint, const char *fact, ...)
    __attribute__((format(printf, 4, 5)));
const char *error_text(void);

/* -- sha256.c ----------------------------------------------------------------------------------------------------- */

/* A hash that bytes are added to piece by piece. */
typedef struct sha256_state {
    uint32_t words[8];
    uint64_t n_bytes;  /* added so far */
    uint8_t block[64]; /* of these, the last n_bytes % 64 */
} sha256_state;

void sha256_begin(sha256_state *state);
void sha256_add(sha256_state *state, const void *bytes, uint64_t n_bytes);
void sha256_end(const sha256_state *state, uint8_t digest[32]);
void sha256(const uint8_t *bytes, uint64_t n_bytes, uint8_t digest[32]);
void sha256_portable(const uint8_t *bytes, uint64_t n_bytes, uint8_t digest[32]);

/* -- cpu.c -------------------------------------------------------------------------------------------------------- */

/* Bits LLMC_CPU_*: instructions that both the processor and the operating system offer. */
uint32_t cpu_features(void);
/* Fails with LLMC_ERROR_TARGET, naming what is needed but not present. */
llmc_status cpu_check(uint32_t needed, uint32_t present, const char *path);
/* Ask the system for tiles, where AMX is needed; for a process that has them nothing changes. Fails with
 * LLMC_ERROR_TARGET when it refuses. */
llmc_status cpu_allow(uint32_t needed, const char *path);
/* "x86-64-v4", the level that has exactly these features; NULL for others. */
const char *cpu_level(uint32_t features);
/* CPUs this process may use: its affinity and its cgroup's quota, rounded up. At least 1. */
int32_t cpu_count(void);

/* -- pool.c ------------------------------------------------------------------------------------------------------- */

/* Of CLOCK_MONOTONIC. */
uint64_t now_ns(void);

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
    const plan *plan;         /* this and the next two are written by whoever moves on, before the bell rings */
    uint32_t n_next;          /* calls before this one are done, or running */
    const call *current;      /* whose tasks are being taken */
    _Atomic uint32_t failed;   /* 1 + index of a call whose kernel failed, or 0 */
    _Atomic uint32_t stopping;
    const char *path; /* of the artifact, for errors */
    llmc_profile *profile;  /* NULL: nobody wants to know; this and the next two: see profile.c */
    const call *first_call; /* of all plans */
    uint32_t n_runs;
    _Atomic uint64_t n_events; /* in profile, and beyond its capacity */
    pool pool;
} engine;

llmc_status engine_start(engine *engine, int32_t n_threads, const char *path);
void engine_stop(engine *engine);
/* Run the calls of a plan in order. Fails with LLMC_ERROR_KERNEL when a kernel does. */
llmc_status engine_run(engine *engine, const plan *plan);

/* -- profile.c ---------------------------------------------------------------------------------------------------- */

/* Around a plan, and after a task: when engine->profile is set. */
void profile_begin(engine *engine);
void profile_end(engine *engine);
void profile_task(engine *engine, const call *call, int32_t thread, uint32_t task, uint64_t start_ns);
/* The same for a kernel on a GPU, as one task. */
void profile_call(engine *engine, const call *call, uint64_t start_ns, uint64_t end_ns);
llmc_status profile(llmc_model *model, llmc_profile *profile);

/* -- device.c, cuda.c --------------------------------------------------------------------------------------------- */

/* What runs plans. It keeps the logits of the last heads in rows, the pages of the KV cache, and slots of states. A step
 * writes its input (model->tokens … rows), starts a body, a head, or both, and may write again after `finish`. What is
 * started runs in order. */
typedef struct device {
    uint32_t step_rows; /* what reading the weights once costs, in rows computed: plan_choose */
    /* Take all memory that steps need: model->kv, spaces and input. On an error close() follows. */
    llmc_status (*open)(llmc_model *model, const llmc_options *options);
    void (*close)(llmc_model *model);
    /* Start a body, then a head; either may be NULL. */
    llmc_status (*run)(llmc_model *model, const plan *body, const plan *head);
    /* Wait for all that was started; model->n_ahead is 0 then. */
    llmc_status (*finish)(llmc_model *model);
    /* Start copying a row of logits [n_vocab] to the host; `out` is written when finish returns. */
    llmc_status (*read_logits)(llmc_model *model, uint32_t row, float *out);
    /* Start copying a page; a slot of states. A failure shows in the next run. */
    void (*copy_page)(llmc_model *model, int32_t to, int32_t from);
    void (*copy_state)(llmc_model *model, int32_t to, int32_t from);
    /* Copy bytes of pages or slots to the host, and from there: it is done on return, behind all that was started. */
    llmc_status (*read)(llmc_model *model, void *to, const char *from, uint64_t n_bytes);
    llmc_status (*write)(llmc_model *model, char *to, const void *from, uint64_t n_bytes);
    /* The next two on a GPU alone: copy logits [n_vocab] back to a row; choose model->drawn [n_rows of the plan] as
     * model->draws say. */
    llmc_status (*write_logits)(llmc_model *model, uint32_t row, const float *logits);
    llmc_status (*draw)(llmc_model *model, const plan *sampler);
    /* On a GPU alone, or NULL: take the tokens [n_rows] of a body from where model->sources say, drawing first if there
     * is a sampler; start the body and the head; return when the tokens are in model->tokens. May be called while a
     * step runs; the input is the host's again when it returns. */
    llmc_status (*advance)(llmc_model *model, const plan *body, const plan *head, const plan *sampler, uint32_t n_rows);
} device;

/* model->sources: a row of the last head, which has chosen the token; or one of these, the second less an index in
 * model->draws. */
enum { LLMC_FROM_HOST = -1, LLMC_FROM_DRAW = -2 };

extern const device cpu_device, cuda_device;
/* What the driver calls the GPU. */
const char *cuda_name(const llmc_model *model);

/* -- kv.c --------------------------------------------------------------------------------------------------------- */

/* Slots of states are pages too: each of a size that is a whole sequence's, and held by several until one writes. */
typedef struct kv_cache {
    char *pages;         /* [n_pages, page_bytes] in the device's memory, which it takes and frees */
    uint64_t page_bytes; /* 0: the model keeps no cache */
    uint32_t page_tokens;
    uint32_t n_pages;
    uint32_t n_fresh;    /* pages from here on were never used */
    uint32_t n_released;
    uint32_t *n_holders; /* [n_pages] sequences that hold a page */
    int32_t *released;   /* [n_pages] a stack: used before, held by nobody */
} kv_cache;

/* Count pages for n_tokens; the device gives them memory. */
llmc_status kv_open(kv_cache *kv, const llmc_plan_header *header, uint64_t n_tokens, const char *path);
/* The same for n slots of states, of which plans->states says how large; none, if there are no states. */
llmc_status states_open(kv_cache *states, const llmc_plan_states *of, uint32_t n, const char *path);
llmc_status states_no_memory(const llmc_plan_states *of, uint32_t n, const char *path);
llmc_status kv_no_memory(const llmc_plan_header *header, uint64_t n_tokens, const char *path);
void kv_close(kv_cache *kv);
uint32_t kv_free_pages(const kv_cache *kv);
int32_t kv_take(kv_cache *kv); /* a page with one holder, or -1 */
void kv_share(kv_cache *kv, int32_t page);
int kv_is_shared(const kv_cache *kv, int32_t page);
void kv_release(kv_cache *kv, int32_t page);

/* -- a model, and what steps write into --------------------------------------------------------------------------- */

typedef struct candidate {
    float logit;
    int32_t token;
} candidate;

typedef struct given_rows given_rows;

/* Rows that stand for tokens. */
typedef struct given {
    given_rows *kept; /* [n_kept] by rising number */
    uint32_t n_kept, n_room;
    uint32_t n_ever; /* rows that there have been: their numbers are not used again */
    uint64_t n_rows; /* that are kept */
} given;

struct llmc_model {
    engine engine; /* first: it is aligned to cache lines */
    artifact file;
    plans plans;
    const device *device;
    struct cuda *cuda; /* NULL on a CPU */
    kv_cache kv;
    kv_cache states; /* page_bytes 0: the model has none */
    spaces spaces;
    int32_t *tokens;     /* [max_body_rows]; on a GPU as many as a head or a sampler has rows, if those are more */
    int32_t *positions;  /* [max_body_rows] */
    int32_t *page_table; /* [max_body_rows, pages_per_sequence] */
    int32_t *slots;      /* [max_body_rows]; NULL where there are no states */
    int32_t *adapters;   /* [max_body_rows]; NULL where there are none to choose from */
    given given;         /* rows that stand for tokens */
    float *taken;        /* [max_body_rows, n_row] those of a step */
    int32_t *is_given;   /* [max_body_rows]; NULL where no rows stand for tokens */
    int32_t *sees;       /* [max_body_rows]; NULL where no row sees what is behind it */
    float *pixels;       /* [channels, height, width] of a tile */
    float *made;         /* [n_rows, n_row] that the tower makes of it */
    int32_t *places;     /* what a tower of pictures of any size is told of them: LLMC_SPACE_PLACES */
    int32_t *turns;      /* [M, 3] LLMC_SPACE_TURNS; NULL: rows are turned as their positions say */
    int32_t *rows;       /* [max_head_rows] */
    float *logits;       /* [max_head_rows, n_vocab], or NULL when they are in a GPU's memory */
    int32_t *chosen;     /* [max_head_rows] the most likely token of each row, or NULL: the device does not say */
    int32_t *drawn;      /* [max_sampler_rows] */
    llmc_draw_record *draws; /* [max_sampler_rows] */
    llmc_sequence **owners;  /* [max_head_rows] whose logits a row holds, or NULL */
    int32_t *sources;        /* [max_head_rows] where a step that runs ahead has its tokens from */
    llmc_step_input *turn;   /* [max_body_rows] advance's input as that of a step */
    int32_t *turn_states;    /* [max_body_rows] of speculate: slots that are kept in front of a step; or NULL */
    uint32_t n_ahead;        /* rows of the device that are computed, or will be, but not in `chosen` yet */
    candidate *candidates;   /* [n_vocab] scratch memory of sample.c */
    float *adjusted;         /* [n_vocab] of adjust.c: logits to choose from, where they are not the model's own */
    uint32_t *counts;        /* [n_vocab] and how often each token was met; 0 between calls */
    char *memory;            /* [memory_bytes] what of these is the host's, and a CPU's arena and scratch memory */
    uint64_t memory_bytes;
};

/* A part of one piece of memory: a pointer is set to it. */
typedef struct memory_part {
    uint64_t n_bytes; /* rounded up to whole cache lines, so that no two threads' parts share one */
    void *at;         /* the pointer to set, or NULL */
} memory_part;

/* Round the parts [n_parts] up; returns their sum. No part may have more than 2^48 bytes. */
uint64_t memory_measure(memory_part *parts, int n_parts);
void memory_cut(char *memory, const memory_part *parts, int n_parts);

/* -- sequence.c --------------------------------------------------------------------------------------------------- */

struct llmc_sequence {
    llmc_model *model;
    uint32_t length;  /* tokens */
    uint32_t n_pages; /* ceil(length / page_tokens), more during a step */
    int has_logits;
    uint32_t row;   /* 1 + the device's row that has the logits after the last token; 0: `logits` has them */
    int32_t choice; /* the most likely token, -1 for none; where model->chosen is kept and row is 0 */
    int in_call;    /* already an input of the call that is being prepared */
    int32_t state;  /* its slot, or -1: it has no tokens, or the model no states; others may hold it until one writes */
    int is_repeated; /* its pages are copies, over and over, and not what the model made of its tokens */
    int32_t adapter; /* its number, or -1 */
    int32_t *pages;  /* [pages_per_sequence] */
    int32_t *tokens; /* [n_context] the first `length` */
    int32_t *behind; /* [n_context] what a token is turned by behind each of them; NULL where that is its position */
    float *logits;   /* [n_vocab] */
    uint8_t *note;   /* [n_note_bytes] that its file had beside it; NULL: none */
    uint64_t n_note_bytes;
};

llmc_status sequence_new(llmc_model *model, llmc_sequence **out);
llmc_status sequence_fork(const llmc_sequence *sequence, llmc_sequence **out);
llmc_status sequence_repeat(const llmc_sequence *sequence, int32_t n, llmc_sequence **out);
void sequence_free(llmc_sequence *sequence);
int32_t sequence_length(const llmc_sequence *sequence);
llmc_status sequence_truncate(llmc_sequence *sequence, int32_t n);
llmc_status sequence_tokens(const llmc_sequence *sequence, const int32_t **out);
int32_t sequence_adapter(const llmc_sequence *sequence);
llmc_status sequence_set_adapter(llmc_sequence *sequence, int32_t adapter);
llmc_status sequence_logits(const llmc_sequence *sequence, const float **out);
/* The logits after its last token are in a row of the device from now on. */
void sequence_claim_row(llmc_sequence *sequence, uint32_t row);
/* Copy its logits from the device's row, which others may have then. Without it they are lost. */
llmc_status sequence_keep_logits(llmc_sequence *sequence);
void sequence_drop_logits(llmc_sequence *sequence);
/* Bring its logits back to a row. Fails when every row is that of a sequence in this call. */
llmc_status sequence_restore_row(llmc_sequence *sequence);
/* Keep the logits of whoever has one of the first n rows: a head is going to write there. */
llmc_status rows_keep(llmc_model *model, uint32_t n_rows);
/* Hold pages of its own for n_tokens more, and a slot of its own. 0: there is none, or the cache is full;
 * sequence_settle then gives back what was taken. */
int sequence_reserve(llmc_sequence *sequence, uint64_t n_tokens);
/* Whether it wants a slot of its own and has none. */
int sequence_lacks_state(const llmc_sequence *sequence);
/* Give back the pages beyond its length, and without tokens the slot. */
void sequence_settle(llmc_sequence *sequence);
/* Take the sequence back to `length` tokens, and to a slot that was held beside it when it had so many; it takes over
 * that hold. */
void sequence_return(llmc_sequence *sequence, uint32_t length, int32_t state);

/* -- rows.c ------------------------------------------------------------------------------------------------------- */

/* The number of the first row that a model may be given: behind those of all tokens. */
uint32_t rows_first(const llmc_model *model);
/* The numbers [n_row] of the row that has a token's place; NULL: it is a token, or there is none. */
const float *rows_find(const llmc_model *model, int32_t token);
/* Of a kept row that lies in lines and columns: which one of them it is, and how many columns there are; of others 0. */
void rows_find_in_grid(const llmc_model *model, int32_t token, uint32_t *place, uint32_t *width);
/* Whether it is the number of a row, kept or given back. */
int rows_is_one(const llmc_model *model, int32_t token);
/* Whether it is a token's number, or a row's that is kept. */
llmc_status rows_check(const llmc_model *model, int32_t token);
/* Of a model whose pictures' rows see each other: which one of its picture a token stands for, 0 for others; how many
 * from there on belong together, 1 for others; whether tokens [n] have the rows of pictures whole, in their order. */
uint32_t rows_place(const llmc_model *model, int32_t token);
uint32_t rows_together(const llmc_model *model, int32_t token);
llmc_status rows_check_order(const llmc_model *model, const int32_t *tokens, size_t n);
llmc_status rows_new(llmc_model *model, const float *numbers, size_t n, int32_t *first);
llmc_status rows_in_grid(llmc_model *model, const float *numbers, uint32_t height, uint32_t width, int32_t *first);
llmc_status rows_free(llmc_model *model, int32_t first);
llmc_status rows_numbers(const llmc_model *model, int32_t first, const float **out, size_t *n);
llmc_status image_rows(llmc_model *model, const float *pixels, int32_t *first, size_t *n);

/* -- grid.c ------------------------------------------------------------------------------------------------------- */

llmc_status picture_rows(llmc_model *model, const float *patches, uint32_t height, uint32_t width, int32_t *first, size_t *n);
/* Give all of them back. */
void rows_close(given *given);

/* -- turns.c: of a model with model->turns ------------------------------------------------------------------------- */

/* Whether each row of a picture among tokens [n] stands behind the row before it. */
llmc_status turns_check(const llmc_sequence *sequence, const int32_t *tokens, size_t n);
/* What a row of a body is turned by, which has a sequence's token at `position`; those before it are known. */
void turns_fill(llmc_model *model, uint32_t row, llmc_sequence *sequence, int32_t token, uint32_t position);
/* Take all tokens of a sequence for a text's. */
void turns_of_text(llmc_sequence *sequence);

/* -- saved.c, save.c, restore.c ------------------------------------------------------------------------------------ */

/* The header of a file of this model's, but for its length, its hash and its counts. */
void saved_begin(const llmc_model *model, llmc_saved_header *header);
/* Whether it is a header of this version, and of this model's program; says of what it is if not. */
llmc_status saved_check(const llmc_model *model, const llmc_saved_header *header, const char *path);
/* Fails where nothing is kept of a sequence. */
llmc_status saved_is_possible(const llmc_model *model);
/* Part of a sequence: bytes [n_bytes] in memory of the host, or of the device, the other one being NULL. */
typedef llmc_status saved_move(void *context, void *host, char *device, uint64_t n_bytes);
/* Every part of a sequence that has its pages and its slot, in the order of the file, until one fails. */
llmc_status saved_walk(const llmc_sequence *sequence, saved_move *move, void *context);

enum { SAVED_CHUNK_BYTES = 1 << 20 }; /* between the file and a device at once */

llmc_status sequence_save(const llmc_sequence *sequence, const char *path, const void *note, size_t n_note_bytes);
llmc_status sequence_restore(llmc_model *model, const char *path, llmc_sequence **out);
llmc_status sequence_note(const llmc_sequence *sequence, const void **bytes, size_t *n_bytes);

/* -- program.c ---------------------------------------------------------------------------------------------------- */

/* Open the first program that this machine runs, of those that the options allow. */
llmc_status program_open(llmc_model *model, const llmc_options *options);
/* Give back what opening it took. */
void program_close(llmc_model *model);
/* What --target calls the machine of these fields of llmc_plan_header, into text [n]. */
void program_target(uint32_t device, uint32_t cuda_arch, uint32_t cpu_features, char *text, size_t n);

/* -- adjust.c ----------------------------------------------------------------------------------------------------- */

/* Whether biases or penalties change logits. */
int adjust_is_wanted(const llmc_sampling *how);
/* In place of logits [n_vocab] those that biases and penalties make of them; valid until the next call. */
llmc_status adjust_logits(llmc_model *model, const llmc_sampling *how, const float **logits);

/* -- step.c, sample.c, advance.c, speculate.c, api.c ----------------------------------------------------------------- */

/* What can be refused before anything changes, but for room; counts the tokens. */
llmc_status step_check(const llmc_model *model, const llmc_step_input *inputs, size_t n_inputs, uint64_t *n_tokens);
/* Pages for the tokens of all inputs, or for none. */
llmc_status step_reserve(llmc_model *model, const llmc_step_input *inputs, size_t n_inputs, uint64_t n_tokens);
/* Append what has run, or forget it. Returns status. */
llmc_status step_settle(const llmc_step_input *inputs, size_t n_inputs, llmc_status status);
/* One row of a body. A padding row (sequence NULL) has position -1 and no pages: attention skips it. */
void step_fill_row(llmc_model *model, uint32_t row, const llmc_sequence *sequence, int32_t token, uint32_t position);
llmc_status step(llmc_model *model, const llmc_step_input *inputs, size_t n_inputs);
llmc_status feed(llmc_sequence *sequence, const int32_t *tokens, size_t n_tokens);
/* Whether the settings are possible. */
llmc_status sample_check_how(const llmc_sampling *how);
/* The same, and whether the sequence has logits. */
llmc_status sample_check(const llmc_sequence *sequence, const llmc_sampling *how);
/* Of settings that were checked: whether they are not greedy. */
int sample_is_drawn(const llmc_sampling *how);
/* Whether they ask for what a device's sampler does not know: then the host chooses. */
int sample_is_hosted(const llmc_sampling *how);
/* The most likely token, where the device has found it and the host knows. */
llmc_status sample_choice(const llmc_sequence *sequence, int32_t *out);
/* What a sampler is told of a sequence whose logits are in a row. */
llmc_status sample_record(const llmc_sequence *sequence, const llmc_sampling *how, llmc_draw_record *record);
/* What sample() gives for logits [n_vocab] when the token's place is `position`, and how->allowed is `allowed`. */
llmc_status sample_at(llmc_model *model, const float *logits, uint32_t position, const llmc_sampling *how,
                      const uint32_t *allowed, int32_t *out);
/* The error of logits none of which is a number. */
llmc_status sample_no_number(void);
llmc_status sample(const llmc_sequence *sequence, const llmc_sampling *how, int32_t *out);
llmc_status sample_many(llmc_model *model, llmc_sample_input *inputs, size_t n_inputs);
llmc_status advance(llmc_model *model, llmc_advance_input *inputs, size_t n_inputs);
llmc_status speculate(llmc_model *model, llmc_speculate_input *inputs, size_t n_inputs);

/* Open the artifact at `path` with the kernels that this code is linked with; NULL: the file this code came from. */
llmc_status model_open(const char *path, const llmc_options *options, llmc_model **out);

#endif
