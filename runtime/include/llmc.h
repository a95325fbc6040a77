/* llmc.h - run a model compiled by llmc. C99, no dependencies but libc.
 *
 *   void *file = dlopen("./model.so", RTLD_NOW);
 *   const llmc_api *api = ((llmc_get_api_function)dlsym(file, "llmc_get_api"))(LLMC_API_VERSION);
 *   llmc_model *model;
 *   llmc_sequence *sequence;
 *   int32_t token;
 *   if (api->open(NULL, &model) || api->sequence_new(model, &sequence)) die(api->last_error());
 *   if (api->feed(sequence, prompt, n_prompt)) die(api->last_error());
 *   while (!api->sample(sequence, NULL, &token) && !api->is_eos(model, token) && !api->feed(sequence, &token, 1))
 *       print(token);
 *   api->sequence_free(sequence);
 *   api->close(model);
 *
 * The artifact is its own runtime: every artifact exports one symbol, llmc_get_api, and finds its weights in its own
 * file, so that several artifacts live in one process. Linking works as well: cc app.c ./model.so.
 *
 * Ownership: whoever calls open or sequence_new calls close or sequence_free; both take NULL. Free the sequences of a
 *   model before it. Every other pointer returned is borrowed.
 * Threads: calls on one model and its sequences are made one at a time; different models are independent. A step runs
 *   on the calling thread and on n_threads - 1 more, which take no signals and sleep between steps. After fork() the
 *   child must open the model anew (a step of the parent's model is refused there); the parent is not disturbed. Close
 *   the models of an artifact before dlclose().
 * Errors: functions return a status; last_error() has the words: "fact", then "  at: place" and "  hint: what to do" on
 *   lines of their own, where there are any. Nothing is printed, and nothing ends the process.
 * Structs passed in start with `size`, set by the caller to sizeof the struct, so that they may grow.
 */
#ifndef LLMC_H
#define LLMC_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Raised when a function or a struct changes meaning; grown tables keep their version. */
#define LLMC_API_VERSION 1

typedef enum llmc_status {
    LLMC_OK = 0,
    LLMC_ERROR_IO = 1,       /* a file could not be opened, read or mapped */
    LLMC_ERROR_FORMAT = 2,   /* not an artifact, truncated, damaged, or of another version */
    LLMC_ERROR_TARGET = 3,   /* compiled for instructions, or a GPU, that this machine lacks */
    LLMC_ERROR_MEMORY = 4,   /* an allocation failed, or the KV cache is full */
    LLMC_ERROR_ARGUMENT = 5, /* a caller's mistake: NULL, a token out of range, a sequence past the context */
    LLMC_ERROR_KERNEL = 6,   /* a kernel reported failure, or a GPU's driver did */
} llmc_status;

typedef struct llmc_model llmc_model;
typedef struct llmc_sequence llmc_sequence;

/* Which programs of an artifact open may take; it has one for each target it was compiled for. */
enum { LLMC_ON_ANY = 0, LLMC_ON_CPU = 1, LLMC_ON_CUDA = 2 };

typedef struct llmc_options {
    uint32_t size;      /* sizeof(llmc_options) */
    int32_t n_threads;  /* 0: as many as this process may use */
    uint64_t kv_tokens; /* room for the tokens of all sequences together; 0: the default, or on a GPU what fits */
    int32_t device;     /* of programs for GPUs: 1 + the GPU's number; 0: $LLMC_CUDA_DEVICE, or the first */
    /* Called while weights are copied to a GPU, by whoever called open; `context` is passed on. Not 0: stop. */
    int (*progress)(void *context, uint64_t n_bytes_done, uint64_t n_bytes);
    void *context;
    int32_t run_on; /* LLMC_ON_*; the first program that this machine runs is taken, of those that are allowed */
    uint32_t n_slots; /* sequences that have tokens at once, of a model with states; 0: the default */
} llmc_options;

/* Facts about a model; counts are in elements. */
typedef struct llmc_info {
    uint32_t size; /* sizeof(llmc_info) as the caller knows it */
    int32_t n_vocab;   /* columns of the logits */
    int32_t n_context; /* most tokens a sequence can hold */
    int32_t n_threads;
    int32_t max_step_tokens; /* M of the largest plan */
    int32_t bos_token;       /* or -1 */
    uint64_t weight_bytes;   /* that this program reads */
    uint64_t kv_bytes_per_token;
    uint64_t kv_tokens;      /* room in the KV cache */
    uint64_t kv_tokens_free; /* of these, in pages no sequence holds */
    const char *device;      /* what runs it: "CPU", or a GPU's name; lives as long as the model */
    int32_t program;         /* which of the artifact's targets that is, counted from 0 */
    int32_t page_tokens;     /* of a page of the KV cache; 0: the artifact is older than this field */
    uint32_t sampling_bytes; /* sizeof(llmc_sampling) as the artifact knows it; 0: it is older than this field */
    uint32_t n_slots;        /* for the states of sequences; 0: the model has none */
    uint32_t n_slots_free;   /* of these, those that no sequence holds */
    uint64_t slot_bytes;     /* of one */
    int32_t n_tokens;        /* that there are, where they are not n_vocab; 0: the artifact is older than this field */
    int32_t is_whole;        /* whether a text is read whole: in one input, by a sequence that is empty */
    int32_t n_types;         /* of tokens: one of type t is given as its number + t * n_tokens; 0: older than this field */
    int32_t n_adapters;      /* that a sequence may choose from; numbered from 0 */
    int32_t n_row;           /* numbers of a row that may stand for a token, in place of its embedding; 0: none may */
    int32_t tile[3];         /* channels, height and width of what image_rows takes; 0: the artifact takes no pictures */
    int32_t n_tile_rows;     /* that it makes of a tile */
    uint32_t picture_rows;   /* rows of a picture that see each other, and so are given whole; 0: none do */
    uint64_t n_rows;         /* that are kept now */
    uint32_t patch;          /* numbers of a patch of a picture of any size, as picture_rows takes it; 0: it takes none */
    uint32_t merge;          /* patches along a side of what becomes one row */
    uint32_t most_rows;      /* that such a picture may become */
    uint32_t reserved;
} llmc_info;

/* What is added to a token's logit. */
typedef struct llmc_bias {
    int32_t token;
    float value;
} llmc_bias;

/* How to choose the next token. NULL, or temperature 0: the most likely. The fields behind `seed` ask for nothing when
 * they are 0; a runtime whose info.sampling_bytes ends before one of them does not see it. Where one of them asks for
 * something, a GPU's logits of that sequence are copied to the host, which chooses, and advance does not run ahead. */
typedef struct llmc_sampling {
    uint32_t size;     /* sizeof(llmc_sampling) */
    float temperature; /* divides the logits */
    int32_t top_k;     /* keep the k most likely; 0 keeps all */
    float top_p;       /* then the smallest set whose probability reaches p; 1 keeps all */
    uint64_t seed;     /* with the position of the token decides the draw: the same seed, the same text */
    /* NULL, or a bit for each token, [(n_vocab + 31) / 32], bit i % 32 of word i / 32: a token whose bit is 0 is not
     * chosen, as if it were no part of the vocabulary. */
    const uint32_t *allowed;
    /* Logits change before temperature: biases are added, then each token of the text so far is penalized. */
    const llmc_bias *biases; /* [n_biases] */
    uint32_t n_biases;
    float min_p;              /* after top_p keep what is at least so many times as likely as the most likely; at most 1 */
    const int32_t *tokens;    /* [n_tokens] the text so far, as the penalties are to see it */
    uint32_t n_tokens;
    uint32_t n_prompt;        /* of these, the first, which were given; the others were generated */
    float repetition_penalty; /* divides the logits above 0 of `tokens`, and multiplies the others; 1 changes nothing */
    float frequency_penalty;  /* is subtracted from a token's logit for each time that it was generated */
    float presence_penalty;   /* is subtracted once from that of a token that was generated */
    uint32_t reserved;        /* 0 */
} llmc_sampling;

/* A sequence's part of sample_many. */
typedef struct llmc_sample_input {
    const llmc_sequence *sequence;
    const llmc_sampling *how; /* NULL: the most likely */
    int32_t token;            /* out */
} llmc_sample_input;

/* A sequence's part of advance. */
typedef struct llmc_advance_input {
    llmc_sequence *sequence;
    const llmc_sampling *how; /* NULL: the most likely */
    int32_t token;            /* out */
} llmc_advance_input;

/* A sequence's part of a step: tokens[n_tokens] to append. */
typedef struct llmc_step_input {
    llmc_sequence *sequence;
    const int32_t *tokens;
    size_t n_tokens;
    float *logits; /* NULL, or [n_tokens, n_vocab]: the logits after each of these tokens */
} llmc_step_input;

/* A sequence's part of speculate: tokens[n_tokens] to append, of which the last n_guesses are guesses. */
typedef struct llmc_speculate_input {
    llmc_sequence *sequence;
    const llmc_sampling *how; /* NULL: the most likely */
    const int32_t *tokens;
    size_t n_tokens;
    size_t n_guesses; /* less than n_tokens */
    /* NULL, or [n_guesses, (n_vocab + 31) / 32]: which tokens are allowed in a guess's place; see llmc_sampling. */
    const uint32_t *allowed;
    float *logits;    /* [n_tokens, n_vocab]: the logits after each of these tokens; may be NULL without guesses */
    size_t n_right;   /* out: how many of the guesses were appended */
} llmc_speculate_input;

/* A task of a kernel call, as it ran. Times are of CLOCK_MONOTONIC. */
typedef struct llmc_event {
    uint64_t start_ns, end_ns;
    uint32_t run;    /* of one plan; counted from 1 since profile() was called */
    uint32_t call;   /* index among the calls of the artifact's plan section, which says the plan and the kernel */
    uint32_t task;
    uint32_t thread; /* 0: the one that called step */
} llmc_event;

/* Memory of the caller's for events. */
typedef struct llmc_profile {
    uint32_t size;      /* sizeof(llmc_profile) */
    uint64_t capacity;
    uint64_t n_events;  /* kept so far; the caller sets it to 0 to start over */
    uint64_t n_lost;    /* found no room */
    llmc_event *events; /* [capacity], in no order */
} llmc_profile;

typedef struct llmc_api {
    uint32_t size;    /* sizeof(llmc_api) as the artifact knows it */
    uint32_t version; /* LLMC_API_VERSION */

    /* The last failure on this thread, until the next one. Never NULL. */
    const char *(*last_error)(void);

    /* -- model ----------------------------------------------------------- */
    /* Check the artifact and map it: milliseconds, whatever its size, since weights are read when they are used; to a
     * GPU they are copied. Takes memory for the KV cache and the activations. options: NULL for the defaults. */
    llmc_status (*open)(const llmc_options *options, llmc_model **out);
    void (*close)(llmc_model *model);
    llmc_status (*info)(const llmc_model *model, llmc_info *out);
    int (*is_eos)(const llmc_model *model, int32_t token);
    /* The text of a token: borrowed bytes, not ended by NUL, perhaps a part of a UTF-8 character. */
    llmc_status (*token_text)(const llmc_model *model, int32_t token, const char **bytes, size_t *n_bytes);

    /* -- sequence: tokens and their KV cache, and the state of a model that has some: after an LLMC_ERROR_KERNEL it is
     * lost, and the sequence is empty ------------------------------------- */
    llmc_status (*sequence_new)(llmc_model *model, llmc_sequence **out);
    /* A copy, logits included, that shares the pages of the original: the last one, when it is not full, until either
     * of the two is fed; likewise the state, so that it may then want a slot. */
    llmc_status (*sequence_fork)(const llmc_sequence *sequence, llmc_sequence **out);
    void (*sequence_free)(llmc_sequence *sequence);
    int32_t (*sequence_length)(const llmc_sequence *sequence);
    /* Keep the first n tokens, forget the rest (and the logits). A model with states (info.slot_bytes) has only those
     * behind the last token: there n is 0 or the length. Where the rows of a picture see each other (info.picture_rows)
     * a cut within one leaves it out: sequence_length says what is kept. */
    llmc_status (*sequence_truncate)(llmc_sequence *sequence, int32_t n);

    /* -- running ---------------------------------------------------------- */
    /* Append tokens to several different sequences at once; on an error nothing is appended to any (after
     * LLMC_ERROR_KERNEL they have no logits). Long inputs run in chunks. What a sequence says does not depend on the
     * others, on how its tokens were divided among steps, or on the number of threads. */
    llmc_status (*step)(llmc_model *model, const llmc_step_input *inputs, size_t n_inputs);
    /* step() for one sequence. */
    llmc_status (*feed)(llmc_sequence *sequence, const int32_t *tokens, size_t n_tokens);
    /* Borrowed logits [n_vocab] after the last token fed; valid until the sequence's next step. */
    llmc_status (*logits)(const llmc_sequence *sequence, const float **out);
    llmc_status (*sample)(const llmc_sequence *sequence, const llmc_sampling *how, int32_t *out);

    /* -- measuring: there if `size` reaches so far ------------------------ */
    /* Keep when each task of the steps to come begins and ends, until profile(model, NULL); `profile` and its events
     * live until then, and are read between steps. Nobody asking, it costs nothing. On a GPU each kernel is one task,
     * and they then run one by one. */
    llmc_status (*profile)(llmc_model *model, llmc_profile *profile);
    /* A sequence of n tokens, made without running the model: copies of the original's keys and values, over and over
     * when n is longer (whole pages of them, 64 tokens each, so that the original has to have one). Nothing is shared.
     * Beyond the original's length what it says means nothing; how long its steps take does. It has no logits. */
    llmc_status (*sequence_repeat)(const llmc_sequence *sequence, int32_t n, llmc_sequence **out);

    /* -- many sequences: there if `size` reaches so far -------------------- */
    /* sample() for several sequences at once, which on a GPU costs little more than for one. After an error no token
     * counts. */
    llmc_status (*sample_many)(llmc_model *model, llmc_sample_input *inputs, size_t n_inputs);

    /* -- running ahead: there if `size` reaches so far ---------------------- */
    /* sample_many(), and a step() on the tokens it gives: of different sequences, at most info.max_step_tokens. A GPU
     * takes the tokens from where it has chosen them, and advance returns as soon as they are known: the step goes on
     * while the caller reads them, and the next advance finds it done, or nearly. Every other call that needs the
     * step's results waits for them, and reports what went wrong in it. On a CPU advance returns when the step is done.
     * When it fails nothing is appended to any sequence, and after an LLMC_ERROR_KERNEL of the step they have no logits.
     * A token too many, such as one behind the end of a text, is taken back by sequence_truncate, which does not wait. */
    llmc_status (*advance)(llmc_model *model, llmc_advance_input *inputs, size_t n_inputs);

    /* -- speculative decoding: there if `size` reaches so far ---------------- */
    /* step() on tokens and guesses at those behind them. Appended are the tokens, and of the guesses as many as sample()
     * would have given one after the other, with these settings: the same text as without guesses, in fewer steps. The
     * sequence's logits are those after the last of them. Where there are guesses, `how` may have temperature, top_k,
     * top_p and seed alone. On a GPU the logits are copied to the host, which draws from them. At most
     * info.max_step_tokens inputs; on an error nothing is appended to any (after LLMC_ERROR_KERNEL they have no
     * logits). */
    llmc_status (*speculate)(llmc_model *model, llmc_speculate_input *inputs, size_t n_inputs);

    /* -- a sequence in a file: there if `size` reaches so far ----------------- */
    /* Write all that the model knows of a sequence: its tokens, the pages of its keys and values, its state, its logits;
     * and a note of the caller's, bytes [n_bytes] of up to 64 MiB. The file is there whole when this returns, on the
     * disk too and to be read by its owner alone, or what was there before is. */
    llmc_status (*sequence_save)(const llmc_sequence *sequence, const char *path, const void *note, size_t n_bytes);
    /* A sequence that goes on as the one that was saved, to the last bit. The file belongs to the program of the artifact
     * that wrote it: of another one, cut off or changed it is an LLMC_ERROR_FORMAT. It wants room for all its tokens, and
     * a slot; sequence_truncate gives back what is more than is wanted. */
    llmc_status (*sequence_restore)(llmc_model *model, const char *path, llmc_sequence **out);
    /* Borrowed tokens [sequence_length]; valid until the sequence changes. */
    llmc_status (*sequence_tokens)(const llmc_sequence *sequence, const int32_t **out);
    /* Borrowed bytes of the note that was beside a sequence that was restored; none of others. */
    llmc_status (*sequence_note)(const llmc_sequence *sequence, const void **bytes, size_t *n_bytes);
    /* -- adapters: there if `size` reaches so far ---------------------------- */
    /* The name of an adapter, 0 <= adapter < info.n_adapters: borrowed, lives as long as the model. */
    llmc_status (*adapter_name)(const llmc_model *model, int32_t adapter, const char **out);
    /* Choose what the tokens of an empty sequence go through: an adapter, or with -1, as at first, the model alone.
     * Copies of a sequence have its adapter, and so has one that is restored; sequences of different ones may be in one
     * step. */
    llmc_status (*sequence_set_adapter)(llmc_sequence *sequence, int32_t adapter);
    int32_t (*sequence_adapter)(const llmc_sequence *sequence);
    /* -- rows in the place of tokens, and pictures: there if `size` reaches so far ------------------------------------- */
    /* Keep a copy of rows [n, info.n_row], each of which may stand for a token from now on, in place of its embedding:
     * the numbers first … first + n - 1, which are behind those of all tokens and never used again while the model is
     * open, are given to step and feed as tokens are. The text of such a number is empty, no penalty sees it, and a
     * sequence that has some cannot be saved. Where info.picture_rows is not 0 there have to be so many rows, a picture's,
     * and all of them are given in one input of a step, in their order. */
    llmc_status (*rows_new)(llmc_model *model, const float *rows, size_t n, int32_t *first);
    /* Forget the rows that one call has kept. Sequences that have read them go on; none may read them any more. */
    llmc_status (*rows_free)(llmc_model *model, int32_t first);
    /* Borrowed rows [n, info.n_row] of one call; valid until they are freed. */
    llmc_status (*rows_numbers)(const llmc_model *model, int32_t first, const float **rows, size_t *n);
    /* Run the tower on pixels f32 [info.tile], which are what the model's processor makes of a tile, and keep the rows
     * that it makes, as rows_new does: n is info.n_tile_rows. */
    llmc_status (*image_rows)(llmc_model *model, const float *pixels, int32_t *first, size_t *n);
    /* The same for a picture of any size: patches f32 [height * width, info.patch], as the model's processor orders them,
     * those of a row one behind the other. height and width are multiples of info.merge; n is height * width divided by
     * its square, at most info.most_rows, and rows are kept line by line, as rows_in_grid does. */
    llmc_status (*picture_rows)(llmc_model *model, const float *patches, uint32_t height, uint32_t width, int32_t *first,
                                size_t *n);
    /* Keep rows as rows_new does, which are those of a picture [height, width, info.n_row], line by line. A model whose
     * positions have directions takes each of them for where it is in its lines and columns; they are given to it in
     * their order, from the first one on. To others they are rows like any. */
    llmc_status (*rows_in_grid)(llmc_model *model, const float *rows, uint32_t height, uint32_t width, int32_t *first);
} llmc_api;

/* NULL when this artifact does not know the version. The table is static. */
typedef const llmc_api *(*llmc_get_api_function)(uint32_t version);
const llmc_api *llmc_get_api(uint32_t version);

#ifdef __cplusplus
}
#endif
#endif /* LLMC_H */
