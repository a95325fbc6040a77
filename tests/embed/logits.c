/* logits.c - open an artifact with dlopen, feed it a prompt and then tokens of its own choice, one by one, and write the
 * logits after each feed to standard output: float32 [1 + n, n_vocab]; through its first adapter, if it has some.
 *
 *   logits ARTIFACT N PROMPT_TOKENS
 */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

#include "llmc.h"

static const llmc_api *api;

static int report(const char *text)
{
    fprintf(stderr, "error: %s\n", text);
    return 1;
}

int main(int argc, char **argv)
{
    static int32_t tokens[4096];
    int32_t token = 0, n_tokens = 0;
    llmc_get_api_function get_api = NULL;
    llmc_model *model = NULL;
    llmc_sequence *sequence = NULL;
    llmc_info info = {.size = sizeof info};
    if (argc != 4) return report("usage: logits ARTIFACT N PROMPT_TOKENS");
    for (char *text = argv[3], *end; *text && n_tokens < 4096; text = *end ? end + 1 : end)
        tokens[n_tokens++] = (int32_t)strtol(text, &end, 10);

    void *library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    if (!library) return report(dlerror());
    *(void **)&get_api = dlsym(library, "llmc_get_api");
    api = get_api ? get_api(LLMC_API_VERSION) : NULL;
    if (!api) return report("no artifact");
    if (api->open(NULL, &model) || api->info(model, &info)) return report(api->last_error());
    if (api->sequence_new(model, &sequence)) return report(api->last_error());
    if (info.n_adapters && api->sequence_set_adapter(sequence, 0)) return report(api->last_error());
    if (api->feed(sequence, tokens, (size_t)n_tokens)) return report(api->last_error());
    for (int left = atoi(argv[2]);; left--) {
        const float *logits = NULL;
        if (api->logits(sequence, &logits)) return report(api->last_error());
        fwrite(logits, sizeof *logits, (size_t)info.n_vocab, stdout);
        if (!left) break;
        if (api->sample(sequence, NULL, &token) || api->feed(sequence, &token, 1)) return report(api->last_error());
    }
    api->sequence_free(sequence);
    api->close(model);
    return 0;
}
