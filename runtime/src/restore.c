/* restore.c - a sequence out of its file.
 *
 * Nothing that the file says is believed before it is compared: its header with the program that runs, its length with
 * what the header says there is, all of it with its hash. What it holds besides are tokens, which are checked, and
 * numbers, which lead nowhere: of a hostile file the worst is nonsense. Pieces go from the file to where they belong;
 * where something is wrong they are given back, and the caller has no sequence. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "runtime.h"

static const char DAMAGED[] = "delete it: the text is read again";

typedef struct reader {
    llmc_model *model;
    const char *path;
    int descriptor;
    uint64_t n_bytes; /* of the file */
    sha256_state hash;
    char *buffer; /* [SAVED_CHUNK_BYTES] */
} reader;

/* -- the file ----------------------------------------------------------------------------------------------------- */

static llmc_status cannot(const reader *reader)
{
    return fail(LLMC_ERROR_IO, reader->path, NULL, "the sequence cannot be restored: %s", strerror(errno));
}

static llmc_status begin(reader *reader)
{
    struct stat about;
    reader->descriptor = open(reader->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe is not waited for */
    if (reader->descriptor < 0 || fstat(reader->descriptor, &about) != 0) return cannot(reader);
    reader->n_bytes = (uint64_t)about.st_size;
    if (S_ISREG(about.st_mode)) return LLMC_OK;
    return fail(LLMC_ERROR_IO, reader->path, NULL, "the sequence cannot be restored: this is %s",
                S_ISDIR(about.st_mode) ? "a folder" : "no regular file");
}

static llmc_status cut_off(const reader *reader, uint64_t wanted)
{
    return fail(LLMC_ERROR_FORMAT, reader->path, DAMAGED, "the saved sequence is %s: %llu bytes, it should have %llu",
                reader->n_bytes < wanted ? "truncated" : "damaged", (unsigned long long)reader->n_bytes,
                (unsigned long long)wanted);
}

static llmc_status get(reader *reader, void *bytes, uint64_t n_bytes)
{
    char *at = bytes;
    for (uint64_t left = n_bytes; left;) {
        ssize_t n = read(reader->descriptor, at, left);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return cannot(reader);
        if (n == 0)
            return fail(LLMC_ERROR_FORMAT, reader->path, DAMAGED, "the saved sequence became shorter while it was read");
        at += n;
        left -= (uint64_t)n;
    }
    sha256_add(&reader->hash, bytes, n_bytes);
    return LLMC_OK;
}

static llmc_status move(void *context, void *host, char *device, uint64_t n_bytes)
{
    reader *reader = context;
    llmc_status status = host ? get(reader, host, n_bytes) : LLMC_OK;
    for (uint64_t done = 0; device && done < n_bytes && !status;) {
        uint64_t left = n_bytes - done, n = left < SAVED_CHUNK_BYTES ? left : SAVED_CHUNK_BYTES;
        status = get(reader, reader->buffer, n);
        if (!status) status = reader->model->device->write(reader->model, device + done, reader->buffer, n);
        done += n;
    }
    return status;
}

/* -- what is in it ------------------------------------------------------------------------------------------------ */

/* Bytes of a file with this header; its tokens fit the context, its note the most there may be. */
static uint64_t file_bytes(const llmc_model *model, const llmc_saved_header *header)
{
    const llmc_plan_header *h = &model->plans.header;
    const uint64_t n_pages = (header->n_tokens + h->page_tokens - 1ull) / h->page_tokens;
    return sizeof *header + header->n_note_bytes + header->n_tokens * sizeof(int32_t) +
           header->has_logits * (h->n_vocab * sizeof(float)) + (header->n_tokens ? model->states.page_bytes : 0) +
           n_pages * h->kv_page_bytes;
}

static llmc_status get_header(reader *reader, llmc_saved_header *header)
{
    const llmc_model *model = reader->model;
    memset(header, 0, sizeof *header);
    sha256_begin(&reader->hash);
    llmc_status status = get(reader, header, reader->n_bytes < sizeof *header ? reader->n_bytes : sizeof *header);
    if (!status && reader->n_bytes < sizeof *header &&
        memcmp(header->magic, LLMC_SAVED_MAGIC, sizeof header->magic) == 0)
        return cut_off(reader, sizeof *header);
    if (!status) status = saved_check(model, header, reader->path);
    if (status) return status;
    if (header->n_tokens > model->plans.header.n_context || header->has_logits > (header->n_tokens > 0) ||
        header->adapter > model->plans.n_adapters || header->n_note_bytes > LLMC_MAX_NOTE)
        return fail(LLMC_ERROR_FORMAT, reader->path, DAMAGED, "the saved sequence is damaged: its header");
    if (header->file_bytes != file_bytes(model, header) || header->file_bytes != reader->n_bytes)
        return cut_off(reader, file_bytes(model, header));
    const size_t hashed_from = offsetof(llmc_saved_header, weights_sha256);
    sha256_begin(&reader->hash);
    sha256_add(&reader->hash, (const char *)header + hashed_from, sizeof *header - hashed_from);
    return LLMC_OK;
}

static llmc_status get_note(reader *reader, llmc_sequence *sequence, uint64_t n_bytes)
{
    if (!n_bytes) return LLMC_OK;
    sequence->note = calloc(n_bytes, 1);
    if (!sequence->note)
        return fail(LLMC_ERROR_MEMORY, reader->path, NULL, "there is no memory for a note of %llu bytes",
                    (unsigned long long)n_bytes);
    sequence->n_note_bytes = n_bytes;
    return get(reader, sequence->note, n_bytes);
}

/* Room for the tokens, and all that is known of them. */
static llmc_status get_parts(reader *reader, llmc_sequence *sequence, const llmc_saved_header *header)
{
    sequence->adapter = (int32_t)header->adapter - 1;
    llmc_status status = get_note(reader, sequence, header->n_note_bytes);
    if (status || !header->n_tokens) return status;
    const llmc_step_input input = {sequence, NULL, header->n_tokens, NULL};
    status = step_reserve(reader->model, &input, 1, header->n_tokens);
    if (status) return status;
    sequence->length = header->n_tokens;
    sequence->has_logits = (int)header->has_logits;
    return saved_walk(sequence, move, reader);
}

static llmc_status check_parts(const reader *reader, const llmc_sequence *sequence, const llmc_saved_header *header)
{
    const plans *plans = &reader->model->plans;
    uint8_t digest[32];
    sha256_end(&reader->hash, digest);
    if (memcmp(digest, header->sha256, sizeof digest) != 0)
        return fail(LLMC_ERROR_FORMAT, reader->path, DAMAGED, "the saved sequence is damaged (its SHA-256 differs)");
    for (uint32_t i = 0; i < sequence->length; i++)
        if (sequence->tokens[i] < 0 || (uint32_t)sequence->tokens[i] >= plans->n_tokens * plans->n_types)
            return fail(LLMC_ERROR_FORMAT, reader->path, DAMAGED,
                        "the saved sequence is damaged: its token %u is %d, and the vocabulary has %u", i,
                        sequence->tokens[i], plans->n_tokens * plans->n_types);
    return LLMC_OK;
}

static llmc_status get_all(reader *reader, llmc_sequence **out)
{
    llmc_saved_header header;
    llmc_sequence *sequence;
    llmc_status status = begin(reader);
    if (!status) status = get_header(reader, &header);
    if (!status) status = sequence_new(reader->model, &sequence);
    if (status) return status;
    status = get_parts(reader, sequence, &header);
    if (!status) status = check_parts(reader, sequence, &header);
    if (!status && sequence->has_logits && reader->model->chosen) {
        sequence->choice = -1; /* stays, if no logit is a number */
        sample_at(reader->model, sequence->logits, 0, NULL, NULL, &sequence->choice);
    }
    if (!status) turns_of_text(sequence);
    if (status) sequence_free(sequence);
    else *out = sequence;
    return status;
}

llmc_status sequence_restore(llmc_model *model, const char *path, llmc_sequence **out)
{
    if (out) *out = NULL;
    if (!model || !path || !out)
        return fail(LLMC_ERROR_ARGUMENT, "sequence_restore", NULL, "the %s is NULL",
                    !model ? "model" : !path ? "path" : "result");
    llmc_status status = saved_is_possible(model);
    if (status) return status;
    reader reader = {.model = model, .path = path, .descriptor = -1, .buffer = memory_map(SAVED_CHUNK_BYTES)};
    if (!reader.buffer) return fail(LLMC_ERROR_MEMORY, path, NULL, "there is no memory to restore a sequence with");
    status = model->device->finish(model); /* what fails in a step that runs ahead is not the file's fault */
    if (!status) status = get_all(&reader, out);
    if (reader.descriptor >= 0) close(reader.descriptor);
    memory_unmap(reader.buffer, SAVED_CHUNK_BYTES);
    return status;
}

llmc_status sequence_note(const llmc_sequence *sequence, const void **bytes, size_t *n_bytes)
{
    if (!sequence || !bytes || !n_bytes)
        return fail(LLMC_ERROR_ARGUMENT, "sequence_note", NULL, "the %s is NULL", sequence ? "result" : "sequence");
    *bytes = sequence->note ? sequence->note : (const void *)"";
    *n_bytes = sequence->n_note_bytes;
    return LLMC_OK;
}
