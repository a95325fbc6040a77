/* cuda.h - an NVIDIA GPU through its driver, libcuda.so.1, and nothing else of CUDA.
 *
 *   cuda_driver   the driver's functions, each in the version pinned here, and the words for its errors
 *   cuda_memory   what the model needs and what is free; weights from the file to the GPU
 *   cuda_graph    a plan's launches, captured once as a graph; or one by one, to find or to time a kernel
 *   cuda_ahead    a step that is given to the GPU while the one before it runs
 *   cuda          open, close, and a step: the GPU as a `device`
 *
 * A step's input lies twice on the GPU, and so does what tokens are told to. Steps take turns: the input of one is
 * copied while the one before it reads the other, and where that one writes the tokens it chooses is where this one
 * reads them. Graphs have addresses in them, so there is one for each turn.
 *
 * Types, functions and constants are those of cuda.h of CUDA 12, by the same names; a test compares them with it.
 * The artifact is not linked with the driver, so that it opens on a machine without one and says so. */
#ifndef LLMC_CUDA_H
#define LLMC_CUDA_H

#include <stddef.h>
#include <stdint.h>

#include "runtime.h"

typedef int CUresult, CUdevice;
typedef unsigned long long CUdeviceptr;
typedef struct CUctx_st *CUcontext;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;
typedef struct CUgraph_st *CUgraph;
typedef struct CUgraphExec_st *CUgraphExec;

enum {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_NO_DEVICE = 100,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
    CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97,
    CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK = 0,
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,
    CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT = 9,
    CU_SHAREDMEM_CARVEOUT_MAX_SHARED = 100,
    CU_MEMHOSTALLOC_DEVICEMAP = 2,
    CU_STREAM_NON_BLOCKING = 1,
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1,
    CU_EVENT_DEFAULT = 0,
    CU_EVENT_DISABLE_TIMING = 2,
    CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6,
};

typedef struct CUlaunchAttribute {
    int id;
    char pad[4];
    union {
        char pad[64];
        int programmaticStreamSerializationAllowed;
    } value;
} CUlaunchAttribute;

typedef struct CUlaunchConfig {
    unsigned gridDimX, gridDimY, gridDimZ;
    unsigned blockDimX, blockDimY, blockDimZ;
    unsigned sharedMemBytes;
    CUstream hStream;
    CUlaunchAttribute *attrs;
    unsigned numAttrs;
} CUlaunchConfig;

/* X(name, the CUDA version whose form of it this is, parameters) */
#define LLMC_CUDA_FUNCTIONS(X)                                                                        \
    X(cuInit, 2000, (unsigned flags))                                                                 \
    X(cuDriverGetVersion, 2020, (int *version))                                                       \
    X(cuGetErrorName, 6000, (CUresult error, const char **name))                                      \
    X(cuGetErrorString, 6000, (CUresult error, const char **text))                                    \
    X(cuDeviceGetCount, 2000, (int *count))                                                           \
    X(cuDeviceGet, 2000, (CUdevice *device, int ordinal))                                             \
    X(cuDeviceGetName, 2000, (char *name, int length, CUdevice device))                               \
    X(cuDeviceGetAttribute, 2000, (int *value, int attribute, CUdevice device))                       \
    X(cuDevicePrimaryCtxRetain, 7000, (CUcontext *context, CUdevice device))                          \
    X(cuDevicePrimaryCtxRelease, 11000, (CUdevice device))                                            \
    X(cuCtxPushCurrent, 4000, (CUcontext context))                                                    \
    X(cuCtxPopCurrent, 4000, (CUcontext *context))                                                    \
    X(cuMemGetInfo, 3020, (size_t *n_free, size_t *n_bytes))                                          \
    X(cuMemAlloc, 3020, (CUdeviceptr *at, size_t n_bytes))                                            \
    X(cuMemFree, 3020, (CUdeviceptr at))                                                              \
    X(cuMemAllocHost, 3020, (void **at, size_t n_bytes))                                              \
    X(cuMemHostAlloc, 2020, (void **at, size_t n_bytes, unsigned flags))                              \
    X(cuMemHostGetDevicePointer, 3020, (CUdeviceptr *at, void *host, unsigned flags))                 \
    X(cuMemFreeHost, 2000, (void *at))                                                                \
    X(cuMemcpyHtoDAsync, 3020, (CUdeviceptr to, const void *from, size_t n_bytes, CUstream stream))   \
    X(cuMemcpyDtoHAsync, 3020, (void *to, CUdeviceptr from, size_t n_bytes, CUstream stream))         \
    X(cuMemcpyDtoDAsync, 3020, (CUdeviceptr to, CUdeviceptr from, size_t n_bytes, CUstream stream))   \
    X(cuMemsetD8Async, 3020, (CUdeviceptr at, unsigned char value, size_t n_bytes, CUstream stream))  \
    X(cuModuleLoadData, 2000, (CUmodule * module, const void *image))                                 \
    X(cuModuleUnload, 2000, (CUmodule module))                                                        \
    X(cuModuleGetFunction, 2000, (CUfunction * function, CUmodule module, const char *name))          \
    X(cuFuncGetAttribute, 2020, (int *value, int attribute, CUfunction function))                     \
    X(cuFuncSetAttribute, 9000, (CUfunction function, int attribute, int value))                      \
    X(cuStreamCreate, 2000, (CUstream * stream, unsigned flags))                                      \
    X(cuStreamDestroy, 4000, (CUstream stream))                                                       \
    X(cuStreamSynchronize, 2000, (CUstream stream))                                                   \
    X(cuStreamBeginCapture, 10010, (CUstream stream, int mode))                                       \
    X(cuStreamEndCapture, 10000, (CUstream stream, CUgraph *graph))                                   \
    X(cuGraphInstantiateWithFlags, 11040, (CUgraphExec * executable, CUgraph graph, unsigned long long flags)) \
    X(cuGraphUpload, 11010, (CUgraphExec executable, CUstream stream))                                \
    X(cuGraphLaunch, 10000, (CUgraphExec executable, CUstream stream))                                \
    X(cuGraphExecDestroy, 10000, (CUgraphExec executable))                                            \
    X(cuGraphDestroy, 10000, (CUgraph graph))                                                         \
    X(cuLaunchKernelEx, 11060,                                                                        \
      (const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra))           \
    X(cuEventCreate, 2000, (CUevent * event, unsigned flags))                                         \
    X(cuEventDestroy, 4000, (CUevent event))                                                          \
    X(cuEventRecord, 2000, (CUevent event, CUstream stream))                                          \
    X(cuEventSynchronize, 2000, (CUevent event))                                                      \
    X(cuEventElapsedTime, 2000, (float *milliseconds, CUevent start, CUevent end))

typedef struct cuda_driver {
    void *library;
#define LLMC_CUDA_MEMBER(name, version, parameters) CUresult(*name) parameters;
    LLMC_CUDA_FUNCTIONS(LLMC_CUDA_MEMBER)
#undef LLMC_CUDA_MEMBER
} cuda_driver;

/* A model's part of a GPU. What is 0 or NULL was not taken yet: open may fail half way. */
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

/* -- cuda_driver.c ------------------------------------------------------------------------------------------------ */

llmc_status cuda_load_driver(cuda_driver *driver, const char *path);
/* Find the GPU that the options ask for, see that it runs code for `arch` (header.cuda_arch), and take its context. */
llmc_status cuda_take_device(llmc_model *model, const llmc_options *options);
/* What the driver says of an error, into text [n]. Returns text. */
const char *cuda_error(const cuda_driver *driver, CUresult result, char *text, size_t n);
/* An error while opening. doing: "copying the weights" */
llmc_status cuda_failed(const llmc_model *model, CUresult result, const char *doing);
/* Make the context current on this thread, until cuda_leave. Fails in a forked child, and when the GPU is lost. */
llmc_status cuda_enter(llmc_model *model);
void cuda_leave(llmc_model *model);
/* An error after opening: the context is beyond repair, and all later calls say why. where: "" or a kernel's name */
llmc_status cuda_lose(llmc_model *model, CUresult result, const char *where);

/* -- cuda_memory.c ------------------------------------------------------------------------------------------------ */

/* Take memory for weights, cache, states and activations, set model->kv, states, spaces, shift and input, and copy the
 * weights. */
llmc_status cuda_take_memory(llmc_model *model, const llmc_options *options);
/* Take a cache that is smaller by n_bytes, or of one page, so that what memory did not suffice for may find room. 0: its
 * size was asked for, or is one page. Arguments are to be bound anew. */
int cuda_shrink_cache(llmc_model *model, const llmc_options *options, uint64_t n_bytes);

/* -- cuda_graph.c ------------------------------------------------------------------------------------------------- */

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

/* -- cuda_ahead.c, cuda.c ------------------------------------------------------------------------------------------ */

/* What the kernels of a turn have told the host, [told_rows]. */
const int32_t *cuda_told(const cuda *cuda, uint32_t turn);
/* Copy the part of a step's input between two of the host's addresses, from model->tokens on, to a turn's. */
CUresult cuda_copy_input(const llmc_model *model, uint32_t turn, const void *from, const void *end, CUstream stream);
/* The end of what a body reads of the page table. */
const int32_t *cuda_page_table_end(const llmc_model *model, const plan *body);
llmc_status cuda_advance(llmc_model *model, const plan *body, const plan *head, const plan *sampler, uint32_t n_rows);

#endif
