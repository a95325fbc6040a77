// What the files of the core share. One launch runs at a time; everything here belongs to it.
#pragma once

#include "../include/emulator.h"

namespace emulated {

constexpr int kMaxThreads = 1024;  // of a block, and of a cluster's blocks together
constexpr int kMaxCluster = 8;     // blocks of a cluster
constexpr int kWarps = kMaxThreads / 32;
constexpr uint32_t kWindowBytes = 1024 * 1024;     // of shared addresses: variables of all kernels in a library
constexpr uint32_t kDynamicLimit = 227 * 1024;     // what a block may have on sm_90
constexpr uint32_t kStaticAddress = 228 * 1024;    // where `__shared__` variables appear in the window
// Clocks: of mbarriers; of the launch in front, 1 once it is waited for; of each warp's products; of each thread.
constexpr int kMbarrierClocks = 64, kPrevious = kMbarrierClocks, kFirstWarp = kPrevious + 1;
constexpr int kFirstThread = kFirstWarp + kWarps, kClocks = kFirstThread + kMaxThreads;
constexpr uint32_t kGranuleBytes = 2;             // what the race detector tells apart
constexpr unsigned char kPoison = 0xff;            // NaN as f32, bf16 and f16

enum class State : uint8_t { done, ready, waiting };

struct Fiber {
    void *stack_pointer;
    State state;
    const char *waits_for;  // the primitive
    const void *place;      // the mbarrier
};

// Fibers, and so warps, are counted through a cluster: thread t of its second block is fiber n_threads + t.
extern Fiber fibers[kMaxThreads];
extern int n_threads, n_fibers, current;  // of a block; of the cluster; the fiber that runs
inline int rank_of(int fiber) { return fiber / n_threads; }
inline int n_blocks() { return n_fibers / n_threads; }  // of the cluster
inline int thread_of(int fiber) { return fiber % n_threads; }
inline int clock_of(int fiber) { return kFirstThread + fiber; }
extern int order;               // of blocks and threads: 0 ascending, 1 descending, 2 by chance
extern long n_switches;

// core/fibers.cpp
void wait_until_woken(const char *what, const void *place = nullptr);
void wake(int thread);
void run_cluster(Body body, void **arguments, int first_block);
[[noreturn]] void abandon();  // the error text is written: leave the launch

// core/races.cpp: all of these do nothing in a library that isn't checked
struct Moment {  // of something that a thread did
    int thread;
    uint32_t time;  // of its warp
};
struct Clocks {  // how far each of them has come: what is seen of it, and what the async proxy sees
    uint32_t seen[kClocks], fenced[kClocks];
};
extern bool checked, dependent;  // the library; the launch
void start_races();
void join(Clocks &to, const Clocks &from);
void release(Clocks &to);                     // the current thread arrives at something
void acquire(const Clocks &from, int thread);  // this thread's warp has waited for it
void acquire_alone(const Clocks &from, uint64_t what);  // the current thread has, and whoever comes with the same `what`
void lanes_met(uint32_t mask);                // those of the current warp, in a __syncwarp
void fence_writes();                          // of the current thread and those it has met, for the async proxy
void check_read(const void *shared, size_t n_bytes, const char *what);  // by the current thread
void check_async_read(const void *shared, size_t n_bytes, const char *what);
void note_async_read(const void *shared, size_t n_bytes, int first_warp, int n_warps);
void copy_begins(const void *shared, size_t n_bytes, const char *what);
void copy_lands(const void *shared, size_t n_bytes, int clock, uint32_t time);
Moment this_moment();
bool is_ordered(const Moment &moment);  // what a thread of the cluster did then, before what this one does now
void check_end_of_block(int rank);       // fails when another block may still do something to it
void note_remote(int rank, int clock, uint32_t time);  // what a thread or mbarrier did to that block's shared memory

// core/blocks.cpp
constexpr int kMaxBuffers = 256;
void start_blocks();         // of a launch
void start_cluster_in_grid();  // the next of them
void note_global_write(int buffer, size_t offset, size_t n_bytes);
void check_global_read(int buffer, size_t offset, size_t n_bytes);
// Fails when a dependent launch touches what the one in front may still write, or read.
void check_waited(int buffer, bool writes);

// core/copies.cpp
void start_copies();
bool land_one_copy();  // the oldest bulk copy under way, or in descending order the newest; if there is one
void finish_copies(int rank);  // fails when something is still under way to this block of the cluster
// One line about an mbarrier.
const char *describe_mbarrier(const void *barrier);

// core/synchronize.cpp
void start_synchronization();

// core/clusters.cpp
void start_cluster();
void thread_ends();                                   // the current one
void check_there(int rank, const char *what);         // fails when that block is not in the cluster, or has ended

// core/tensor.cpp
void start_products();
void finish_products();

// core/memory.cpp
void start_memory(const Kernel &kernel);   // of a launch
void poison_shared();                      // before a block
void check_shared_end();                   // after a block
void check_guards();                       // after a launch
enum class Place { own, shared, global, nowhere };  // own: a thread's stack, or this library's constants
unsigned char *shared_of(int rank, const void *shared);  // where that block has what lies here in this one's shared memory
uint32_t cluster_offset(const void *shared);            // from the first block's window, of any block's shared memory
Place classify(const void *p, size_t n_bytes, int *buffer);  // the buffer's number for `global`, or -1
const unsigned char *buffer_start(int buffer);
size_t buffer_bytes(int buffer);
bool buffer_is_constant(int buffer);
bool is_stack(const void *p);  // core/fibers.cpp
// What lies at an address: "16 bytes past the end of operand 2", "shared memory + 0x40".
const char *describe_address(const void *p);

}  // namespace emulated
