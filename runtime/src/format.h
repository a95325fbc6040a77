/* format.h - the bytes of an artifact, as the compiler writes and the runtime reads them.
 *
 *   [ELF shared object: runtime, kernels]   section "code", offset 0
 *   [weights]                               page-aligned, mapped from the file itself
 *   [plan] [cuda: a GPU's kernels] [vocabulary] [tokenizer] [graph] [manifest]
 *   [directory: llmc_section * n_sections]
 *   [llmc_trailer]                          the last 64 bytes of the file
 *
 * An artifact for several machines has several programs: sections "plan", "weights" and "cuda" are the first one's,
 * "plan.1", "weights.1" and "cuda.1" the next one's, up to 7. A program without weights of its own shares the first
 * one's: the arguments of its calls say which of them it reads.
 *
 * All numbers are little-endian; sections start at multiples of 64 bytes (weights: 4096), in file order, and do
 * not overlap. runtime/format.py says the same for Python; docs/artifact.md says it in words.
 */
#ifndef LLMC_FORMAT_H
#define LLMC_FORMAT_H

#include <stdint.h>

#define LLMC_FORMAT_VERSION 3u
#define LLMC_FORMAT_WITH_STATES 4u /* of an artifact with states, and of its plan sections: see llmc_plan_states */
#define LLMC_FORMAT_WHOLE 5u       /* of one that reads texts whole, and of its plan sections: see llmc_plan_whole */
#define LLMC_FORMAT_LABELS 6u      /* of one that gives texts labels, and of its plan sections: see llmc_plan_labels */
#define LLMC_FORMAT_ADAPTERS 7u    /* of one with adapters, and of its plan sections: see llmc_plan_adapters */
#define LLMC_FORMAT_GIVEN 8u       /* of one whose tokens may be rows of numbers, and of its plan: see llmc_plan_given */
#define LLMC_FORMAT_GRIDS 9u       /* of one whose rows lie in lines and columns, and of its plan: see llmc_plan_grids */
#define LLMC_TRAILER_MAGIC "LLMCART1"
#define LLMC_PLAN_MAGIC 0x4e4c504cu /* "LPLN" */
#define LLMC_SAVED_MAGIC "LLMCSEQ1"
#define LLMC_SAVED_VERSION 1u
#define LLMC_MAX_NOTE (64u << 20)
#define LLMC_MAX_SECTIONS 64u
#define LLMC_MAX_PROGRAMS 8
#define LLMC_MAX_EOS 8
#define LLMC_MAX_ADAPTERS 1024
#define LLMC_MAX_ROW (1u << 20)
#define LLMC_MAX_TILE (1u << 30)
#define LLMC_MAX_MERGE 16
#define LLMC_MAX_SIDE 4096
#define LLMC_MAX_POINTERS 24 /* of a kernel; at least 1 */

typedef struct llmc_trailer {
    char magic[8];
    uint32_t format_version;
    uint32_t n_sections;
    uint64_t directory_offset; /* bytes from the start of the file */
    uint64_t file_bytes;       /* the whole file, this trailer included */
    uint8_t directory_sha256[32];
} llmc_trailer;

typedef struct llmc_section {
    char name[16]; /* padded with NUL */
    uint64_t offset;
    uint64_t n_bytes;
    uint8_t sha256[32];
} llmc_section;

/* Bits of llmc_plan_header.cpu_features. */
enum {
    LLMC_CPU_AVX2 = 1u << 0,
    LLMC_CPU_FMA = 1u << 1,
    LLMC_CPU_F16C = 1u << 2,
    LLMC_CPU_BMI1 = 1u << 3,
    LLMC_CPU_BMI2 = 1u << 4,
    LLMC_CPU_MOVBE = 1u << 5,
    LLMC_CPU_AVX512F = 1u << 6,
    LLMC_CPU_AVX512BW = 1u << 7,
    LLMC_CPU_AVX512CD = 1u << 8,
    LLMC_CPU_AVX512DQ = 1u << 9,
    LLMC_CPU_AVX512VL = 1u << 10,
    LLMC_CPU_AVX512_BF16 = 1u << 11,
    LLMC_CPU_AVX512_VNNI = 1u << 12,
    LLMC_CPU_AMX_TILE = 1u << 13,
    LLMC_CPU_AMX_BF16 = 1u << 14,
    LLMC_CPU_AMX_INT8 = 1u << 15,
    LLMC_CPU_ASIMD = 1u << 16,
    LLMC_CPU_ASIMDDP = 1u << 17,
    LLMC_CPU_I8MM = 1u << 18,
};

/* llmc_plan_header.device: what runs the plans. */
enum { LLMC_DEVICE_CPU = 0, LLMC_DEVICE_CUDA = 1 };

/* In llmc_plan_header.cuda_arch, beside 10 * major + minor of the compute capability that the kernels are made for:
 * they run on that one alone. Without it they run on later ones of the same major number too. */
#define LLMC_CUDA_EXACT (1u << 16)

/* The plan section: this header, llmc_plan_states, llmc_plan_whole, llmc_plan_labels, llmc_plan_adapters,
 * llmc_plan_given or llmc_plan_grids where the version says so, then kernels, plans, calls and arguments, each table right behind the one before. */
typedef struct llmc_plan_header {
    uint32_t magic; /* LLMC_PLAN_MAGIC */
    uint32_t format_version;
    uint32_t cpu_features;       /* all must be present */
    uint32_t n_vocab;            /* columns of the logits */
    uint32_t n_context;          /* most tokens of a sequence */
    uint32_t page_tokens;        /* tokens in a page of the KV cache */
    uint32_t pages_per_sequence; /* columns of the page table: ceil(n_context / page_tokens) */
    uint32_t n_kernels;
    uint32_t n_plans;
    uint32_t n_calls;
    uint32_t n_arguments;
    uint32_t n_eos;
    int32_t eos[LLMC_MAX_EOS]; /* tokens that end a text */
    int32_t bos;               /* token that begins one, or -1 */
    uint32_t default_kv_tokens; /* room in the KV cache when llmc_options asks for 0 */
    uint64_t kv_page_bytes;    /* one page, all layers; 0: the model keeps no cache */
    uint64_t arena_bytes;      /* activations; shared by all plans */
    uint64_t scratch_bytes;    /* each thread's own; on a GPU all kernels', zero before and after each of them */
    uint32_t device;           /* LLMC_DEVICE_* */
    uint32_t cuda_arch;        /* 10 * major + minor, perhaps LLMC_CUDA_EXACT; 0 on a CPU */
} llmc_plan_header;

/* What layers keep of a sequence besides pages: for each a part of its slot. Its first token finds zeros, whatever the
 * slot has held before. */
typedef struct llmc_plan_states {
    uint64_t slot_bytes;    /* of one sequence, all layers; above 0 */
    uint32_t default_slots; /* sequences that may hold one when llmc_options asks for 0; at least 1 */
    uint32_t reserved;
} llmc_plan_states;

/* Behind the header where tokens see what is behind them: so all tokens of a text are in one step, in the order of their
 * positions and from 0 on; no step reads the pages that another one has written; a head reads positions, too, of all
 * rows of its body. Logits are what the text is made into, and n_vocab how many numbers that is. */
typedef struct llmc_plan_whole {
    uint32_t n_tokens; /* that there are: their numbers are smaller; at least 1 */
    uint32_t reserved;
} llmc_plan_whole;

/* Behind the header where texts are given labels: logits are those of the labels of the text up to there, and n_vocab how
 * many labels there are. A token i of type t is i + t * n_tokens. */
typedef struct llmc_plan_labels {
    uint32_t n_tokens; /* that there are, of each type; at least 1 */
    uint32_t n_types;  /* at least 1 */
    uint32_t is_whole; /* whether texts are read whole, as llmc_plan_whole says */
    uint32_t reserved;
} llmc_plan_labels;

/* Behind the header where sequences may choose an adapter, and behind this the adapters themselves, [n_adapters]. The
 * first two are those of llmc_plan_states, or 0 where there are no states. */
typedef struct llmc_plan_adapters {
    uint64_t slot_bytes;
    uint32_t default_slots;
    uint32_t n_adapters; /* at least 1, at most LLMC_MAX_ADAPTERS */
} llmc_plan_adapters;

typedef struct llmc_adapter_record {
    char name[64]; /* printable ASCII, padded with NUL, of which there is at least one; no two have the same */
} llmc_adapter_record;

/* Behind the header where a row of numbers may stand for a token, in place of its embedding; and behind this the adapters,
 * [n_adapters] of llmc_adapter_record. The first two are those of llmc_plan_states, or 0 where there are no states. */
typedef struct llmc_plan_given {
    uint64_t slot_bytes;
    uint32_t default_slots;
    uint32_t n_adapters; /* at most LLMC_MAX_ADAPTERS */
    uint32_t n_row;      /* numbers of a row; at least 1, at most LLMC_MAX_ROW */
    uint32_t tile[3];    /* channels, height and width of what the tower takes, at most LLMC_MAX_TILE in all; 0: no tower */
    uint32_t picture_rows; /* rows whose numbers are a picture's, and see each other; 0: no row sees what is behind it */
    uint32_t reserved;
} llmc_plan_given;

/* The same where it matters where in its picture a row is, and behind it the adapters too. A tower of pictures of any size
 * takes patches: there is one for each number of rows that is planned, and given.tile is 0. A row is made of merge by merge
 * patches. Patches attend each other, in some layers those of their own window alone; at most so many pages hold what they
 * keep. Each may take n_taps entries of a table of side by side positions, stretched over its picture. */
typedef struct llmc_plan_grids {
    llmc_plan_given given;
    uint32_t is_turned;    /* whether a row turns queries and keys by where it is in its picture: LLMC_SPACE_TURNS */
    uint32_t patch;        /* numbers of a patch; 0, and the others too: the tower takes tiles, or there is none */
    uint32_t merge;        /* 1 to LLMC_MAX_MERGE */
    uint32_t window;       /* rows along a window's side; 0: there are no windows */
    uint32_t pages;        /* of page_tokens patches; at least 1 */
    uint32_t side;         /* of the table; 0: there is none */
    uint32_t n_taps;       /* 0 without a table, else 4 (bilinear) or 16 (bicubic) */
    uint32_t taps_aligned; /* whether the table's corners are the picture's */
} llmc_plan_grids;

/* Bits of llmc_kernel_record.flags. */
enum {
    LLMC_KERNEL_DEPENDENT = 1u << 0, /* launched before the kernel in front has ended: it waits for that itself */
};

/* The last four are of a GPU's kernels, and 0 on a CPU. */
typedef struct llmc_kernel_record {
    char name[104]; /* padded with NUL; on a CPU the same order as in the code's table */
    uint32_t n_pointers;
    uint32_t n_threads;    /* of a block */
    uint32_t shared_bytes; /* dynamic shared memory of a block */
    uint32_t flags;
    uint32_t image; /* index in the section "cuda" */
    uint32_t reserved;
} llmc_kernel_record;

enum { LLMC_PLAN_BODY = 0, LLMC_PLAN_HEAD = 1, LLMC_PLAN_SAMPLER = 2, LLMC_PLAN_JOINED = 3, LLMC_PLAN_TOWER = 4,
       LLMC_PLAN_ADAPTED = 5, LLMC_PLAN_JOINED_ADAPTED = 6 };

/* A body takes n_rows tokens through all layers and leaves their hidden states in the arena; a head turns n_rows of
 * those, named by LLMC_SPACE_ROWS, into logits, and on a GPU into the most likely token of each. A sampler, on a GPU
 * alone, draws n_rows tokens from rows of logits that LLMC_SPACE_DRAWS names. A joined step, on a GPU alone, is what the
 * body and the head of n_rows do together where row i of the head is row i of the body. A tower, on a CPU alone and at most
 * one, makes n_rows rows that stand for tokens of a tile of a picture, or, of any number, of n_rows * merge * merge patches; what its attention keeps lies in the arena. Where
 * sequences may choose an adapter, a GPU's bodies and joined steps are there twice: those of the first two kinds take steps
 * in which no row has one, as if there were none, and beside each there is one of as many rows, adapted, that takes the
 * others. Plans are sorted by (kind, n_rows). */
typedef struct llmc_plan_record {
    uint32_t kind;
    uint32_t n_rows;
    uint32_t first_call;
    uint32_t n_calls;
} llmc_plan_record;

typedef struct llmc_call_record {
    uint32_t kernel;
    uint32_t grid; /* independent units of work, at least 1; a GPU's thread blocks */
    uint32_t first_argument;
    uint32_t n_arguments;
} llmc_call_record;

/* What an argument's offset counts from. n_bytes from there must lie inside it. */
enum {
    LLMC_SPACE_ARENA = 0,
    LLMC_SPACE_WEIGHTS = 1,
    LLMC_SPACE_KV = 2,         /* a page; the kernel adds page * kv_page_bytes */
    LLMC_SPACE_TOKENS = 3,     /* i32 [M] */
    LLMC_SPACE_POSITIONS = 4,  /* i32 [M], -1 for a row that pads the step */
    LLMC_SPACE_PAGE_TABLE = 5, /* i32 [M, pages_per_sequence], -1 beyond the sequence */
    LLMC_SPACE_ROWS = 6,       /* i32 [R] */
    LLMC_SPACE_LOGITS = 7,     /* f32 [R, n_vocab]; of a sampler, R of the largest head */
    LLMC_SPACE_SCRATCH = 8,    /* see llmc_plan_header.scratch_bytes */
    LLMC_SPACE_CHOSEN = 9,     /* i32 [R]: the token chosen for each row, -1 for none; a GPU's alone */
    LLMC_SPACE_DRAWS = 10,     /* llmc_draw_record [R], of a sampler */
    LLMC_SPACE_NEXT = 11,      /* i32 [R]: the tokens of the step behind, CHOSEN but 0 for none; a GPU's alone */
    LLMC_SPACE_TOLD = 12,      /* i32 [R]: CHOSEN once more, in memory of the host; a GPU's alone */
    LLMC_SPACE_STATES = 13,    /* a slot; the kernel adds slot * slot_bytes */
    LLMC_SPACE_SLOTS = 14,     /* i32 [M]: the slot of each row's sequence, -1 for a row that pads the step */
    LLMC_SPACE_ADAPTERS = 15,  /* i32 [M]: the number of each row's adapter, -1 for none */
    LLMC_SPACE_GIVEN = 16,     /* f32 [M, n_row]: the rows that stand for tokens; what is not one of them is not read */
    LLMC_SPACE_IS_GIVEN = 17,  /* i32 [M]: 1 where a row stands for the token, whose own number is 0 then; else 0 */
    LLMC_SPACE_PIXELS = 18,    /* f32 [channels, height, width] of a tower's tile, or [M, patch] */
    LLMC_SPACE_MADE = 19,      /* f32 [n_rows, n_row] that a tower makes of it */
    LLMC_SPACE_SEES = 20,      /* i32 [M]: the last position that each row sees, -1 for a row that pads the step */
    LLMC_SPACE_TURNS = 21,     /* i32 [M, 3]: what each row's queries and keys are turned by: time, line and column */
    LLMC_SPACE_PLACES = 22,    /* what a tower of any size is told of its M patches, one behind the other, each of i32:
                                  positions [M] and page table [M, P], P = ceil(M / page_tokens); both again, within
                                  windows, where there are some; line [M], column [M] in the picture; where there is a
                                  table, entries [M, n_taps] and, f32, what they count [M, n_taps] */
    LLMC_N_SPACES = 23,
};

/* How a sampler chooses a token: see llmc_sampling. */
typedef struct llmc_draw_record {
    uint64_t seed;
    int32_t row;      /* of the logits; -1: pads the plan */
    int32_t position; /* of the token to choose */
    float temperature; /* above 0 */
    float top_p;
    int32_t top_k;
    uint32_t reserved;
} llmc_draw_record;

typedef struct llmc_argument {
    uint32_t space;
    uint32_t reserved;
    uint64_t offset;
    uint64_t n_bytes;
} llmc_argument;

/* A sequence's file (save.c, restore.c): this header, u8 note[n_note_bytes], i32 tokens[n_tokens], then what is there of
 * f32 logits[n_vocab], a slot of states [slot_bytes], and the pages [ceil(n_tokens / page_tokens), kv_page_bytes], each
 * right behind the one before and as it lies in memory. It belongs to the program that wrote it, whose sections have
 * these hashes. */
typedef struct llmc_saved_header {
    char magic[8];
    uint32_t version; /* LLMC_SAVED_VERSION */
    uint32_t reserved;
    uint64_t file_bytes;
    uint8_t sha256[32]; /* of all that follows here */
    uint8_t weights_sha256[32];
    uint8_t plan_sha256[32];
    uint8_t kernels_sha256[32]; /* of the section "code", or of a GPU's "cuda" */
    uint32_t device;       /* this and the next two: of llmc_plan_header */
    uint32_t cuda_arch;
    uint32_t cpu_features;
    uint32_t has_logits;
    uint32_t adapter; /* 1 + its number; 0: none */
    uint32_t n_tokens;
    uint64_t n_note_bytes; /* at most LLMC_MAX_NOTE */
} llmc_saved_header;

/* The section "cuda", of an artifact for a GPU: u32 n_images, u32 0, llmc_image[n_images], then the images (cubins), at
 * offsets from the start of the section. */
typedef struct llmc_image {
    uint64_t offset;
    uint64_t n_bytes;
} llmc_image;

/* The vocabulary section: u32 n, u32 offsets[n + 1], then the bytes of each token's text. */

/* What the compiler links beside the runtime: the kernels of all programs for CPUs, one program's after the other's, in
 * the order of their records. */
typedef struct llmc_kernel_entry {
    const char *name;
    int32_t (*function)(void);
    uint32_t n_pointers;
} llmc_kernel_entry;

extern const llmc_kernel_entry llmc_kernel_table[];
extern const uint32_t llmc_kernel_count;

#endif
