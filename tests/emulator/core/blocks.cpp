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
    int16_t thread = 0;
    uint32_t time = 0, phase = 0;
};
std::vector<Write> writes[kMaxBuffers];           // of each buffer that was written to
std::map<const void *, std::map<int, Clocks>> left;  // at each counter, what blocks had seen of their own warps
std::map<int, Clocks> known;                      // of other blocks to this one

int block() { return int(block_index.x); }

const char *name_of(int buffer, size_t granule) {
    return describe_address(buffer_start(buffer) + kGranuleBytes * granule);
}

}  // namespace

void start_blocks() {
    for (auto &of_buffer : writes) of_buffer.clear();
    left.clear();
}

void start_block_in_grid() { known.clear(); }

void note_global_write(int buffer, size_t offset, size_t n_bytes) {
    if (writes[buffer].empty()) writes[buffer].resize((buffer_bytes(buffer) + kGranuleBytes - 1) / kGranuleBytes);
    for (size_t i = offset / kGranuleBytes; i <= (offset + n_bytes - 1) / kGranuleBytes; i++) {
        Write &write = writes[buffer][i];
        if (n_bytes >= kGranuleBytes && write.block >= 0 && write.block != block() && !known.count(write.block))
            fail("race: writes %s, which block %d wrote too", name_of(buffer, i), write.block);
        write = {block(), int16_t(current), time_of_this_warp(), phase_of_this_warp()};
    }
}

void check_global_read(int buffer, size_t offset, size_t n_bytes) {
    if (writes[buffer].empty()) return;
    for (size_t i = offset / kGranuleBytes; i <= (offset + n_bytes - 1) / kGranuleBytes; i++) {
        const Write &write = writes[buffer][i];
        if (write.block < 0 || write.thread == current) continue;
        if (write.block != block()) {
            const auto found = known.find(write.block);
            if (found == known.end() || found->second.seen[write.thread / 32] < write.time)
                fail("race: reads %s, which block %d, thread %d wrote, with no counter between", name_of(buffer, i),
                     write.block, write.thread);
        } else if (!is_ordered(write.thread, write.time, write.phase)) {
            fail("race: reads %s, which thread %d wrote, with no barrier between", name_of(buffer, i), write.thread);
        }
    }
}

void synchronise_blocks(const void *counter, bool acquires, bool releases) {
    if (!checked) return;
    auto &records = left[counter];
    if (acquires)
        for (const auto &[other, clocks] : records) known[other] = clocks;
    if (releases) release(records[block()]);
}

}  // namespace emulated
