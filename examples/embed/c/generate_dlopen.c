/* generate_dlopen.c - open an artifact with dlopen, feed it tokens, print what it says.
 *
 *   cc generate_dlopen.c -I ../../../runtime/include -ldl -o generate
 *   ./generate ./model.so 32 1,403,407
 */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

#include "llmc.h"

static int report(const char *text)
{
    fprintf(stderr, "error: %s\n", text);
    return 1;
}

/* Comma-separated ids; returns how many. */
static size_t parse_tokens(const char *text, int32_t *tokens, size_t most)
{
    size_t n = 0;
    for (char *end; n < most && *text; text = *end ? end + 1 : end) tokens[n++] = (int32_t)strtol(text, &end, 10);
    return n;
}

int main(int argc, char **argv)
{
    int32_t tokens[1024], token;
    llmc_get_api_function get_api;
    llmc_model *model = NULL;
    llmc_sequence *sequence = NULL;
    if (argc != 4) return report("usage: generate ARTIFACT N_TOKENS PROMPT_TOKENS");

    void *library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    if (!library) return report(dlerror());
    *(void **)&get_api = dlsym(library, "llmc_get_api"); /* how POSIX turns it into a function */
    const llmc_api *api = get_api ? get_api(LLMC_API_VERSION) : NULL;
    if (!api) return report("this is not an artifact, or one of another version");

    if (api->open(NULL, &model) || api->sequence_new(model, &sequence)) return report(api->last_error());
    if (api->feed(sequence, tokens, parse_tokens(argv[3], tokens, 1024))) return report(api->last_error());
    for (int left = atoi(argv[2]); left > 0; left--) {
        const char *text = "";
        size_t n_bytes = 0;
        if (api->sample(sequence, NULL, &token)) return report(api->last_error());
        if (api->is_eos(model, token)) break;
        if (api->token_text(model, token, &text, &n_bytes)) printf(" %d", (int)token); /* it has no vocabulary */
        fwrite(text, 1, n_bytes, stdout);
        fflush(stdout);
        if (left > 1 && api->feed(sequence, &token, 1)) return report(api->last_error());
    }
    putchar('\n');
    api->sequence_free(sequence);
    api->close(model);
    return 0;
}
