/* cuda_driver.h - the NVIDIA driver, libcuda.so.1: what the runtime uses of it, and nothing else of CUDA.
 *
 * Types, functions and constants are those of cuda.h of CUDA 12, by the same names; a test compares them with it.
 * The artifact is not linked with the driver, so that it opens on a machine without one and says so. */
#ifndef LLMC_CUDA_DRIVER_H
#define LLMC_CUDA_DRIVER_H

#include <stddef.h>
#include <stdint.h>

#include "llmc.h"

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

/* Find the driver and each of these functions. path: the artifact's, for the error where something is missing. */
llmc_status cuda_load_driver(cuda_driver *driver, const char *path);
/* What the driver says of an error, into text [n]. Returns text. */
const char *cuda_error(const cuda_driver *driver, CUresult result, char *text, size_t n);

#endif
