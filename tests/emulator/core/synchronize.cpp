// Barriers of a block, and what the lanes of a warp and the threads of a warpgroup do together.
#include <string.h>

#include "core.h"

namespace emulated {

namespace {

struct Barrier {
    int expected, n_arrived, n_waiting;
    int16_t waiting[kMaxThreads];
    Clocks clocks;
} barriers[kMaxCluster][16];

// Threads that meet: those of a mask of a warp, or of a warpgroup. Values lie in two places by turns, so that a thread
// may still read the last meeting's while others come to the next.
struct Meeting {
    uint32_t mask;
    int n_arrived, turn;
    const char *what;
    uint32_t arrived;
    uint64_t values[2][128];
};
constexpr int kMasks = 8;
Meeting of_warps[kWarps][kMasks], of_warpgroups[kWarps / 4];

const uint64_t *meet(Meeting &meeting, const char *what, int first, int n, int index, uint64_t value, Complete complete) {
    const int turn = meeting.turn;
    if (meeting.n_arrived == 0)
        meeting.what = what;
    else if (meeting.what != what && strcmp(meeting.what, what))
        fail("%s, while other lanes of the warp are in %s", what, meeting.what);
    meeting.values[turn][index] = value;
    if (++meeting.n_arrived < n) {
        wait_until_woken(what);
        return meeting.values[turn];
    }
    if (complete) complete(meeting.values[turn], meeting.mask);
    meeting.n_arrived = 0;
    meeting.turn ^= 1;
    for (int i = 0; i < 128 && first + i < n_fibers; i++)
        if (first + i != current && (n == 128 || (i < 32 && meeting.mask >> i & 1))) wake(first + i);
    return meeting.values[turn];
}

}  // namespace

void start_synchronization() {
    for (auto &of_block : barriers)
        for (Barrier &barrier : of_block) {
            barrier.n_arrived = barrier.n_waiting = barrier.expected = 0;
            barrier.clocks = {};
        }
    for (auto &warp : of_warps)
        for (Meeting &meeting : warp) meeting.n_arrived = 0, meeting.mask = 0;
    for (Meeting &meeting : of_warpgroups) meeting.n_arrived = 0, meeting.mask = 0xffffffffu;
}

void arrive_at_barrier(int id, int n, bool wait, const char *what) {
    if (id < 0 || id > 15) fail("%s %d: barriers are 0..15", what, id);
    if (n == 0) n = n_threads;
    if (n % 32 && n != n_threads) fail("%s %d of %d threads: not a multiple of 32", what, id, n);
    if (n > n_threads) fail("%s %d of %d threads: the block has %d", what, id, n, n_threads);
    Barrier &barrier = barriers[rank_of(current)][id];
    if (barrier.n_arrived == 0)
        barrier.expected = n;
    else if (barrier.expected != n)
        fail("%s %d of %d threads, where others said %d", what, id, n, barrier.expected);
    release(barrier.clocks);
    if (++barrier.n_arrived < barrier.expected) {
        if (!wait) return;
        barrier.waiting[barrier.n_waiting++] = int16_t(current);
        return wait_until_woken(what);
    }
    const int n_waiting = barrier.n_waiting;
    barrier.n_arrived = barrier.n_waiting = 0;
    if (wait) acquire(barrier.clocks, current);
    for (int i = 0; i < n_waiting; i++) {
        if (i == 0 || barrier.waiting[i] / 32 != barrier.waiting[i - 1] / 32) acquire(barrier.clocks, barrier.waiting[i]);
        wake(barrier.waiting[i]);
    }
}

const uint64_t *warp_collective(const char *what, uint32_t mask, uint64_t value, Complete complete) {
    const int lane = current & 31, warp = current / 32;
    if (!(mask >> lane & 1)) fail("%s with mask %#x, which leaves out its own lane %d", what, mask, lane);
    Meeting *meeting = nullptr;
    for (Meeting &candidate : of_warps[warp])
        if (candidate.mask == mask || candidate.mask == 0) {
            meeting = &candidate;
            break;
        }
    if (!meeting) fail("%s: the emulator knows %d masks of a warp at most", what, kMasks);
    meeting->mask = mask;
    return meet(*meeting, what, warp * 32, __builtin_popcount(mask), lane, value, complete);
}

void sync_warp(uint32_t mask) {
    warp_collective("__syncwarp", mask, 0, [](const uint64_t *, uint32_t lanes) { lanes_met(lanes); });
}

void warpgroup_collective(const char *what, uint64_t value, Complete complete) {
    const int group = current / 128;
    if (n_blocks() > 1 && n_threads % 128) fail("%s in a cluster needs blocks of whole warpgroups", what);
    if ((group + 1) * 128 > n_fibers) fail("%s needs a whole warpgroup; the block has %d threads", what, n_threads);
    meet(of_warpgroups[group], what, group * 128, 128, current & 127, value, complete);
}

}  // namespace emulated
