/* cuda_graph.h - a plan's launches, captured once as a graph; or one by one, to find or to time a kernel. */
#ifndef LLMC_CUDA_GRAPH_H
#define LLMC_CUDA_GRAPH_H

#include "cuda_context.h"

llmc_status cuda_load_kernels(llmc_model *model);
/* Make a graph of each plan, and one of what a step of single tokens takes, a joined step or a pair of plans; of those and
 * of samplers one for each turn. */
llmc_status cuda_capture(llmc_model *model);
void cuda_drop_graphs(llmc_model *model);
/* Launches in all of them. */
uint64_t cuda_count_nodes(const llmc_model *model);
/* Start a plan, in turn 0 unless it is a sampler. */
llmc_status cuda_start(llmc_model *model, const plan *plan, uint32_t turn);
/* The turn of the next step, if it has this body and this head, and model->rows: the other one, or 0 if that has no
 * graph. */
uint32_t cuda_next_turn(const llmc_model *model, const plan *body, const plan *head);
/* Start a body, then a head, in cuda_next_turn; either may be NULL. */
llmc_status cuda_start_pair(llmc_model *model, const plan *body, const plan *head);

#endif
