// The weight of the next product, asked for while memory would lie idle.
//
// Between the last weights of a product and the first of the next one memory has nothing to do: sums are finished and
// added up, attention or a norm runs, blocks of the next product wait for room on their multiprocessors. A block that
// has asked for its own last weights asks for its share of the first of the next ones, to L2, from where they come at
// twice memory's rate. The last bytes of a weight that is not whole pieces are left to who reads it.
#pragma once

#include "device.cuh"

constexpr int kNextPiece = 8192, kNextTail = 256;  // bytes

// Where the weight begins, and where its last kNextTail bytes begin.
struct NextWeight {
    const unsigned char *begin = nullptr, *last = nullptr;
};

// Asks for every n_askers-th piece of the first kMost bytes; one thread calls.
template <int kMost>
__device__ __forceinline__ void prefetch_next(const NextWeight &next, int asker, int n_askers) {
#ifdef LLMC_HAS_BULK_COPY
    if constexpr (kMost > 0) {
        const int64_t there = next.last - next.begin, n_bytes = there < kMost ? there : kMost;
#pragma unroll 1
        for (int64_t at = int64_t(asker) * kNextPiece; at < n_bytes; at += int64_t(n_askers) * kNextPiece) {
            const int64_t left = n_bytes - at;
            bulk_prefetch_l2(next.begin + at, static_cast<uint32_t>(left < kNextPiece ? left : kNextPiece));
        }
    }
#endif
}
