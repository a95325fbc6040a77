// Who may see what in shared memory: a race detector with a vector clock for each warp, in which each thread has a time.
//
// Libraries built "checked" are instrumented as for ThreadSanitizer, whose hooks are defined here. Every load and store
// of a kernel comes by: outside of the operands it fails; in shared memory it is compared with the last accesses to the
// same two bytes, and fails when no barrier orders the two. A thread that arrives at something speaks for itself, and for
// those lanes of its warp that it has met in a __syncwarp or at a barrier since; one that has waited for an mbarrier
// has done so for itself, and for those that it meets then. Other collectives of a warp (shuffles, votes, products) bring
// values and order no memory, as on the machine.
//
// Beside the threads, each mbarrier has a clock of its own, for the bulk copies that it counts, and each warp one for what
// its wgmmas read, which are over for all its lanes when it has waited for them. "Fenced" clocks say how much of each
// thread's writes the async proxy can see.
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include <vector>

#include "core.h"

namespace emulated {

bool checked, dependent;

namespace {

constexpr int16_t kNobody = -1, kPending = -2;  // writers: none yet, or an asynchronous copy under way

struct Granule {  // two bytes of shared memory
    uint32_t written;                 // when
    uint32_t readers, async_readers;  // since then: warps with lanes that read it, and whose wgmmas did
    int16_t writer;                   // a clock
    bool generic;                     // written by a plain store
};
constexpr uint32_t kGranules = kWindowBytes / kGranuleBytes;  // of a block
constexpr size_t kAllGranules = size_t(kMaxCluster) * kGranules;
Granule granules[kAllGranules];
uint32_t (*lane_reads)[kAllGranules][32];  // when a warp's lanes last read it, if the warp is among its readers, or 0
uint32_t (*async_reads)[kWarps];           // when each warp last waited for a wgmma that read it

Clocks clocks[kWarps];  // what all lanes of a warp know
struct Waited {         // what some of them know beside that, for they have waited for an mbarrier alone
    Clocks clocks;
    uint64_t what;
    uint32_t lanes;
    bool has(int thread) const { return lanes >> thread % 32 & 1; }
};
std::vector<Waited> waited[kWarps];
uint32_t times[kWarps];                 // of each warp: goes up when a lane of it arrives somewhere
uint32_t remote[kMaxCluster][kClocks];  // when others last reached into a block's shared memory

int warp() { return current / 32; }
int n_clocks() { return kFirstThread + n_fibers; }
uint32_t lanes_of_warp() { return n_fibers - 32 * warp() < 32 ? (1u << n_fibers % 32) - 1 : ~0u; }

template <typename T>
T *reserve(size_t n) {
    return static_cast<T *>(mmap(nullptr, n * sizeof(T), PROT_READ | PROT_WRITE,
                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
}

// Whether the current thread knows that something has been done, or fenced.
bool knows(int clock, uint32_t time, uint32_t (Clocks::*of)[kClocks] = &Clocks::seen) {
    if ((clocks[warp()].*of)[clock] >= time) return true;
    for (const Waited &some : waited[warp()])
        if (some.has(current) && (some.clocks.*of)[clock] >= time) return true;
    return false;
}

// did: "read" or "wrote", before, by that thread.
void report(const char *what, const char *verb, uint32_t address, const char *did, int thread) {
    fail("race: %s %s shared memory + %#x, which another %s %s (%d), with no barrier between", what, verb,
         address % kWindowBytes, thread / 32 == warp() ? "lane of the warp" : "warp", did, thread_of(thread));
}

void check_order_with_write(const Granule &granule, uint32_t address, const char *what, const char *verb) {
    if (granule.writer == kNobody || granule.writer == clock_of(current)) return;
    if (granule.writer == kPending) fail("%s %s shared memory + %#x, into which a copy is under way", what, verb, address % kWindowBytes);
    if (knows(granule.writer, granule.written)) return;
    if (granule.writer >= kFirstThread) report(what, verb, address, "wrote", granule.writer - kFirstThread);
    fail("race: %s %s shared memory + %#x, where a bulk copy landed whose mbarrier this thread has not waited for", what, verb,
         address % kWindowBytes);
}

void check_order_with_reads(uint32_t index, const char *what) {
    const uint32_t *seen = clocks[warp()].seen;
    for (uint32_t rest = granules[index].readers; rest; rest &= rest - 1) {
        const int reader = __builtin_ctz(rest);
        for (int lane = 0; lane < 32; lane++)
            if (const int thread = 32 * reader + lane; seen[clock_of(thread)] < lane_reads[reader][index][lane] &&
                thread != current && !knows(clock_of(thread), lane_reads[reader][index][lane]))
                report(what, "writes", index * kGranuleBytes, "read", thread);
    }
    for (uint32_t rest = granules[index].async_readers; rest; rest &= rest - 1)
        if (const int reader = __builtin_ctz(rest); !knows(kFirstWarp + reader, async_reads[index][reader]))
            report(what, "writes", index * kGranuleBytes, "read", 32 * reader);
}

void read_granule(uint32_t index, const char *what) {
    Granule &granule = granules[index];
    check_order_with_write(granule, index * kGranuleBytes, what, "reads");
    uint32_t *const lanes = lane_reads[warp()][index];
    if (!(granule.readers >> warp() & 1)) memset(lanes, 0, sizeof *lane_reads[0]);
    granule.readers |= 1u << warp();
    lanes[current % 32] = times[warp()];
}

void write_granule(uint32_t index, const char *what) {
    check_order_with_write(granules[index], index * kGranuleBytes, what, "writes");
    check_order_with_reads(index, what);
    granules[index] = {times[warp()], 0, 0, int16_t(clock_of(current)), true};
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
    for (int i = 0; i < n_clocks(); i++) {
        if (to.seen[i] < from.seen[i]) to.seen[i] = from.seen[i];
        if (to.fenced[i] < from.fenced[i]) to.fenced[i] = from.fenced[i];
    }
}

void start_races() {
    if (!checked) return;
    if (!lane_reads) {
        lane_reads = reserve<uint32_t[kAllGranules][32]>(kWarps);
        async_reads = reserve<uint32_t[kWarps]>(kAllGranules);
    }
    const Granule fresh = {0, 0, 0, kNobody, false};
    for (Granule *granule = granules; granule < granules + n_blocks() * kGranules; granule++)
        if (granule->writer != kNobody || granule->readers || granule->async_readers) *granule = fresh;
    memset(remote, 0, sizeof remote);
    memset(clocks, 0, sizeof clocks);
    for (auto &of_warp : waited) of_warp.clear();
    for (uint32_t &time : times) time = 1;
}

void release(Clocks &to) {
    if (!checked) return;
    join(to, clocks[warp()]);
    for (const Waited &some : waited[warp()])
        if (some.has(current)) join(to, some.clocks);
    to.seen[clock_of(current)] = times[warp()]++;
}

void acquire(const Clocks &from, int thread) {
    if (checked) join(clocks[thread / 32], from);
}

void acquire_alone(const Clocks &from, uint64_t what) {
    if (!checked) return;
    std::vector<Waited> &all = waited[warp()];
    size_t i = 0;
    while (i < all.size() && all[i].what != what) i++;
    if (i == all.size()) all.push_back({from, what, 0});
    all[i].lanes |= 1u << current % 32;
    if (all[i].lanes == lanes_of_warp()) {
        join(clocks[warp()], all[i].clocks);
        all.erase(all.begin() + long(i));
        return;
    }
    for (size_t other = 0; other < all.size(); other++)  // the same lanes have waited for two things
        if (other != i && all[other].lanes == all[i].lanes) {
            join(all[i].clocks, all[other].clocks);
            all.erase(all.begin() + long(other));
            return;
        }
}

void lanes_met(uint32_t mask) {
    if (!checked) return;
    for (Waited &some : waited[warp()])
        if (some.lanes & mask) some.lanes |= mask;
    if (mask == lanes_of_warp()) {
        for (const Waited &some : waited[warp()]) join(clocks[warp()], some.clocks);
        waited[warp()].clear();
    }
    for (uint32_t rest = mask; rest; rest &= rest - 1)
        clocks[warp()].seen[clock_of(32 * warp() + __builtin_ctz(rest))] = times[warp()];
    times[warp()]++;
}

void fence_writes() {
    if (!checked) return;
    Clocks &mine = clocks[warp()];
    for (int i = 0; i < n_clocks(); i++)
        if (mine.fenced[i] < mine.seen[i]) mine.fenced[i] = mine.seen[i];
    for (const Waited &some : waited[warp()])
        for (int i = 0; some.has(current) && i < n_clocks(); i++)
            if (mine.fenced[i] < some.clocks.seen[i]) mine.fenced[i] = some.clocks.seen[i];
    mine.fenced[clock_of(current)] = times[warp()]++;
}

void check_read(const void *shared, size_t n_bytes, const char *what) {
    if (checked) for_each_granule(shared, n_bytes, [&](uint32_t index) { read_granule(index, what); });
}

void check_async_read(const void *shared, size_t n_bytes, const char *what) {
    if (!checked) return;
    for_each_granule(shared, n_bytes, [&](uint32_t index) {
        const Granule &granule = granules[index];
        check_order_with_write(granule, index * kGranuleBytes, what, "reads");
        if (granule.generic && granule.writer >= kFirstThread && !knows(granule.writer, granule.written, &Clocks::fenced))
            fail("%s reads shared memory + %#x, which thread %d wrote without a fence_async_shared() after it", what,
                 index * kGranuleBytes % kWindowBytes, thread_of(granule.writer - kFirstThread));
    });
}

void note_async_read(const void *shared, size_t n_bytes, int first_warp, int n_warps) {
    if (!checked) return;
    for_each_granule(shared, n_bytes, [&](uint32_t index) {
        for (int w = first_warp; w < first_warp + n_warps; w++) {
            granules[index].async_readers |= 1u << w;
            clocks[w].seen[kFirstWarp + w] = async_reads[index][w] = times[w];
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
        granule.writer = int16_t(clock), granule.written = time, granule.generic = clock >= kFirstThread;
    });
}

void wait_for_previous() { clocks[warp()].seen[kPrevious] = 1; }

void check_waited(int buffer, bool writes) {
    if (!checked || !dependent || (!writes && buffer_is_constant(buffer)) || clocks[warp()].seen[kPrevious]) return;
    fail("%s %s before wait_for_previous()", writes ? "writes" : "reads", describe_address(buffer_start(buffer)));
}

Moment this_moment() { return {current, times[warp()]}; }

bool is_ordered(const Moment &moment) {
    return !checked || moment.thread == current || knows(clock_of(moment.thread), moment.time);
}

void note_remote(int rank, int clock, uint32_t time) {
    const bool is_own = clock >= kFirstThread && rank_of(clock - kFirstThread) == rank;
    if (checked && !is_own && remote[rank][clock] < time) remote[rank][clock] = time;
}

void check_end_of_block(int rank) {
    if (!checked) return;
    Clocks all = {};
    for (int w = rank * n_threads / 32; w < (rank + 1) * n_threads / 32; w++) {
        join(all, clocks[w]);
        for (const Waited &some : waited[w]) join(all, some.clocks);
    }
    for (int i = 0; i < n_clocks(); i++)
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
