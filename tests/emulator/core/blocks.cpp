// Who may see what in global memory: between the warps of a block by barriers, between blocks by counters.
//
// Blocks run one after another here, side by side on a GPU. So what one block wrote may be read by another only if it
// went through a counter after that: count_up() there, and then count_up() or load_acquire() here.
#include <string.h>

#include <map>
#include <vector>

#include "core.h"

namespace emulated {

namespace {

struct Write {  // of a granule: by whom, when
    int block = -1;
    Moment moment = {};
};
std::vector<Write> writes[kMaxBuffers];           // of each buffer that was written to
std::map<const void *, std::map<int, Clocks>> left;  // at each counter, what blocks had seen of their own warps
std::map<int, Clocks> known[kMaxCluster];         // of other blocks to each of the cluster

int block() { return int(block_index.x); }

bool has_seen(const Write &write) {
    if (write.block == block()) return is_ordered(write.moment);
    const auto &of_block = known[rank_of(current)];
    const auto found = of_block.find(write.block);
    return found != of_block.end() && found->second.seen[clock_of(write.moment.thread)] >= write.moment.time;
}

const char *name_of(int buffer, size_t granule) {
    return describe_address(buffer_start(buffer) + kGranuleBytes * granule);
}

}  // namespace

void start_blocks() {
    for (auto &of_buffer : writes) of_buffer.clear();
    left.clear();
}

void start_cluster_in_grid() {
    for (auto &of_block : known) of_block.clear();
}

void note_global_write(int buffer, size_t offset, size_t n_bytes) {
    if (writes[buffer].empty()) writes[buffer].resize((buffer_bytes(buffer) + kGranuleBytes - 1) / kGranuleBytes);
    for (size_t i = offset / kGranuleBytes; i <= (offset + n_bytes - 1) / kGranuleBytes; i++) {
        Write &write = writes[buffer][i];
        if (n_bytes >= kGranuleBytes && write.block >= 0 && write.block != block() && !has_seen(write))
            fail("race: writes %s, which block %d wrote too", name_of(buffer, i), write.block);
        write = {block(), this_moment()};
    }
}

void check_global_read(int buffer, size_t offset, size_t n_bytes) {
    if (writes[buffer].empty()) return;
    for (size_t i = offset / kGranuleBytes; i <= (offset + n_bytes - 1) / kGranuleBytes; i++) {
        const Write &write = writes[buffer][i];
        const int thread = thread_of(write.moment.thread);
        if (write.block < 0 || has_seen(write)) continue;
        if (write.block != block())
            fail("race: reads %s, which block %d, thread %d wrote, with no counter between", name_of(buffer, i),
                 write.block, thread);
        fail("race: reads %s, which thread %d wrote, with no barrier between", name_of(buffer, i), thread);
    }
}

void synchronise_blocks(const void *counter, bool acquires, bool releases) {
    if (!checked) return;
    auto &records = left[counter];
    if (acquires)
        for (const auto &[other, clocks] : records) join(known[rank_of(current)][other], clocks);
    if (releases) release(records[block()]);
}

}  // namespace emulated
