/* artifact.h - an artifact's file, its plans, and what those read of its weights. Part of runtime.h. */
#ifndef LLMC_ARTIFACT_H
#define LLMC_ARTIFACT_H

#include <stdint.h>

#include "format.h"
#include "llmc.h"

/* -- file.c ------------------------------------------------------------------------------------------------------- */

typedef struct range {
    const uint8_t *bytes; /* [n_bytes], inside the mapped file; NULL when the section is absent */
    uint64_t n_bytes;
    const uint8_t *sha256; /* [32] of a section, as the directory has it */
} range;

/* What one kind of machine runs. */
typedef struct program {
    range weights, plan, cuda;
    uint64_t first_kernel; /* where a CPU's kernels begin in the code's table */
} program;

typedef struct artifact {
    char path[4096];
    const uint8_t *bytes; /* [n_bytes] the whole file, mapped read-only */
    uint64_t n_bytes;
    range code, vocabulary;
    program programs[LLMC_MAX_PROGRAMS];
    uint32_t n_programs;
    uint32_t number; /* of these, the one that is opened */
    program program; /* the same */
    uint64_t n_kernels; /* of all programs for CPUs */
} artifact;

/* Find the file that this code was loaded from. */
llmc_status artifact_find(artifact *file);
/* Map the file at file->path; check trailer and directory, and the SHA-256 of every section but the weights. */
llmc_status artifact_open(artifact *file);
void artifact_close(artifact *file);
/* Zeroed memory straight from the system, untouched until used; NULL when there is none. n_bytes may be 0. */
void *memory_map(uint64_t n_bytes);
void memory_unmap(void *bytes, uint64_t n_bytes);

/* -- plan.c, plan_header.c ---------------------------------------------------------------------------------------- */

typedef struct argument {
    uint32_t space;         /* LLMC_SPACE_* */
    uint64_t offset;        /* bytes from the start of the space */
    uint64_t n_bytes;
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
    uint32_t n_rows; /* M of a body, R of a head, tokens of a sampler, M = R of a joined step, what a tower makes */
    uint32_t n_calls;
    const call *calls; /* [n_calls] */
} plan;

/* A stretch of the weights section. */
typedef struct extent {
    uint64_t offset; /* in the section */
    uint64_t n_bytes;
    uint64_t packed; /* where it lies when stretches lie one right behind the other */
} extent;

typedef struct plans {
    llmc_plan_header header;
    llmc_plan_states states; /* slot_bytes 0: the model has none */
    uint32_t n_tokens;       /* that there are, of each type */
    uint32_t n_types;        /* of tokens: llmc_plan_labels */
    int is_whole;            /* all tokens of a text are in one step: llmc_plan_whole */
    uint32_t n_adapters;     /* that a sequence may choose from */
    uint32_t n_row;          /* numbers of a row that may stand for a token; 0: none may */
    uint32_t tile[3];        /* what the tower takes: llmc_plan_given */
    uint32_t picture_rows;   /* that see each other; 0: no row sees what is behind it */
    llmc_plan_grids grids;   /* where rows are in their picture; zeros behind `given` where that does not matter */
    const llmc_adapter_record *adapters; /* [n_adapters] in the file */
    plan *bodies; /* [n_bodies], by rising n_rows */
    plan *heads;  /* [n_heads], by rising n_rows */
    plan *samplers; /* [n_samplers], by rising n_rows; on a GPU alone */
    plan *joined;   /* [n_joined], by rising n_rows; on a GPU alone */
    plan *tower;    /* [n_towers], by rising n_rows; NULL: there is none */
    plan *adapted;  /* [n_adapted] on a GPU that has adapters: each body once more, for steps with one; then none or all */
    plan *joined_adapted; /* [n_joined_adapted] likewise each joined step */
    uint32_t n_bodies, n_heads, n_samplers, n_joined, n_towers, n_adapted, n_joined_adapted;
    uint32_t max_body_rows, max_head_rows, max_sampler_rows;
    const llmc_kernel_entry *kernels; /* [header.n_kernels] the code's table, or gpu_kernels */
    llmc_kernel_entry *gpu_kernels;   /* [header.n_kernels] names and pointers of a GPU's kernels, or NULL */
    llmc_kernel_record *records;      /* [header.n_kernels] what else is known of those, or NULL */
    plan *all;           /* [header.n_plans] */
    call *calls;         /* [header.n_calls] */
    argument *arguments; /* [header.n_arguments] */
    extent *extents;       /* [n_extents] what calls read of the weights, by rising offset */
    uint32_t n_extents;
    uint64_t weight_bytes; /* of all extents */
} plans;

/* Where the spaces lie in memory. */
typedef struct spaces {
    char *base[LLMC_N_SPACES];
    uint64_t scratch_stride; /* bytes from one thread's scratch memory to the next one's */
} spaces;

/* Check and copy what the plan section begins with. start: where its tables begin. */
llmc_status plan_header_read(plans *plans, const range *section, const char *path, uint64_t *start);
/* How many numbers the largest tower takes; 0: there is none. */
uint64_t plans_pixels(const plans *plans);
/* How many patches a tower of pictures of any size takes that makes n_rows rows of them; 0: it takes tiles. */
uint64_t plans_patches(const plans *plans, uint64_t n_rows);
/* How many numbers of 32 bits such a tower is told of so many patches: LLMC_SPACE_PLACES. */
uint64_t plans_places(const plans *plans, uint64_t n_patches);
/* An image of the section "cuda", which plans_load has checked. */
range image_at(const range *images, uint32_t index);
/* Check and copy the plan section. Every argument of every call lies inside its space afterwards. */
llmc_status plans_load(plans *plans, const artifact *file);
/* Give every argument its address and every call its number of tasks. */
void plans_bind(plans *plans, const spaces *spaces, int32_t n_threads);
void plans_free(plans *plans);
/* Which plan [n_plans, by rising n_rows] to run next when n_rows rows are left. */
const plan *plan_choose(const plan *plans, uint32_t n_plans, uint64_t n_rows, uint32_t step_rows);
/* The smallest plan that has n_rows rows, or the largest there is. */
const plan *plan_holding(const plan *plans, uint32_t n_plans, uint64_t n_rows);

/* -- weights.c ---------------------------------------------------------------------------------------------------- */

/* Work out plans->extents from the arguments of all calls; the section has section_bytes. */
llmc_status weights_find(plans *plans, uint64_t section_bytes, const char *path);
/* Have arguments count from the start of the packed extents, and no longer from that of the section. */
void weights_pack(plans *plans);
/* Copy n bytes of the packed extents, from `first` on. section: the weights section. */
void weights_copy(const plans *plans, const uint8_t *section, uint64_t first, uint64_t n, char *to);

#endif
