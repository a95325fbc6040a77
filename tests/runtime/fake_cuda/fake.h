/* fake.h - a stand-in for libcuda.so.1: the driver functions that the runtime calls, on the host's memory.
 *
 * It is stricter than the driver. Nothing happens before somebody waits for it, and no more than is waited for, so
 * memory reused too early shows; or, if it is asked to be hasty, everything at once, so that what is read too late shows.
 * Every copy must lie inside one allocation, every launch must be one that the kernel allows, and what is taken must be
 * given back. Kernels are functions for the CPU, found by name in libraries that tests/emulator/core/buffers.h
 * describes.
 *
 *   LLMC_FAKE_CUDA_LOG      a file that calls are written to, a line each; misuse as "error: …", at exit "leak: …";
 *                           copies and waits in streams but the first that lives end in "(stream 2)"
 *   LLMC_FAKE_CUDA_KERNELS  libraries of kernels, separated by colons
 *   LLMC_FAKE_CUDA          settings, separated by blanks, read whenever a model is opened:
 *       devices=1 capability=90 version=13000 free=BYTES
 *       node=BYTES          of memory that a graph takes for each launch
 *       lacks=NAME          the driver is too old to have this function
 *       fail=NAME:N:CODE    the n-th call of this function, counted from 1, fails with this error
 *       kernel=NAME         the GPU is lost when it runs this kernel
 *       hangs=NAME          this kernel never ends
 *       deaf=NAME           this function returns before what it should wait for
 *       hasty=1             what is asked for happens before the call returns
 */
#ifndef FAKE_CUDA_H
#define FAKE_CUDA_H

#include "../../emulator/core/buffers.h"
#include "cuda_driver.h"
#include "format.h"

enum {
    INVALID_VALUE = 1,
    NOT_INITIALIZED = 3,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NOT_FOUND = 500,
    LAUNCH_FAILED = 719,
    CAPTURE_UNSUPPORTED = 900,
};

typedef struct settings {
    int devices, capability, version, hasty;
    size_t n_free, node_bytes;
    char lacks[64], fail[64], deaf[64], kernel[128], hangs[128];
    int fail_at, fail_code;
} settings;

extern settings fake_settings;
extern int fake_is_lost; /* a kernel has failed: everything fails from now on */

/* -- fake.c: log, settings, counts -------------------------------------------------------------------------------- */

void fake_log(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Misuse: written to the log. Returns INVALID_VALUE. */
CUresult fake_misuse(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* What every call begins with: 0, or the error that it is to return. */
CUresult fake_enter(const char *name, int needs_context);
/* One more or less of what must be given back. */
enum { CONTEXTS, ALLOCATIONS, PINNED, MODULES, STREAMS, EVENTS, GRAPHS, N_KINDS };
void fake_count(int kind, int change);
void fake_configure(void);

/* -- fake_memory.c ------------------------------------------------------------------------------------------------ */

int fake_is_device(const void *at, size_t n_bytes); /* inside one allocation */
int fake_is_pinned(const void *at, size_t n_bytes);
int fake_is_mapped(const void *at, size_t n_bytes); /* pinned, and the address that kernels know it by */
int fake_is_capturing(void);
/* Of the GPU's memory, what the driver itself takes, or gives back (n_bytes < 0). 0: there is not so much. */
int fake_use(int64_t n_bytes);
/* Tell a library of kernels what they may touch. */
void fake_show_buffers(void *library);

/* -- fake_kernel.c ------------------------------------------------------------------------------------------------ */

struct CUfunc_st {
    const emulated_kernel *kernel;
    void *library;
    int most_shared, carveout;
    CUfunction next; /* all functions found so far */
};

/* 0, or misuse: what the kernel was not made for, or the GPU cannot do. */
CUresult fake_check_launch(const CUlaunchConfig *config, CUfunction function);

/* -- fake_stream.c: what was asked for and has not happened ------------------------------------------------------- */

typedef struct operation {
    enum { COPY, FILL, LAUNCH } kind;
    void *to;
    const void *from;
    size_t n_bytes;
    int value;
    struct CUfunc_st *function;
    int grid;
    void *arguments[LLMC_MAX_POINTERS];
} operation;

/* " (stream 2)", or nothing of the first. */
const char *fake_stream_name(CUstream stream);
CUresult fake_enqueue(CUstream stream, const operation *operation);
/* Let it all happen. */
CUresult fake_flush(CUstream stream);
/* Whether this function is not to wait. */
int fake_is_deaf(const char *name);

/* -- every function of the driver: fake_cuInit and so on ---------------------------------------------------------- */

#define DECLARE(name, version, parameters) CUresult fake_##name parameters;
LLMC_CUDA_FUNCTIONS(DECLARE)
#undef DECLARE

#endif
