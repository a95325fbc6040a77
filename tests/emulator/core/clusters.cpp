// Blocks of a cluster: their common barrier, and that none is gone while another still reaches into its shared memory.
// The barrier makes mbarriers known and says who has come how far; what was written to global memory it does not publish.
#include <vector>

#include "core.h"

namespace emulated {

namespace {

// Threads that have ended count as having come.
struct ClusterBarrier {
    int n_arrived;  // in this phase, with those that ended
    Clocks arriving, released;
    std::vector<int> waiting;
} barrier;
enum class Arrival : uint8_t { none, arrived, complete } arrivals[kMaxThreads];  // of threads that have not waited since
int n_ended[kMaxCluster];

void end_phase_if_complete() {
    if (barrier.n_arrived < n_fibers) return;
    barrier.n_arrived = 0;
    for (int i = 0; i < n_fibers; i++) {
        if (arrivals[i] == Arrival::arrived) arrivals[i] = Arrival::complete;
        if (fibers[i].state == State::done) barrier.n_arrived++;
    }
    barrier.released = barrier.arriving;
    for (const int thread : barrier.waiting) wake(thread);
    barrier.waiting.clear();
}

}  // namespace

void start_cluster() {
    barrier.n_arrived = 0, barrier.arriving = barrier.released = {}, barrier.waiting.clear();
    for (Arrival &arrival : arrivals) arrival = Arrival::none;
    for (int &n : n_ended) n = 0;
}

int cluster_rank() { return rank_of(current); }

void cluster_arrive() {
    warp_collective("cluster_arrive", 0xffffffffu, 0);
    if (arrivals[current] != Arrival::none) fail("cluster_arrive, again without cluster_wait");
    arrivals[current] = Arrival::arrived;
    release(barrier.arriving);
    barrier.n_arrived++;
    end_phase_if_complete();
}

void cluster_wait() {
    warp_collective("cluster_wait", 0xffffffffu, 0);
    if (arrivals[current] == Arrival::none) fail("cluster_wait without cluster_arrive");
    while (arrivals[current] != Arrival::complete) {
        barrier.waiting.push_back(current);
        wait_until_woken("cluster_wait");
    }
    arrivals[current] = Arrival::none;
    acquire(barrier.released, current);
}

void thread_ends() {
    const int rank = rank_of(current);
    if (++n_ended[rank] == n_threads) {
        finish_copies(rank);
        if (n_blocks() > 1) check_end_of_block(rank);
    }
    if (arrivals[current] == Arrival::arrived) return;  // counted
    barrier.n_arrived++;
    end_phase_if_complete();
}

void check_there(int rank, const char *what) {
    if (rank < 0 || rank >= n_blocks()) fail("%s: block %d of a cluster of %d", what, rank, n_blocks());
    if (n_ended[rank] == n_threads) fail("%s: block %d of the cluster has ended", what, rank);
}

}  // namespace emulated
