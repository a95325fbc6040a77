/* cuda_context.c - the GPU that a model runs on, its context, and what is said when either fails. */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "cuda_context.h"

/* -- errors ------------------------------------------------------------------------------------------------------- */

llmc_status cuda_failed(const llmc_model *model, CUresult result, const char *doing)
{
    const cuda *cuda = model->cuda;
    char text[256];
    int is_memory = result == CUDA_ERROR_OUT_OF_MEMORY;
    return fail(is_memory ? LLMC_ERROR_MEMORY : LLMC_ERROR_KERNEL, model->file.path,
                is_memory ? "free memory on the GPU, or ask for room for fewer tokens (kv_tokens)" : NULL,
                "%s failed on %s: %s", doing, cuda->name[0] ? cuda->name : "the GPU",
                cuda_error(&cuda->driver, result, text, sizeof text));
}

llmc_status cuda_lose(llmc_model *model, CUresult result, const char *where)
{
    cuda *cuda = model->cuda;
    char text[256];
    cuda->is_running = 0; /* nothing to wait for any more */
    cuda_error(&cuda->driver, result, text, sizeof text);
    snprintf(cuda->lost, sizeof cuda->lost, "%s failed on %s: %s", where[0] ? where : "a kernel", cuda->name, text);
    return fail(LLMC_ERROR_KERNEL, model->file.path,
                where[0] ? NULL : "LLMC_CUDA_SYNC=1 in the environment finds the kernel", "%s", cuda->lost);
}

/* -- the GPU ------------------------------------------------------------------------------------------------------ */

/* What llmc compiles for, by rising compute capability; the "a" levels run on exactly theirs. */
static const struct {
    int arch;
    int is_exact;
    char name[16];
} LEVELS[] = {{80, 0, "sm_80"}, {89, 0, "sm_89"}, {90, 1, "sm_90a"}, {100, 1, "sm_100a"}, {120, 0, "sm_120"}};
enum { N_LEVELS = sizeof LEVELS / sizeof *LEVELS };

static int runs_on(int code, int is_exact, int device)
{
    return is_exact ? code == device : code / 10 == device / 10 && code <= device;
}

static llmc_status check_arch(const llmc_model *model, int number, int device)
{
    uint32_t needed = model->plans.header.cuda_arch;
    int code = (int)(needed & (LLMC_CUDA_EXACT - 1)), is_exact = (needed & LLMC_CUDA_EXACT) != 0;
    char hint[96] = "compile with --target cpu: no kernels are written for this GPU";
    if (runs_on(code, is_exact, device)) return LLMC_OK;
    for (int i = 0; i < N_LEVELS; i++)
        if (runs_on(LEVELS[i].arch, LEVELS[i].is_exact, device))
            snprintf(hint, sizeof hint, "compile with --target cuda:%s", LEVELS[i].name);
    return fail(LLMC_ERROR_TARGET, model->file.path, hint,
                "this artifact needs compute capability %d.%d%s; device %d is %s with %d.%d", code / 10, code % 10,
                is_exact ? "" : " or a later one of that generation", number, model->cuda->name, device / 10,
                device % 10);
}

/* Later GPUs of a generation may have less shared memory: compute capability 8.6 and 8.9 have 99 KB, 8.0 has 163. */
static llmc_status check_shared(const llmc_model *model, int number, int device, int most)
{
    uint32_t needed = 0;
    for (uint32_t i = 0; i < model->plans.header.n_kernels; i++)
        if (model->plans.records[i].shared_bytes > needed) needed = model->plans.records[i].shared_bytes;
    if (needed <= (uint32_t)most) return LLMC_OK;
    char hint[96] = "compile with --target cpu: no kernels are written for so little";
    for (int i = 0; i < N_LEVELS; i++)
        if (LEVELS[i].arch == device) snprintf(hint, sizeof hint, "compile with --target cuda:%s", LEVELS[i].name);
    return fail(LLMC_ERROR_TARGET, model->file.path, hint,
                "this artifact's kernels take %u KB of shared memory; device %d is %s with %d", needed >> 10, number,
                model->cuda->name, most >> 10);
}

static llmc_status no_device(const llmc_model *model)
{
    return fail(LLMC_ERROR_TARGET, model->file.path, "run it on a machine with one, or compile with --target cpu",
                "this machine has an NVIDIA driver but no GPU that it can use");
}

/* Which GPU: the option's, the environment's, or the first. */
static llmc_status choose_number(const llmc_model *model, const llmc_options *options, int *number)
{
    int n_devices = 0;
    const char *named = getenv("LLMC_CUDA_DEVICE");
    CUresult result = model->cuda->driver.cuDeviceGetCount(&n_devices);
    if (result || n_devices < 1) return no_device(model);
    *number = options->device ? options->device - 1 : 0;
    if (!options->device && named) {
        char *end;
        long value = strtol(named, &end, 10);
        *number = end == named || *end || value < 0 || value > n_devices ? -1 : (int)value;
    }
    if (*number >= 0 && *number < n_devices) return LLMC_OK;
    char asked[32];
    snprintf(asked, sizeof asked, "%d", options->device - 1);
    return fail(LLMC_ERROR_ARGUMENT, options->device ? "open" : "LLMC_CUDA_DEVICE", NULL,
                "there is no GPU '%s': this machine has %d, counted from 0", options->device ? asked : named,
                n_devices);
}

llmc_status cuda_take_device(llmc_model *model, const llmc_options *options)
{
    cuda *cuda = model->cuda;
    const cuda_driver *driver = &cuda->driver;
    int number = 0, major = 0, minor = 0, version = 0, most_shared = 0;
    CUresult result = driver->cuInit(0);
    if (result == CUDA_ERROR_NO_DEVICE) return no_device(model);
    if (result) return cuda_failed(model, result, "starting the NVIDIA driver");
    llmc_status status = choose_number(model, options, &number);
    if (status) return status;
    result = driver->cuDeviceGet(&cuda->device, number);
    if (!result) result = driver->cuDeviceGetName(cuda->name, sizeof cuda->name, cuda->device);
    cuda->name[sizeof cuda->name - 1] = '\0';
    if (!result)
        result = driver->cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, cuda->device);
    if (!result)
        result = driver->cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, cuda->device);
    if (!result)
        result = driver->cuDeviceGetAttribute(&most_shared, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
                                              cuda->device);
    if (!result) result = driver->cuDriverGetVersion(&version);
    if (result) return cuda_failed(model, result, "asking for the GPU's name and abilities");
    status = check_arch(model, number, 10 * major + minor);
    if (!status) status = check_shared(model, number, 10 * major + minor, most_shared);
    if (status) return status;
    cuda->is_dependent = version >= 12030 && major >= 9; /* before, graphs knew no such edge; nor do earlier GPUs */
    result = driver->cuDevicePrimaryCtxRetain(&cuda->context, cuda->device);
    if (result) cuda->context = NULL;
    return result ? cuda_failed(model, result, "taking the GPU's context") : LLMC_OK;
}

llmc_status cuda_enter(llmc_model *model)
{
    cuda *cuda = model->cuda;
    if (cuda->process != getpid())
        return fail(LLMC_ERROR_ARGUMENT, model->file.path, "open the model after fork(), and not before it too",
                    "this process was forked after the model was opened; the GPU's memory is not here");
    if (cuda->lost[0])
        return fail(LLMC_ERROR_KERNEL, model->file.path, "open the model again in a new process",
                    "the GPU is lost to this model: %s", cuda->lost);
    CUresult result = cuda->driver.cuCtxPushCurrent(cuda->context);
    return result ? cuda_lose(model, result, "making the context current") : LLMC_OK;
}

void cuda_leave(llmc_model *model)
{
    CUcontext before;
    model->cuda->driver.cuCtxPopCurrent(&before);
}
