// mbarriers and asynchronous copies. A copy's destination is poison from the moment it is asked for: the machine may
// write there at any time from then on.
#include <stdio.h>
#include <string.h>

#include <deque>
#include <vector>

#include "core.h"

namespace emulated {

namespace {

constexpr uint64_t kMagic = 0x6d62617272696572;  // what an initialised mbarrier's eight bytes hold here

struct Mbarrier {
    uint64_t *place;
    int rank;  // of its block
    uint32_t n_arrivals, phase;
    long missing_arrivals, missing_bytes;
    std::vector<int> waiting;
    int clock;                  // its place in Clocks
    Clocks arriving, released;  // of the phase that is under way, and of the last that ended
    Moment initialised;
};
std::vector<Mbarrier> mbarriers;

constexpr uint32_t kValueBytes = 16;  // what a thread stores in another block

struct BulkCopy {
    int rank;  // of the block it goes to
    unsigned char *shared;
    const void *global;  // or null: `value`
    uint32_t n_bytes;
    uint64_t *barrier;
    unsigned char value[kValueBytes];
};
std::deque<BulkCopy> bulk_copies;

struct SmallCopy {
    unsigned char *shared;
    const void *global;
    uint32_t n_bytes;
    bool valid;
    int group;
};
struct ThreadCopies {
    std::deque<SmallCopy> small;
    int group;  // the open one
};
ThreadCopies of_threads[kMaxThreads];

Mbarrier &find(uint64_t *place, const char *what) {
    for (Mbarrier &barrier : mbarriers)
        if (barrier.place == place) {
            if (*place != kMagic) fail("%s on %s, which was overwritten", what, describe_mbarrier(place));
            return barrier;
        }
    fail("%s on %s, which is no initialised mbarrier", what, describe_address(place));
}

// The same, for the current thread: it must know that somebody has initialised it.
Mbarrier &find_known(uint64_t *place, const char *what) {
    Mbarrier &barrier = find(place, what);
    if (!is_ordered(barrier.initialised))
        fail("%s on %s, with no barrier since thread %d initialised it", what, describe_mbarrier(place),
             thread_of(barrier.initialised.thread));
    return barrier;
}

void end_phase_if_complete(Mbarrier &barrier) {
    if (barrier.missing_arrivals || barrier.missing_bytes) return;
    barrier.phase++;
    barrier.missing_arrivals = barrier.n_arrivals;
    barrier.arriving.seen[barrier.clock] = barrier.phase;
    barrier.released = barrier.arriving;
    for (const int thread : barrier.waiting) wake(thread);
    barrier.waiting.clear();
}

void check_bulk(const void *shared, const void *global, uint32_t n_bytes, const char *what) {
    const uint32_t address = shared_address(shared);
    if (address % 16) fail("%s: shared memory + %#x is not aligned to 16 bytes", what, address);
    if (n_bytes % 16 || !n_bytes) fail("%s of %u bytes: not a multiple of 16", what, n_bytes);
    shared_pointer(address, n_bytes, what);
    check_global(global, n_bytes, 16, what);
}

void begin(int rank, void *shared, const void *global, uint32_t n_bytes, uint64_t *barrier, const char *what) {
    find_known(barrier, what);
    copy_begins(shared, n_bytes, what);
    memset(shared, kPoison, n_bytes);
    bulk_copies.push_back({rank, static_cast<unsigned char *>(shared), global, n_bytes, barrier, {}});
}

}  // namespace

void start_copies() {
    mbarriers.clear();
    bulk_copies.clear();
    for (ThreadCopies &copies : of_threads) copies.small.clear();
}

void mbarrier_init(uint64_t *place, uint32_t n_arrivals) {
    const uint32_t address = shared_address(place);
    if (address % 8) fail("mbarrier_init: shared memory + %#x is not aligned to 8 bytes", address);
    shared_pointer(address, 8, "mbarrier_init");
    if (!n_arrivals || n_arrivals >= 1u << 20) fail("mbarrier_init for %u arrivals: 1 to 2^20 - 1", n_arrivals);
    for (Mbarrier &barrier : mbarriers)
        if (barrier.place == place) fail("mbarrier_init of %s, which is initialised", describe_mbarrier(place));
    *place = kMagic;
    const int clock = int(mbarriers.size()) % kMbarrierClocks;
    mbarriers.push_back({place, rank_of(current), n_arrivals, 0, long(n_arrivals), 0, {}, clock, {}, {}, this_moment()});
}

namespace {

void arrive(Mbarrier &barrier, uint32_t n_bytes) {
    if (barrier.missing_arrivals <= 0) fail("one arrival too many at %s", describe_mbarrier(barrier.place));
    release(barrier.arriving);
    barrier.missing_arrivals--;
    barrier.missing_bytes += n_bytes;
    end_phase_if_complete(barrier);
}

}  // namespace

void mbarrier_arrive(uint64_t *place, uint32_t n_bytes) { arrive(find_known(place, "mbarrier_arrive"), n_bytes); }

void mbarrier_arrive_in(uint64_t *place, int rank) {
    check_there(rank, "mbarrier_arrive_in");
    auto *there = reinterpret_cast<uint64_t *>(shared_of(rank, place));
    note_remote(rank, clock_of(current), this_moment().time);
    arrive(find_known(there, "mbarrier_arrive_in"), 0);
}

void mbarrier_wait(uint64_t *place, uint32_t parity) {
    if (parity > 1) fail("mbarrier_wait for parity %u: 0 or 1", parity);
    while ((find_known(place, "mbarrier_wait").phase & 1) == parity) {
        find(place, "mbarrier_wait").waiting.push_back(current);
        wait_until_woken("mbarrier_wait", place);
    }
    const Mbarrier &barrier = find(place, "mbarrier_wait");
    acquire_alone(barrier.released, uint64_t(&barrier - &mbarriers[0]) << 32 | barrier.phase);
}

const char *describe_mbarrier(const void *place) {
    static char text[200];
    for (const Mbarrier &barrier : mbarriers)
        if (barrier.place == place)
            snprintf(text, sizeof text, "the mbarrier at shared memory + %#x (phase %u lacks %ld arrivals and %ld bytes)",
                     cluster_offset(place) % kWindowBytes, barrier.phase, barrier.missing_arrivals, barrier.missing_bytes);
    return text;
}

void bulk_copy(void *shared, const void *global, uint32_t n_bytes, uint64_t *barrier) {
    check_bulk(shared, global, n_bytes, "bulk_copy");
    begin(rank_of(current), shared, global, n_bytes, barrier, "bulk_copy");
}

void bulk_copy_multicast(void *shared, const void *global, uint32_t n_bytes, uint64_t *barrier, uint32_t ranks) {
    check_bulk(shared, global, n_bytes, "bulk_copy_multicast");
    if (!ranks) fail("bulk_copy_multicast to no block");
    for (uint32_t rest = ranks; rest; rest &= rest - 1) {
        const int rank = __builtin_ctz(rest);
        check_there(rank, "bulk_copy_multicast");
        begin(rank, shared_of(rank, shared), global, n_bytes, reinterpret_cast<uint64_t *>(shared_of(rank, barrier)),
              "bulk_copy_multicast");
    }
}

void store_in(void *shared, const void *value, uint64_t *barrier, int rank) {
    const uint32_t address = shared_address(shared);
    if (address % kValueBytes) fail("store_in: shared memory + %#x is not aligned to 16 bytes", address);
    shared_pointer(address, kValueBytes, "store_in");
    check_there(rank, "store_in");
    auto *counts = reinterpret_cast<uint64_t *>(shared_of(rank, barrier));
    begin(rank, shared_of(rank, shared), nullptr, kValueBytes, counts, "store_in");
    memcpy(bulk_copies.back().value, value, kValueBytes);
}

bool land_one_copy() {
    if (bulk_copies.empty()) return false;
    const BulkCopy copy = order == 1 ? bulk_copies.back() : bulk_copies.front();
    order == 1 ? bulk_copies.pop_back() : bulk_copies.pop_front();
    memcpy(copy.shared, copy.global ? copy.global : copy.value, copy.n_bytes);
    Mbarrier &barrier = find(copy.barrier, "a bulk copy's end");
    copy_lands(copy.shared, copy.n_bytes, barrier.clock, barrier.phase + 1);
    note_remote(barrier.rank, barrier.clock, barrier.phase + 1);
    barrier.missing_bytes -= copy.n_bytes;
    end_phase_if_complete(barrier);
    return true;
}

void cp_async(void *shared, const void *global, uint32_t n_bytes, bool valid, const char *what) {
    const uint32_t address = shared_address(shared);
    if (address % n_bytes) fail("%s: shared memory + %#x is not aligned to %u bytes", what, address, n_bytes);
    shared_pointer(address, n_bytes, what);
    if (valid) check_global(global, n_bytes, n_bytes, what);
    copy_begins(shared, n_bytes, what);
    memset(shared, kPoison, n_bytes);
    ThreadCopies &mine = of_threads[current];
    mine.small.push_back({static_cast<unsigned char *>(shared), global, n_bytes, valid, mine.group});
}

void cp_async_commit() { of_threads[current].group++; }

void cp_async_wait(int n_pending) {
    ThreadCopies &mine = of_threads[current];
    while (!mine.small.empty() && mine.small.front().group < mine.group - n_pending) {
        const SmallCopy &copy = mine.small.front();
        if (copy.valid)
            memcpy(copy.shared, copy.global, copy.n_bytes);
        else
            memset(copy.shared, 0, copy.n_bytes);
        copy_lands(copy.shared, copy.n_bytes, clock_of(current), this_moment().time);
        mine.small.pop_front();
    }
}

void fence_async_shared() { fence_writes(); }

void finish_copies(int rank) {
    for (const BulkCopy &copy : bulk_copies)
        if (copy.rank == rank)
            fail("the block ended with a bulk copy under way, into %s", describe_address(copy.shared));
}

}  // namespace emulated
