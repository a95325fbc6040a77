/* cuda_ahead.h - a step that is given to the GPU while the one before it runs. */
#ifndef LLMC_CUDA_AHEAD_H
#define LLMC_CUDA_AHEAD_H

#include "cuda_context.h"

/* device.advance: see runtime.h. */
llmc_status cuda_advance(llmc_model *model, const plan *body, const plan *head, const plan *sampler, uint32_t n_rows);

#endif
