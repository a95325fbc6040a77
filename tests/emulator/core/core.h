// What the files of the core share. One launch runs at a time; everything here belongs to it.
#pragma once

#include "../include/emulator.h"

namespace emulated {

constexpr int kMaxThreads = 1024;
constexpr int kWarps = kMaxThreads / 32;
constexpr uint32_t kWindowBytes = 1024 * 1024;     // of shared addresses: variables of all kernels in a library
constexpr uint32_t kDynamicLimit = 227 * 1024;     // what a block may have on sm_90
constexpr uint32_t kStaticAddress = 228 * 1024;    // where `__shared__` variables appear in the window
constexpr int kPrevious = kWarps + 64;             // the clock of the launch in front: 1 once it is waited for
constexpr int kClocks = kPrevious + 1;             // warps, then mbarriers, then that
constexpr uint32_t kGranuleBytes = 2;             // what the race detector tells apart
constexpr unsigned char kPoison = 0xff;            // NaN as f32, bf16 and f16

enum class State : uint8_t { done, ready, waiting };

struct Fiber {
    void *stack_pointer;
    State state;
    const char *waits_for;  // the primitive
    const void *place;      // the mbarrier
};

extern Fiber fibers[kMaxThreads];
extern int n_threads, current;  // of the block; the fiber that runs
extern int order;               // of blocks and threads: 0 ascending, 1 descending, 2 by chance
extern long n_switches;

// core/fibers.cpp
void wait_until_woken(const char *what, const void *place = nullptr);
void wake(int thread);
void run_block(Body body, void **arguments);
[[noreturn]] void abandon();  // the error text is written: leave the launch

// core/races.cpp: all of these do nothing in a library that isn't checked
struct Clocks {  // how far each warp and mbarrier has come: what is seen of it, and what the async proxy sees
    uint32_t seen[kClocks], fenced[kClocks];
};
extern bool checked, dependent;  // the library; the launch
void start_races();
void release(Clocks &to);                     // the current warp arrives at something
void acquire(const Clocks &from, int thread);  // this thread has waited for it
void lanes_met();                             // of the current warp
void fence_writes();                          // of the current warp, for the async proxy
void check_read(const void *shared, size_t n_bytes, const char *what);  // by the current thread
void check_async_read(const void *shared, size_t n_bytes, const char *what);
void note_async_read(const void *shared, size_t n_bytes, int first_warp, int n_warps);
void copy_begins(const void *shared, size_t n_bytes, const char *what);
void copy_lands(const void *shared, size_t n_bytes, int clock, uint32_t time);
uint32_t time_of_this_warp(), phase_of_this_warp();
bool is_ordered(int thread, uint32_t time, uint32_t phase);  // what a thread of the block did then, before this

// core/blocks.cpp
constexpr int kMaxBuffers = 256;
void start_blocks();         // of a launch
void start_block_in_grid();  // the next of them
void note_global_write(int buffer, size_t offset, size_t n_bytes);
void check_global_read(int buffer, size_t offset, size_t n_bytes);
// Fails when a dependent launch touches what the one in front may still write, or read.
void check_waited(int buffer, bool writes);

// core/copies.cpp
void start_copies();
bool land_one_copy();  // the oldest bulk copy under way, if there is one
void finish_copies();  // fails when something is still under way
// One line about an mbarrier.
const char *describe_mbarrier(const void *barrier);

// core/synchronize.cpp
void start_synchronization();

// core/tensor.cpp
void start_products();
void finish_products();

// core/memory.cpp
void start_memory(const Kernel &kernel);   // of a launch
void poison_shared();                      // before a block
void check_shared_end();                   // after a block
void check_guards();                       // after a launch
enum class Place { own, shared, global, nowhere };  // own: a thread's stack, or this library's constants
Place classify(const void *p, size_t n_bytes, int *buffer);  // the buffer's number for `global`, or -1
const unsigned char *buffer_start(int buffer);
size_t buffer_bytes(int buffer);
bool buffer_is_constant(int buffer);
bool is_stack(const void *p);  // core/fibers.cpp
// What lies at an address: "16 bytes past the end of operand 2", "shared memory + 0x40".
const char *describe_address(const void *p);

}  // namespace emulated
