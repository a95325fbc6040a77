// Who may see what in shared memory: a race detector with a vector clock for each warp.
//
// Libraries built "checked" are instrumented as for ThreadSanitizer, whose hooks are defined here. Every load and store
// of a kernel comes by: outside of the operands it fails; in shared memory it is compared with the last accesses to the
// same two bytes, and fails when no barrier orders the two. Beside the warps, each mbarrier has a clock of its own, for
// the bulk copies that it counts. "Fenced" clocks say how much of each warp's writes the async proxy can see.
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "core.h"

namespace emulated {

bool checked, dependent;

namespace {

constexpr int kNobody = 0xff, kPending = 0xfe;  // writers: none yet, or an asynchronous copy under way

struct Granule {  // two bytes of shared memory
    uint32_t written, readers;  // when; by which warps since then
    uint32_t phase, read_phase;  // of the warp that wrote and that read last, for races within it
    int16_t writer_thread, reader_thread;
    uint8_t writer;
    bool generic;  // written by a plain store
};
constexpr uint32_t kGranules = kWindowBytes / kGranuleBytes;  // of a block
Granule granules[kMaxCluster * kGranules];
uint32_t (*read_times)[kWarps];  // of the granule's last read by each warp

Clocks clocks[kWarps];
uint32_t phases[kWarps];  // counts what orders the lanes of a warp
uint32_t remote[kMaxCluster][kClocks];  // when others last reached into a block's shared memory

int warp() { return current / 32; }

uint32_t &own_time() { return clocks[warp()].seen[warp()]; }

void report(const char *what, const char *verb, uint32_t address, const char *whom, int thread) {
    char place[64] = "";
    if (thread >= 0) snprintf(place, sizeof place, " (%d)", thread_of(thread));
    fail("race: %s %s shared memory + %#x, which %s%s, with no barrier between", what, verb, address % kWindowBytes,
         whom, place);
}

void check_order_with_write(const Granule &granule, uint32_t address, const char *what, const char *verb) {
    if (granule.writer == kNobody) return;
    if (granule.writer == kPending) fail("%s %s shared memory + %#x, into which a copy is under way", what, verb, address % kWindowBytes);
    if (granule.writer == warp()) {
        if (granule.writer_thread != current && granule.phase == phases[warp()])
            report(what, verb, address, "another lane of the warp wrote", granule.writer_thread);
    } else if (clocks[warp()].seen[granule.writer] < granule.written) {
        if (granule.writer < kWarps) report(what, verb, address, "another warp wrote", granule.writer_thread);
        fail("race: %s %s shared memory + %#x, where a bulk copy landed whose mbarrier this warp has not waited for", what,
             verb, address % kWindowBytes);
    }
}

void read_granule(uint32_t index, const char *what) {
    Granule &granule = granules[index];
    check_order_with_write(granule, index * kGranuleBytes, what, "reads");
    granule.readers |= 1u << warp();
    granule.reader_thread = int16_t(current), granule.read_phase = phases[warp()];
    read_times[index][warp()] = own_time();
}

void write_granule(uint32_t index, const char *what) {
    Granule &granule = granules[index];
    check_order_with_write(granule, index * kGranuleBytes, what, "writes");
    for (uint32_t rest = granule.readers; rest; rest &= rest - 1) {
        const int reader = __builtin_ctz(rest);
        if (reader != warp() && clocks[warp()].seen[reader] < read_times[index][reader])
            report(what, "writes", index * kGranuleBytes, "another warp read", reader * 32);
        if (reader == warp() && granule.reader_thread / 32 == warp() && granule.reader_thread != current &&
            granule.read_phase == phases[warp()])
            report(what, "writes", index * kGranuleBytes, "another lane of the warp read", granule.reader_thread);
    }
    granule.writer = uint8_t(warp()), granule.writer_thread = int16_t(current), granule.generic = true;
    granule.written = own_time(), granule.phase = phases[warp()], granule.readers = 0;
}

template <typename F>
void for_each_granule(const void *shared, size_t n_bytes, F visit) {
    const uint32_t first = cluster_offset(shared), last = first + uint32_t(n_bytes) - 1;
    for (uint32_t index = first / kGranuleBytes; index <= last / kGranuleBytes; index++) visit(index);
}

// What a kernel's own loads and stores do.
inline void touch(const void *p, size_t n_bytes, bool writes, bool aligned) {
    const auto at = reinterpret_cast<uintptr_t>(p);
    int buffer = -1;
    switch (classify(p, n_bytes, &buffer)) {
        case Place::own:
            return;
        case Place::shared:
            if (aligned && at % n_bytes) break;
            if (writes)
                for_each_granule(p, n_bytes, [](uint32_t index) { write_granule(index, "a store"); });
            else
                for_each_granule(p, n_bytes, [](uint32_t index) { read_granule(index, "a load"); });
            return;
        case Place::global:
            if (aligned && at % n_bytes) break;
            if (buffer >= 0) {
                check_waited(buffer, writes);
                const size_t offset = size_t(static_cast<const unsigned char *>(p) - buffer_start(buffer));
                (writes ? note_global_write : check_global_read)(buffer, offset, n_bytes);
            }
            return;
        case Place::nowhere:
            fail("%s of %zu bytes at %s", writes ? "a store" : "a load", n_bytes, describe_address(p));
    }
    fail("%s of %zu bytes at %s is misaligned", writes ? "a store" : "a load", n_bytes, describe_address(p));
}

}  // namespace

void join(Clocks &to, const Clocks &from) {
    for (int i = 0; i < kClocks; i++) {
        if (to.seen[i] < from.seen[i]) to.seen[i] = from.seen[i];
        if (to.fenced[i] < from.fenced[i]) to.fenced[i] = from.fenced[i];
    }
}

void start_races() {
    if (!checked) return;
    if (!read_times)
        read_times = static_cast<uint32_t(*)[kWarps]>(mmap(nullptr, sizeof *read_times * kMaxCluster * kGranules, PROT_READ | PROT_WRITE,
                                                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    Granule fresh = {};
    fresh.writer = kNobody, fresh.reader_thread = -1;
    for (Granule *granule = granules; granule < granules + n_blocks() * kGranules; granule++)
        if (granule->writer != kNobody || granule->readers) *granule = fresh;
    memset(remote, 0, sizeof remote);
    memset(clocks, 0, sizeof clocks);
    for (int i = 0; i < kWarps; i++) clocks[i].seen[i] = phases[i] = 1;
}

void release(Clocks &to) {
    if (!checked) return;
    join(to, clocks[warp()]);
    own_time()++;
}

void acquire(const Clocks &from, int thread) {
    if (!checked) return;
    join(clocks[thread / 32], from);
    phases[thread / 32]++;
}

void lanes_met() {
    if (checked) phases[warp()]++;
}

void fence_writes() {
    if (!checked) return;
    Clocks &mine = clocks[warp()];
    for (int i = 0; i < kClocks; i++)
        if (mine.fenced[i] < mine.seen[i]) mine.fenced[i] = mine.seen[i];
    own_time()++;
}

void check_read(const void *shared, size_t n_bytes, const char *what) {
    if (checked) for_each_granule(shared, n_bytes, [&](uint32_t index) { read_granule(index, what); });
}

void check_async_read(const void *shared, size_t n_bytes, const char *what) {
    if (!checked) return;
    for_each_granule(shared, n_bytes, [&](uint32_t index) {
        const Granule &granule = granules[index];
        check_order_with_write(granule, index * kGranuleBytes, what, "reads");
        if (granule.generic && granule.writer < kWarps && clocks[warp()].fenced[granule.writer] < granule.written)
            fail("%s reads shared memory + %#x, which thread %d wrote without a fence_async_shared() after it", what,
                 index * kGranuleBytes % kWindowBytes, thread_of(granule.writer_thread));
    });
}

void note_async_read(const void *shared, size_t n_bytes, int first_warp, int n_warps) {
    if (!checked) return;
    for_each_granule(shared, n_bytes, [&](uint32_t index) {
        for (int w = first_warp; w < first_warp + n_warps; w++) {
            granules[index].readers |= 1u << w;
            read_times[index][w] = clocks[w].seen[w];
        }
    });
}

void copy_begins(const void *shared, size_t n_bytes, const char *what) {
    if (!checked) return;
    for_each_granule(shared, n_bytes, [&](uint32_t index) {
        write_granule(index, what);
        granules[index].writer = kPending;
    });
}

void copy_lands(const void *shared, size_t n_bytes, int clock, uint32_t time) {
    if (!checked) return;
    for_each_granule(shared, n_bytes, [&](uint32_t index) {
        Granule &granule = granules[index];
        granule.writer = uint8_t(clock), granule.written = time, granule.generic = clock < kWarps;
        granule.writer_thread = int16_t(clock < kWarps ? current : -1), granule.phase = clock < kWarps ? phases[warp()] : 0;
    });
}

void wait_for_previous() { clocks[warp()].seen[kPrevious] = 1; }

void check_waited(int buffer, bool writes) {
    if (!checked || !dependent || (!writes && buffer_is_constant(buffer)) || clocks[warp()].seen[kPrevious]) return;
    fail("%s %s before wait_for_previous()", writes ? "writes" : "reads", describe_address(buffer_start(buffer)));
}

Moment this_moment() { return {current, own_time(), phases[warp()]}; }

bool is_ordered(const Moment &moment) {
    if (!checked) return true;
    if (moment.thread / 32 == warp()) return moment.thread == current || moment.phase != phases[warp()];
    return clocks[warp()].seen[moment.thread / 32] >= moment.time;
}

void note_remote(int rank, int clock, uint32_t time) {
    const bool is_own = clock < kWarps && clock * 32 / n_threads == rank;
    if (checked && !is_own && remote[rank][clock] < time) remote[rank][clock] = time;
}

void check_end_of_block(int rank) {
    if (!checked) return;
    Clocks all = {};
    for (int w = rank * n_threads / 32; w < (rank + 1) * n_threads / 32; w++) join(all, clocks[w]);
    for (int i = 0; i < kClocks; i++)
        if (all.seen[i] < remote[rank][i])
            fail("the block may end before another of its cluster has reached into its shared memory for the last time");
}

}  // namespace emulated

extern "C" void emulated_set_dependent(int given) { emulated::dependent = given != 0; }

// ---- ThreadSanitizer's hooks

extern "C" {
void __tsan_init() {}
#define LLMC_HOOKS(n)                                                                    \
    void __tsan_read##n(void *p) { emulated::touch(p, n, false, true); }                 \
    void __tsan_write##n(void *p) { emulated::touch(p, n, true, true); }                 \
    void __tsan_unaligned_read##n(void *p) { emulated::touch(p, n, false, false); }      \
    void __tsan_unaligned_write##n(void *p) { emulated::touch(p, n, true, false); }
LLMC_HOOKS(1)
LLMC_HOOKS(2)
LLMC_HOOKS(4)
LLMC_HOOKS(8)
LLMC_HOOKS(16)
void __tsan_read_range(void *p, size_t n) { emulated::touch(p, n, false, false); }
void __tsan_write_range(void *p, size_t n) { emulated::touch(p, n, true, false); }
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
}
