/* save.c - a sequence into a file.
 *
 * All is written to a new file beside the old one, brought to the disk, and given the old one's name: whatever fails on
 * the way, whoever reads finds one of the two, whole. The header, which has the hash of the rest, is written last. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "runtime.h"

enum { HASHED_FROM = offsetof(llmc_saved_header, weights_sha256) };

typedef struct writer {
    llmc_model *model;
    const char *path;        /* as the caller says it */
    char place[PATH_MAX];    /* of the file that is replaced, behind links */
    char written[PATH_MAX];  /* of the one that is written; "": there is none */
    int descriptor;
    uint64_t offset;
    sha256_state hash;
    char *buffer; /* [SAVED_CHUNK_BYTES] */
} writer;

static llmc_status cannot(const writer *writer, const char *doing)
{
    return fail(LLMC_ERROR_IO, writer->path, NULL, "the sequence cannot be saved: %s: %s", doing, strerror(errno));
}

/* -- the file ----------------------------------------------------------------------------------------------------- */

/* Where the file is, or is to be; what is there is a file. */
static llmc_status find_place(writer *writer)
{
    struct stat about;
    if (!realpath(writer->path, writer->place)) {
        if (errno != ENOENT) return cannot(writer, "finding the file");
        if ((size_t)snprintf(writer->place, sizeof writer->place, "%s", writer->path) >= sizeof writer->place) {
            errno = ENAMETOOLONG;
            return cannot(writer, "finding the file");
        }
    }
    if (stat(writer->place, &about) != 0 || S_ISREG(about.st_mode)) return LLMC_OK;
    return fail(LLMC_ERROR_IO, writer->path, NULL, "the sequence cannot be saved: what is there is %s",
                S_ISDIR(about.st_mode) ? "a folder" : "no regular file");
}

/* A file of the owner's alone, in the same folder. */
static llmc_status begin(writer *writer)
{
    llmc_status status = find_place(writer);
    if (status) return status;
    int n = snprintf(writer->written, sizeof writer->written, "%s.XXXXXX", writer->place);
    errno = ENAMETOOLONG;
    writer->descriptor = (size_t)n < sizeof writer->written ? mkostemp(writer->written, O_CLOEXEC) : -1;
    if (writer->descriptor >= 0) return LLMC_OK;
    writer->written[0] = '\0';
    return cannot(writer, "making a file beside it");
}

static llmc_status put_at(const writer *writer, const void *bytes, uint64_t n_bytes, uint64_t offset)
{
    const char *at = bytes;
    while (n_bytes) {
        ssize_t n = pwrite(writer->descriptor, at, n_bytes, (off_t)offset);
        if (n < 0 && errno == EINTR) continue;
        if (n == 0) errno = EIO;
        if (n <= 0) return cannot(writer, "writing");
        at += n;
        offset += (uint64_t)n;
        n_bytes -= (uint64_t)n;
    }
    return LLMC_OK;
}

static llmc_status put(writer *writer, const void *bytes, uint64_t n_bytes)
{
    sha256_add(&writer->hash, bytes, n_bytes);
    llmc_status status = put_at(writer, bytes, n_bytes, writer->offset);
    writer->offset += n_bytes;
    return status;
}

/* The name of a file is the folder's, and is on the disk when that is; some file systems cannot say so. */
static void bring_folder_to_disk(writer *writer)
{
    char *slash = strrchr(writer->place, '/');
    if (slash) slash[slash == writer->place] = '\0';
    int folder = open(slash ? writer->place : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder < 0) return;
    fsync(folder);
    close(folder);
}

static llmc_status finish(writer *writer)
{
    if (fsync(writer->descriptor) != 0) return cannot(writer, "bringing it to the disk");
    int descriptor = writer->descriptor;
    writer->descriptor = -1;
    if (close(descriptor) != 0) return cannot(writer, "writing");
    if (rename(writer->written, writer->place) != 0) return cannot(writer, "giving the file its name");
    writer->written[0] = '\0';
    bring_folder_to_disk(writer);
    return LLMC_OK;
}

/* -- what is in it ------------------------------------------------------------------------------------------------ */

static llmc_status move(void *context, void *host, char *device, uint64_t n_bytes)
{
    writer *writer = context;
    llmc_status status = host ? put(writer, host, n_bytes) : LLMC_OK;
    for (uint64_t done = 0; device && done < n_bytes && !status;) {
        uint64_t left = n_bytes - done, n = left < SAVED_CHUNK_BYTES ? left : SAVED_CHUNK_BYTES;
        status = writer->model->device->read(writer->model, writer->buffer, device + done, n);
        if (!status) status = put(writer, writer->buffer, n);
        done += n;
    }
    return status;
}

static llmc_status put_all(writer *writer, const llmc_sequence *sequence, const void *note, uint64_t n_note_bytes)
{
    llmc_saved_header header;
    saved_begin(writer->model, &header);
    header.has_logits = (uint32_t)sequence->has_logits;
    header.n_tokens = sequence->length;
    header.n_note_bytes = n_note_bytes;
    header.adapter = (uint32_t)(sequence->adapter + 1);
    sha256_begin(&writer->hash);
    sha256_add(&writer->hash, (const char *)&header + HASHED_FROM, sizeof header - HASHED_FROM);
    writer->offset = sizeof header;
    llmc_status status = put(writer, note, n_note_bytes);
    if (!status) status = saved_walk(sequence, move, writer);
    header.file_bytes = writer->offset;
    sha256_end(&writer->hash, header.sha256);
    return status ? status : put_at(writer, &header, sizeof header, 0);
}

/* What can be refused before anything is written. */
static llmc_status check(const llmc_sequence *sequence, const char *path, const void *note, size_t n_note_bytes)
{
    if (!sequence || !path || (!note && n_note_bytes))
        return fail(LLMC_ERROR_ARGUMENT, "sequence_save", NULL, "the %s is NULL",
                    !sequence ? "sequence" : !path ? "path" : "note");
    if (n_note_bytes > LLMC_MAX_NOTE)
        return fail(LLMC_ERROR_ARGUMENT, "sequence_save", NULL, "a note of %zu bytes is longer than %u", n_note_bytes,
                    LLMC_MAX_NOTE);
    if (sequence->is_repeated)
        return fail(LLMC_ERROR_ARGUMENT, "sequence_save", NULL,
                    "the sequence was made by sequence_repeat: no text is behind it");
    for (uint32_t i = 0; i < sequence->length; i++)
        if ((uint32_t)sequence->tokens[i] >= rows_first(sequence->model))
            return fail(LLMC_ERROR_ARGUMENT, "sequence_save", "save it in front of its first picture",
                        "token %u of the sequence is a row of a picture, or the caller's own, which no file keeps", i);
    return saved_is_possible(sequence->model);
}

llmc_status sequence_save(const llmc_sequence *sequence, const char *path, const void *note, size_t n_note_bytes)
{
    const float *logits;
    llmc_status status = check(sequence, path, note, n_note_bytes);
    if (status) return status;
    writer writer = {.model = sequence->model, .path = path, .descriptor = -1};
    status = writer.model->device->finish(writer.model); /* the step that may still run */
    if (!status && sequence->has_logits) status = sequence_logits(sequence, &logits); /* brings them to the host */
    if (status) return status;
    writer.buffer = memory_map(SAVED_CHUNK_BYTES);
    if (!writer.buffer) return fail(LLMC_ERROR_MEMORY, path, NULL, "there is no memory to save a sequence with");
    status = begin(&writer);
    if (!status) status = put_all(&writer, sequence, note, n_note_bytes);
    if (!status) status = finish(&writer);
    if (writer.descriptor >= 0) close(writer.descriptor);
    if (writer.written[0]) unlink(writer.written);
    memory_unmap(writer.buffer, SAVED_CHUNK_BYTES);
    return status;
}
