/* program.c - which of an artifact's programs this machine runs. */
#include <stdio.h>
#include <string.h>

#include "runtime.h"

enum { REASONS_BYTES = 1536 };

void program_close(llmc_model *model)
{
    if (model->device) model->device->close(model);
    model->device = NULL;
    memory_unmap(model->memory, model->memory_bytes);
    model->memory = NULL;
    kv_close(&model->kv);
    kv_close(&model->states);
    rows_close(&model->given);
    plans_free(&model->plans);
    model->plans = (plans){0};
}

static llmc_status open_number(llmc_model *model, const llmc_options *options, uint32_t number)
{
    model->file.number = number;
    model->file.program = model->file.programs[number];
    llmc_status status = plans_load(&model->plans, &model->file);
    if (status) return status;
    model->device = model->plans.header.device == LLMC_DEVICE_CPU ? &cpu_device : &cuda_device;
    return model->device->open(model, options);
}

/* Its header, unchecked; zeros when it has none. */
static llmc_plan_header header_of(const program *program)
{
    llmc_plan_header header = {0};
    if (program->plan.n_bytes >= sizeof header) memcpy(&header, program->plan.bytes, sizeof header);
    return header;
}

static int is_allowed(const program *program, const llmc_options *options)
{
    uint32_t device = header_of(program).device;
    return options->run_on == LLMC_ON_ANY || (options->run_on == LLMC_ON_CPU) == (device == LLMC_DEVICE_CPU);
}

void program_target(uint32_t device, uint32_t cuda_arch, uint32_t cpu_features, char *text, size_t n)
{
    const char *level = cpu_level(cpu_features);
    if (device != LLMC_DEVICE_CPU)
        snprintf(text, n, "cuda:sm_%u%s", cuda_arch & (LLMC_CUDA_EXACT - 1), cuda_arch & LLMC_CUDA_EXACT ? "a" : "");
    else snprintf(text, n, "cpu%s%s", level ? ":" : "", level ? level : "");
}

static void name_target(const program *program, char *text, size_t n)
{
    const llmc_plan_header header = header_of(program);
    program_target(header.device, header.cuda_arch, header.cpu_features, text, n);
}

static llmc_status none_allowed(const llmc_model *model, const llmc_options *options)
{
    char targets[LLMC_MAX_PROGRAMS * 48] = "";
    for (uint32_t i = 0; i < model->file.n_programs; i++) {
        size_t n = strlen(targets);
        snprintf(targets + n, sizeof targets - n, "%s", i ? ", " : "");
        n = strlen(targets);
        name_target(model->file.programs + i, targets + n, sizeof targets - n);
    }
    int on_cpu = options->run_on == LLMC_ON_CPU;
    return fail(LLMC_ERROR_TARGET, model->file.path,
                on_cpu ? "compile with --target cpu too" : "compile with --target cuda too",
                "the artifact has no program for a %s: it was compiled for %s", on_cpu ? "CPU" : "GPU", targets);
}

/* The only program that may be taken says itself why it doesn't run here; of several each one's first line is told. */
llmc_status program_open(llmc_model *model, const llmc_options *options)
{
    const artifact *file = &model->file;
    char reasons[REASONS_BYTES] = "", target[48];
    uint32_t n_allowed = 0, n_tried = 0;
    for (uint32_t i = 0; i < file->n_programs; i++) n_allowed += (uint32_t)is_allowed(file->programs + i, options);
    for (uint32_t i = 0; i < file->n_programs; i++) {
        if (!is_allowed(file->programs + i, options)) continue;
        llmc_status status = open_number(model, options, i);
        if (status != LLMC_ERROR_TARGET || n_allowed == 1) return status;
        size_t n = strlen(reasons);
        name_target(file->programs + i, target, sizeof target);
        snprintf(reasons + n, sizeof reasons - n, "%s%s (%.*s)", n_tried++ ? ", " : "", target,
                 (int)strcspn(error_text(), "\n"), error_text());
        program_close(model);
    }
    if (!n_allowed) return none_allowed(model, options);
    const char *kind = options->run_on == LLMC_ON_ANY ? "" : options->run_on == LLMC_ON_CPU ? " for CPUs" : " for GPUs";
    return fail(LLMC_ERROR_TARGET, file->path,
                n_allowed < file->n_programs ? "it has programs for other devices: leave the choice to it"
                                             : "compile for this machine too: --target cpu, or --target cuda",
                "this machine runs none of the artifact's %u programs%s: %s", n_allowed, kind, reasons);
}
