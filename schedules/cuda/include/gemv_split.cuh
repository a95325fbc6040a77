// Two blocks of a cluster on the same bands: a band's K is split over the warps of both, and each finishes half of it.
//
//     fragment f of a band     is finished by block f % 2, which adds to its own warps' sums what the other sends of its own
//     inbox                    [band % 2][f / 2][lane] four sums, and for each band % 2 an mbarrier
//
// A band's phase of that mbarrier ends when the owner's word, that it expects them, the other's sums, and the word of each
// warp that sent some have come. So a block that has received all it was sent may end: nothing else reaches into it.
//
// A place of the inbox is free when it is written again, two bands later. Say block A sends for band t: all its warps have
// met at the band's barrier, so those that finish fragments have received what B sent for band t - 1. B sent that after
// all its warps had met there, and so had taken what lay in the place since band t - 2. Both own fragments in every band.
// An addition of two numbers has no order: results repeat.
#pragma once

#include "device.cuh"

// A block of a cluster of kSplit, whose bands have kFragments of sums.
template <int kSplit, int kFragments>
struct GemvSplit;

// One that has its bands for itself.
template <int kFragments>
struct GemvSplit<1, kFragments> {
    static constexpr int kBytes = 0;

    unsigned char *place;

    __device__ int rank() const { return 0; }
    __device__ void start() const {}
    __device__ void meet() const {}
    __device__ void expect(int) const {}
    __device__ bool owns(int) const { return true; }
    __device__ void send(int, int, const float (&)[4]) const {}
    __device__ void receive(int, int, float (&)[4]) const {}
};

#ifdef LLMC_HAS_BULK_COPY

template <int kFragments>
struct GemvSplit<2, kFragments> {
    static_assert(kFragments % 2 == 0, "each block has fragments of its own");
    static constexpr int kLaneBytes = 16, kFragmentBytes = 32 * kLaneBytes, kSent = kFragments / 2;
    static constexpr int kInboxBytes = 2 * kSent * kFragmentBytes;
    static constexpr int kBytes = kInboxBytes + 2 * 8;  // of shared memory, at `place`

    unsigned char *place;

    __device__ int rank() const { return cluster_rank(); }

    __device__ uint64_t *barrier(int turn) const { return reinterpret_cast<uint64_t *>(place + kInboxBytes) + turn % 2; }

    // All threads of a block call; the other's shared memory may be reached into when they have met.
    __device__ void start() const {
        if (threadIdx.x == 0) {
            for (int i = 0; i < 2; i++) mbarrier_init(barrier(i), 1 + kSent);
            fence_mbarrier_init();
        }
        __syncwarp();
        cluster_arrive();
    }

    __device__ void meet() const { cluster_wait(); }

    // Of band `turn` of the block, once the one before is done.
    __device__ void expect(int turn) const {
        if (threadIdx.x == 0) mbarrier_arrive_expect(barrier(turn), kSent * kFragmentBytes);
    }

    __device__ bool owns(int fragment) const { return fragment % 2 == rank(); }

    // What this block has of a fragment that the other owns; a whole warp calls, as below.
    __device__ void send(int turn, int fragment, const float (&sums)[4]) const {
        const float4 value = make_float4(sums[0], sums[1], sums[2], sums[3]);
        store_in(of_lane(turn, fragment), value, barrier(turn), rank() ^ 1);
        if (lane_index() == 0) mbarrier_arrive_in(barrier(turn), rank() ^ 1);
    }

    // Adds what the other has of a fragment of this block.
    __device__ void receive(int turn, int fragment, float (&sums)[4]) const {
        mbarrier_wait(barrier(turn), turn / 2 % 2);
        const float4 value = *reinterpret_cast<const float4 *>(of_lane(turn, fragment));
        sums[0] += value.x, sums[1] += value.y, sums[2] += value.z, sums[3] += value.w;
    }

  private:
    __device__ unsigned char *of_lane(int turn, int fragment) const {
        return place + (turn % 2 * kSent + fragment / 2) * kFragmentBytes + lane_index() * kLaneBytes;
    }
};

#endif
