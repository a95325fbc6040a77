/* host.h - tests in C: one program, linked with the runtime and the toy's kernels so that sanitizers see everything.
 * Each test takes the arguments after its name and returns 0 when all is well. */
#ifndef HOST_H
#define HOST_H

#include <stdio.h>
#include <stdlib.h>

#include "runtime.h"

extern const llmc_api *api;

#define REQUIRE(condition)                                                        \
    do {                                                                          \
        if (!(condition)) {                                                       \
            printf("%s:%d: %s\nlast error: %s\n", __FILE__, __LINE__, #condition, api->last_error()); \
            exit(1);                                                              \
        }                                                                         \
    } while (0)

int host_open(int argc, char **argv);
int host_scenarios(int argc, char **argv);
int host_units(int argc, char **argv);
int host_failures(int argc, char **argv);
int host_quota(int argc, char **argv);
int host_restore(int argc, char **argv);
int host_rows(int argc, char **argv);

#endif
