// Which rows of a step go on from which state: those of a sequence are a run, wherever they stand, in order.
//
// A step has the rows of a sequence side by side, so that each question is mostly answered by the row beside; otherwise a
// warp looks at 32 rows at a time. All lanes ask together, and get the same.
#pragma once

#include "device.cuh"

constexpr uint32_t kAllOfWarp = 0xffffffffu;

// log(1 + e**x).
__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.f) + log1pf(expf(-fabsf(x))); }

// positions, slots [kRows]; a row at position -1 is nobody's.
template <int kRows>
struct StateRows {
    const int *positions, *slots;

    __device__ __forceinline__ bool is_of(int row, int slot) const {
        return positions[row] >= 0 && slots[row] == slot;
    }

    // Whether a row is the first of a stretch: the row in front goes on from another state. Each lane its own row.
    __device__ __forceinline__ bool begins(int row) const {
        return row < kRows && positions[row] >= 0 && !(row > 0 && is_of(row - 1, slots[row]));
    }

    // The last row of the slot's in front of `row`; -1: there is none, and the run begins with what is `row`'s.
    __device__ __forceinline__ int before(int row, int slot) const {
        if (row > 0 && is_of(row - 1, slot)) return row - 1;
        for (int base = (row - 1) & ~31; base >= 0; base -= 32) {
            const int at = base + lane_index();
            const uint32_t found = __ballot_sync(kAllOfWarp, at < row && is_of(at, slot));
            if (found) return base + 31 - __clz(found);
        }
        return -1;
    }

    // The first row of the slot's from `row` on; kRows: there is none.
    __device__ __forceinline__ int from(int row, int slot) const {
        if (row < kRows && is_of(row, slot)) return row;
        for (int base = row & ~31; base < kRows; base += 32) {
            const int at = base + lane_index();
            const uint32_t found = __ballot_sync(kAllOfWarp, at >= row && at < kRows && is_of(at, slot));
            if (found) return base + __ffs(found) - 1;
        }
        return kRows;
    }

    // The first row behind `row`, but at most kMost behind, that is not the slot's: the end of a stretch.
    template <int kMost>
    __device__ __forceinline__ int end(int row, int slot) const {
        static_assert(kMost <= 32, "as many rows as a warp has lanes");
        const int at = row + lane_index();
        const uint32_t others =
            __ballot_sync(kAllOfWarp, lane_index() >= kMost || at >= kRows || !is_of(at, slot));
        return row + (others ? __ffs(others) - 1 : 32);
    }
};
