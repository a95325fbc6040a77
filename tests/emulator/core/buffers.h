// What a library of emulated kernels offers to the outside, in C.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    const char *name;
    int n_pointers;
    int n_threads;
    uint32_t shared_bytes;
    int cluster;  // blocks of a cluster: the grid is a multiple of it
    // 0, or 1 and an error's text.
    int (*run)(int grid, void **arguments, char *error, size_t error_bytes);
} emulated_kernel;

// All kernels of the library.
const emulated_kernel *emulated_kernels(int *count);

// Memory that kernels may touch from now on, none of it constant, by launches that aren't dependent; with count 0 (as at the start) anything. `guard_bytes` of 0xff lie behind
// each buffer, and must still do so after a launch.
typedef struct {
    const void *start;
    size_t n_bytes, guard_bytes;
    const char *name;
} emulated_buffer;
void emulated_set_buffers(const emulated_buffer *buffers, int count);

// The launch in front does not write this buffer (by its place among those set): it may be read, but not written,
// before wait_for_previous().
void emulated_mark_constant(int buffer);

// Whether the next launches may start before the one in front has ended: then what isn't constant may be touched only
// after wait_for_previous().
void emulated_set_dependent(int dependent);

// In which order blocks run, and the threads of a block: 0 ascending (as at the start), 1 descending, 2 by chance.
void emulated_set_order(int order);

#ifdef __cplusplus
}
#endif
