/* host restore ARTIFACT FILE... - save a sequence in the first file, if there is none; restore each and, where that can
 * be done, go on with it; print "status fact" for each. */
#include <string.h>
#include <unistd.h>

#include "host.h"
#include "toy_oracle.h"

static llmc_model *model;

static void save(const char *path)
{
    const int32_t tokens[] = {3, 1, 4, 1, 5, 9, 2, 6, 5};
    llmc_sequence *sequence;
    REQUIRE(!api->sequence_new(model, &sequence) && !api->feed(sequence, tokens, 9));
    REQUIRE(!api->sequence_save(sequence, path, "a note", 6));
    api->sequence_free(sequence);
}

int host_restore(int argc, char **argv)
{
    const llmc_options options = {.size = sizeof options, .n_threads = 1};
    REQUIRE(argc > 1 && !model_open(argv[0], &options, &model));
    llmc_info before = {.size = sizeof before}, after = before;
    REQUIRE(!api->info(model, &before));
    if (access(argv[1], F_OK) != 0) save(argv[1]);
    for (int i = 1; i < argc; i++) {
        llmc_sequence *sequence = NULL;
        llmc_status status = api->sequence_restore(model, argv[i], &sequence);
        const char *text = status ? api->last_error() : "";
        printf("%d %.*s\n", (int)status, (int)strcspn(text, "\n"), text);
        REQUIRE(!status == (sequence != NULL));
        if (sequence && api->sequence_length(sequence) < TOY_CONTEXT)
            REQUIRE(!api->feed(sequence, &(int32_t){3}, 1));
        api->sequence_free(sequence);
        REQUIRE(!api->info(model, &after) && before.kv_tokens_free == after.kv_tokens_free);
    }
    api->close(model);
    return 0;
}
