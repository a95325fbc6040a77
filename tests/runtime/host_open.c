/* host open ARTIFACT... - open and close each; print "status fact" for each. */
#include <string.h>

#include "host.h"

int host_open(int argc, char **argv)
{
    const llmc_options options = {.size = sizeof options, .n_threads = 1};
    for (int i = 0; i < argc; i++) {
        llmc_model *model;
        llmc_status status = model_open(argv[i], &options, &model);
        const char *text = status ? api->last_error() : "";
        printf("%d %.*s\n", (int)status, (int)strcspn(text, "\n"), text);
        api->close(model);
    }
    return 0;
}
