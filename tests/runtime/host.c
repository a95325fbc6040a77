/* host.c - runs the test it is told to. */
#include <string.h>

#include "host.h"

const llmc_api *api;

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        int (*run)(int argc, char **argv);
    } tests[] = {
        {"open", host_open}, {"scenarios", host_scenarios}, {"units", host_units}, {"failures", host_failures},
        {"quota", host_quota}, {"restore", host_restore}, {"rows", host_rows},
    };
    api = llmc_get_api(LLMC_API_VERSION);
    for (size_t i = 0; argc > 1 && i < sizeof tests / sizeof *tests; i++)
        if (strcmp(argv[1], tests[i].name) == 0) return tests[i].run(argc - 2, argv + 2);
    return 2;
}
