/* file.c - the artifact as a file: finding it, mapping it, and checking all that it says about itself. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "runtime.h"

static const char COPY_AGAIN[] = "compile the model again, or copy the artifact again";
static const char COMPILE_AGAIN[] = "compile the model again with this llmc";

/* An object of this library: its address tells which file the library was loaded from. */
static const char anchor = 0;

/* -- which file --------------------------------------------------------------------------------------------------- */

/* The line of /proc/self/maps that holds the anchor: path [4096] and inode. 0 when there is none.
 * Unlike what dladdr says, it is right after chdir() and shows when the file was deleted or replaced. */
static int mapped_file(char *path, unsigned long long *inode)
{
    char line[4400];
    int found = 0;
    FILE *maps = fopen("/proc/self/maps", "re");
    if (!maps) return 0;
    while (!found && fgets(line, sizeof line, maps)) {
        unsigned long long first, end;
        int name = 0;
        if (sscanf(line, "%llx-%llx %*s %*s %*s %llu %n", &first, &end, inode, &name) != 3 || !name) continue;
        if ((uintptr_t)&anchor < first || (uintptr_t)&anchor >= end) continue;
        line[strcspn(line, "\n")] = '\0';
        found = line[name] == '/' && snprintf(path, 4096, "%s", line + name) < 4096;
    }
    fclose(maps);
    return found;
}

static int is_inode(const char *path, unsigned long long inode)
{
    struct stat status;
    return stat(path, &status) == 0 && status.st_ino == inode;
}

llmc_status artifact_find(artifact *file)
{
    Dl_info info;
    unsigned long long inode = 0;
    int mapped = mapped_file(file->path, &inode);
    const char *loaded = dladdr(&anchor, &info) && info.dli_fname ? info.dli_fname : NULL;
    if (loaded && strlen(loaded) < sizeof file->path && (!mapped || is_inode(loaded, inode))) {
        strcpy(file->path, loaded); /* the name its user knows */
        return LLMC_OK;
    }
    /* Some file systems show other inodes in maps, so the path alone must do; a deleted file's does not exist. */
    if (mapped && access(file->path, F_OK) == 0) return LLMC_OK;
    return fail(LLMC_ERROR_IO, mapped ? file->path : loaded, "load the artifact again",
                "the artifact's file was moved or replaced after it was loaded");
}

/* -- trailer and directory ---------------------------------------------------------------------------------------- */

/* Letters, digits, underscores and dots, then nothing but zeros. */
static int is_name(const char *bytes, size_t n)
{
    size_t i = 0;
    for (; i < n && bytes[i]; i++)
        if (!strchr("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.", bytes[i])) return 0;
    size_t n_name = i;
    while (i < n && !bytes[i]) i++;
    return n_name > 0 && n_name < n && i == n;
}

static llmc_status check_trailer(const artifact *file, llmc_trailer *trailer)
{
    const char *path = file->path;
    if (file->n_bytes < sizeof *trailer)
        return fail(LLMC_ERROR_FORMAT, path, COPY_AGAIN, "the artifact is truncated: %llu bytes",
                    (unsigned long long)file->n_bytes);
    memcpy(trailer, file->bytes + file->n_bytes - sizeof *trailer, sizeof *trailer);
    if (memcmp(trailer->magic, LLMC_TRAILER_MAGIC, sizeof trailer->magic) != 0)
        return fail(LLMC_ERROR_FORMAT, path, COPY_AGAIN,
                    "the artifact is truncated, or not an artifact: its %llu bytes do not end with a trailer",
                    (unsigned long long)file->n_bytes);
    if (trailer->format_version < LLMC_FORMAT_VERSION || trailer->format_version > LLMC_FORMAT_GRIDS)
        return fail(LLMC_ERROR_FORMAT, path, COMPILE_AGAIN,
                    "the artifact has format version %u; its runtime reads %u to %u", trailer->format_version,
                    LLMC_FORMAT_VERSION, LLMC_FORMAT_GRIDS);
    if (trailer->file_bytes != file->n_bytes)
        return fail(LLMC_ERROR_FORMAT, path, COPY_AGAIN, "the artifact is %s: %llu bytes, the trailer says %llu",
                    file->n_bytes < trailer->file_bytes ? "truncated" : "damaged", (unsigned long long)file->n_bytes,
                    (unsigned long long)trailer->file_bytes);
    uint64_t n_directory = (uint64_t)trailer->n_sections * sizeof(llmc_section);
    uint64_t before_trailer = file->n_bytes - sizeof *trailer;
    if (trailer->n_sections > LLMC_MAX_SECTIONS || n_directory > before_trailer ||
        trailer->directory_offset != before_trailer - n_directory)
        return fail(LLMC_ERROR_FORMAT, path, COPY_AGAIN,
                    "the trailer is damaged: %u sections, directory at %llu of %llu bytes", trailer->n_sections,
                    (unsigned long long)trailer->directory_offset, (unsigned long long)file->n_bytes);
    return LLMC_OK;
}

/* "weights", "weights.1", … */
static int is_weights(const llmc_section *entry)
{
    return strncmp(entry->name, "weights", 7) == 0 && (!entry->name[7] || entry->name[7] == '.');
}

/* One entry against those before it, which are known to be good: entries[0 … index]. */
static llmc_status check_entry(const artifact *file, const llmc_section *entries, uint32_t index, uint64_t limit)
{
    const llmc_section *entry = entries + index;
    const char *wrong = NULL;
    uint64_t alignment = is_weights(entry) ? 4096 : LLMC_ALIGNMENT;
    uint64_t free_from = index ? entry[-1].offset + entry[-1].n_bytes : 0;
    if (!is_name(entry->name, sizeof entry->name))
        return fail(LLMC_ERROR_FORMAT, file->path, COPY_AGAIN, "the directory is damaged: the name of section %u",
                    index);
    if (index == 0 && (strcmp(entry->name, "code") != 0 || entry->offset)) wrong = "is not the code at offset 0";
    else if (entry->offset > limit || entry->n_bytes > limit - entry->offset) wrong = "lies outside the file";
    else if (entry->offset < free_from) wrong = "overlaps the one before it";
    else if (entry->offset % alignment) wrong = "is not aligned";
    for (uint32_t i = 0; i < index && !wrong; i++)
        if (strcmp(entry->name, entries[i].name) == 0) wrong = "is there twice";
    if (!wrong) return LLMC_OK;
    return fail(LLMC_ERROR_FORMAT, file->path, COPY_AGAIN, "the directory is damaged: section '%s' %s", entry->name,
                wrong);
}

/* Where a section of this name belongs, or NULL: nobody here reads it. */
static range *place_of(artifact *file, const char *name)
{
    size_t n = strcspn(name, ".");
    uint32_t number = 0;
    if (strcmp(name, "code") == 0) return &file->code;
    if (strcmp(name, "vocabulary") == 0) return &file->vocabulary;
    if (name[n]) {
        if (name[n + 1] < '1' || name[n + 1] >= '0' + LLMC_MAX_PROGRAMS || name[n + 2]) return NULL;
        number = (uint32_t)(name[n + 1] - '0');
    }
    program *program = file->programs + number;
    if (n == 7 && memcmp(name, "weights", n) == 0) return &program->weights;
    if (n == 4 && memcmp(name, "plan", n) == 0) return &program->plan;
    if (n == 4 && memcmp(name, "cuda", n) == 0) return &program->cuda;
    return NULL;
}

/* The kernels of a program for CPUs; 0 when it is for others, or plan.c will refuse it. */
static uint32_t count_kernels(const range *plan)
{
    llmc_plan_header header;
    if (plan->n_bytes < sizeof header) return 0;
    memcpy(&header, plan->bytes, sizeof header);
    return header.device == LLMC_DEVICE_CPU ? header.n_kernels : 0;
}

/* Programs are those up to the first without a plan, and there is one. */
static llmc_status count_programs(artifact *file)
{
    uint32_t n = 0;
    const range *weights = &file->programs[0].weights;
    for (; n < LLMC_MAX_PROGRAMS && file->programs[n].plan.bytes && weights->bytes; n++) {
        program *program = file->programs + n;
        if (!program->weights.bytes) program->weights = *weights;
        program->first_kernel = file->n_kernels;
        file->n_kernels += count_kernels(&program->plan);
    }
    file->n_programs = n;
    file->program = file->programs[0];
    if (n) return LLMC_OK;
    return fail(LLMC_ERROR_FORMAT, file->path, COMPILE_AGAIN, "the artifact has no section '%s'",
                file->programs[0].weights.bytes ? "plan" : "weights");
}

static llmc_status check_sections(artifact *file)
{
    llmc_trailer trailer;
    llmc_section entries[LLMC_MAX_SECTIONS];
    uint8_t digest[32];
    llmc_status status = check_trailer(file, &trailer);
    if (status) return status;
    uint64_t n_directory = trailer.n_sections * sizeof(llmc_section);
    sha256(file->bytes + trailer.directory_offset, n_directory, digest);
    if (memcmp(digest, trailer.directory_sha256, sizeof digest) != 0)
        return fail(LLMC_ERROR_FORMAT, file->path, COPY_AGAIN, "the directory is damaged (its SHA-256 differs)");
    memcpy(entries, file->bytes + trailer.directory_offset, n_directory);

    for (uint32_t i = 0; i < trailer.n_sections; i++) {
        status = check_entry(file, entries, i, trailer.directory_offset);
        if (status) return status;
    }
    for (uint32_t i = 0; i < trailer.n_sections; i++) {
        const llmc_section *entry = entries + i;
        const uint8_t *kept = file->bytes + trailer.directory_offset + i * sizeof *entry; /* of entry */
        range *place = place_of(file, entry->name);
        range bytes = {file->bytes + entry->offset, entry->n_bytes, kept + offsetof(llmc_section, sha256)};
        if (place) *place = bytes;
        if (is_weights(entry)) continue; /* gigabytes: llmc verify reads them */
        sha256(bytes.bytes, bytes.n_bytes, digest);
        if (memcmp(digest, entry->sha256, sizeof digest) != 0)
            return fail(LLMC_ERROR_FORMAT, file->path, COPY_AGAIN, "section '%s' is damaged (its SHA-256 differs)",
                        entry->name);
    }
    return count_programs(file);
}

/* -- mapping ------------------------------------------------------------------------------------------------------ */

llmc_status artifact_open(artifact *file)
{
    struct stat about;
    int descriptor = open(file->path, O_RDONLY | O_CLOEXEC);
    if (descriptor < 0 || fstat(descriptor, &about) != 0) {
        int reason = errno;
        if (descriptor >= 0) close(descriptor);
        return fail(LLMC_ERROR_IO, file->path, NULL, "the artifact cannot be opened: %s", strerror(reason));
    }
    if (!S_ISREG(about.st_mode) || about.st_size <= 0) {
        close(descriptor);
        return fail(LLMC_ERROR_FORMAT, file->path, COPY_AGAIN, "the artifact is empty, or not a file");
    }
    void *bytes = mmap(NULL, (size_t)about.st_size, PROT_READ, MAP_PRIVATE, descriptor, 0);
    int reason = errno;
    close(descriptor);
    if (bytes == MAP_FAILED)
        return fail(LLMC_ERROR_IO, file->path, NULL, "the artifact's %lld bytes cannot be mapped: %s",
                    (long long)about.st_size, strerror(reason));
    file->bytes = bytes;
    file->n_bytes = (uint64_t)about.st_size;
    llmc_status status = check_sections(file);
    if (status) artifact_close(file);
    else madvise(bytes, file->n_bytes, MADV_HUGEPAGE); /* where the file system can: fewer TLB misses in the weights */
    return status;
}

void artifact_close(artifact *file)
{
    if (file->bytes) munmap((void *)file->bytes, file->n_bytes);
    file->bytes = NULL;
}

void *memory_map(uint64_t n_bytes)
{
    if (!n_bytes) n_bytes = 1;
    void *bytes = n_bytes > SIZE_MAX / 2
                      ? MAP_FAILED
                      : mmap(NULL, (size_t)n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (bytes == MAP_FAILED) return NULL;
    madvise(bytes, (size_t)n_bytes, MADV_HUGEPAGE);
    return bytes;
}

void memory_unmap(void *bytes, uint64_t n_bytes)
{
    if (bytes) munmap(bytes, n_bytes ? (size_t)n_bytes : 1);
}
