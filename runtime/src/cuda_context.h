/* cuda_context.h - the GPU that a model runs on, the errors of it, and how a thread comes to it. */
#ifndef LLMC_CUDA_CONTEXT_H
#define LLMC_CUDA_CONTEXT_H

#include "cuda_driver.h"
#include "runtime.h"

/* What a model has taken of its GPU. What is 0 or NULL was not taken yet: open may fail half way. */
typedef struct cuda {
    cuda_driver driver;
    char name[256];  /* of the GPU */
    pid_t process;   /* a GPU's context does not survive fork() */
    CUdevice device;
    CUcontext context;
    CUstream stream;
    CUstream beside; /* copies the input of a step while the one before it runs */
    CUmodule *modules;     /* [n_modules] */
    uint32_t n_modules;
    CUfunction *functions; /* [header.n_kernels] */
    CUgraphExec *graphs;   /* [2, header.n_plans] by turn, in the order of plans.all; NULL: not captured, or a prompt's */
    CUgraphExec *pairs;    /* [2, plans.n_heads] a head behind the body of as many tokens, or both as a joined step */
    CUevent known;         /* the tokens of a step that runs ahead have reached the host */
    CUevent *events;       /* [n_events] for a profile */
    uint32_t n_events;
    CUdeviceptr weights, kv, states, memory;
    char *input;           /* [2, input_bytes] of a step, on the GPU, as from model->tokens on */
    uint64_t input_bytes;  /* tokens, rows, positions, slots of states, page table */
    int64_t shift[LLMC_N_SPACES]; /* bytes from where a space lies in turn 0 to where it lies in turn 1 */
    char *pinned;          /* memory of the host that the GPU copies from and to, and that its kernels write to */
    int32_t *told;         /* [2, told_rows] there: what was chosen in each turn */
    uint32_t told_rows;
    uint32_t n_told;       /* rows told in this turn that model->chosen does not have yet */
    uint32_t turn;         /* of the last step, 0 or 1 */
    int is_running;        /* something was started whose end is not yet known */
    int is_dependent;      /* a kernel may start before the one in front has ended, in graphs too */
    int is_one_by_one;     /* $LLMC_CUDA_SYNC: wait for each kernel, to find the one that fails */
    char lost[1024];       /* why the GPU cannot be used any more; "" while it can */
} cuda;

/* Find the GPU that the options ask for, see that it runs code for `arch` (header.cuda_arch), and take its context. */
llmc_status cuda_take_device(llmc_model *model, const llmc_options *options);
/* An error while opening. doing: "copying the weights" */
llmc_status cuda_failed(const llmc_model *model, CUresult result, const char *doing);
/* Make the context current on this thread, until cuda_leave. Fails in a forked child, and when the GPU is lost. */
llmc_status cuda_enter(llmc_model *model);
void cuda_leave(llmc_model *model);
/* An error after opening: the context is beyond repair, and all later calls say why. where: "" or a kernel's name */
llmc_status cuda_lose(llmc_model *model, CUresult result, const char *where);

#endif
