// Threads of a cluster's blocks as fibers, and which of them runs next.
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "core.h"

namespace emulated {

Index thread_index, block_index, block_size, grid_size;
Fiber fibers[kMaxThreads];
int n_threads, n_fibers, current, order;
long n_switches;

namespace {

constexpr size_t kStackBytes = 128 * 1024, kPage = 4096;
constexpr long kMaxIdleSpins = 20000;

unsigned char *stacks;
void *main_stack_pointer;
Body running_body;
void **running_arguments;

// Fibers that can go on, first in first out; and those that look at memory again and again.
struct Queue {
    int threads[kMaxThreads], first, count;
    void push(int thread) { threads[(first + count++) % kMaxThreads] = thread; }
    int pop() {
        const int thread = threads[first];
        first = (first + 1) % kMaxThreads, count--;
        return thread;
    }
} ready, spinning;
long idle_spins;
int n_live;
int first_block;  // of the cluster

// Saves what a call preserves on this stack, and goes on where `to` was left.
extern "C" void emulated_switch(void **from, void *to);
asm(R"(
    .text
    .globl emulated_switch
    .hidden emulated_switch
    .type emulated_switch, @function
emulated_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emulated_switch, .-emulated_switch
)");

void run(int fiber) {
    current = fiber;
    thread_index.x = unsigned(thread_of(fiber)), block_index.x = unsigned(first_block + rank_of(fiber));
}

void report_stuck() {
    int where = -1, n_waiting = 0;
    for (int i = 0; i < n_fibers; i++)
        if (fibers[i].state == State::waiting) {
            if (where < 0) where = i;
            n_waiting++;
        }
    run(where);
    const Fiber &fiber = fibers[where];
    fail("deadlock: %d of %d threads wait for ever, this one in %s%s%s", n_waiting, n_fibers, fiber.waits_for,
         fiber.place ? " on " : "", fiber.place ? describe_mbarrier(fiber.place) : "");
}

// The next fiber to run; -1 when all are done.
int choose() {
    for (;;) {
        if (ready.count) return ready.pop();
        if (!n_live) return -1;
        if (land_one_copy()) {
            idle_spins = 0;
        } else if (spinning.count) {
            if (++idle_spins > kMaxIdleSpins) {
                run(spinning.pop());
                fail("livelock: looks at memory for ever in %s, and nothing changes it", fibers[current].waits_for);
            }
        } else {
            report_stuck();
        }
        while (spinning.count) ready.push(spinning.pop());
    }
}

void run_next() {
    const int next = choose(), previous = current;
    if (next == previous) return;
    n_switches++;
    void **from = &fibers[previous].stack_pointer;
    if (next < 0) return emulated_switch(from, main_stack_pointer);
    run(next);
    emulated_switch(from, fibers[next].stack_pointer);
}

void fiber_main() {
    running_body(running_arguments);
    fibers[current].state = State::done;
    n_live--;
    thread_ends();
    run_next();
    abort();
}

void prepare_fiber(int thread) {
    if (!stacks) {
        stacks = static_cast<unsigned char *>(mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        for (int i = 0; i < kMaxThreads; i++) mprotect(stacks + i * kStackBytes, kPage, PROT_NONE);
    }
    // Neighbouring stacks start at different offsets, or they would all compete for the same lines of the cache.
    void **top = reinterpret_cast<void **>(stacks + (thread + 1) * kStackBytes - 64 - (thread % 60) * 64);
    *--top = nullptr;  // fiber_main's return address: it has none
    *--top = reinterpret_cast<void *>(fiber_main);
    top -= 6;
    fibers[thread] = {top, State::ready, "", nullptr};
}

}  // namespace

bool is_stack(const void *p) {
    const auto *at = static_cast<const unsigned char *>(p);
    return stacks <= at && at < stacks + kMaxThreads * kStackBytes;
}

void wait_until_woken(const char *what, const void *place) {
    Fiber &fiber = fibers[current];
    fiber.state = State::waiting, fiber.waits_for = what, fiber.place = place;
    run_next();
}

void wake(int thread) {
    if (fibers[thread].state != State::waiting) return;
    fibers[thread].state = State::ready;
    ready.push(thread);
    idle_spins = 0;
}

void spin(const char *what) {
    fibers[current].waits_for = what;
    spinning.push(current);
    run_next();
}

void run_cluster(Body body, void **arguments, int first) {
    running_body = body, running_arguments = arguments, first_block = first;
    ready = spinning = {};
    idle_spins = 0;
    n_live = n_fibers;
    for (int i = 0; i < n_fibers; i++) {
        prepare_fiber(i);
        ready.push(order == 1 ? n_fibers - 1 - i : i);
    }
    if (order == 2)
        for (int i = n_fibers - 1; i > 0; i--) {
            const int j = rand() % (i + 1), kept = ready.threads[i];
            ready.threads[i] = ready.threads[j], ready.threads[j] = kept;
        }
    thread_index = block_index = {0, 0, 0};
    run(choose());
    emulated_switch(&main_stack_pointer, fibers[current].stack_pointer);
}

}  // namespace emulated
