/* cuda_memory.h - what a model needs of a GPU's memory and what is free; the weights' way there; a step's input.
 *
 * A step's input lies twice on the GPU, and so does what tokens are told to. Steps take turns: the input of one is
 * copied while the one before it reads the other, and where that one writes the tokens it chooses is where this one
 * reads them. Graphs have addresses in them, so there is one for each turn. */
#ifndef LLMC_CUDA_MEMORY_H
#define LLMC_CUDA_MEMORY_H

#include "cuda_context.h"

/* Take memory for weights, cache, states and activations, set model->kv, states, spaces, shift and input, and copy the
 * weights. */
llmc_status cuda_take_memory(llmc_model *model, const llmc_options *options);
/* Take a cache that is smaller by n_bytes, or of one page, so that what memory did not suffice for may find room. 0: its
 * size was asked for, or is one page. Arguments are to be bound anew. */
int cuda_shrink_cache(llmc_model *model, const llmc_options *options, uint64_t n_bytes);

/* What the kernels of a turn have told the host, [told_rows]. */
const int32_t *cuda_told(const cuda *cuda, uint32_t turn);
/* Copy the part of a step's input between two of the host's addresses, from model->tokens on, to a turn's. */
CUresult cuda_copy_input(const llmc_model *model, uint32_t turn, const void *from, const void *end, CUstream stream);
/* The end of what a body reads of the page table. */
const int32_t *cuda_page_table_end(const llmc_model *model, const plan *body);

#endif
