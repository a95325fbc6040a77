// Warpgroups of a block that own tiles alone, one of which multiplies while the other ends its tile ("ping-pong").
//
// The i-th stretch of a block is warpgroup i % 2's. Stages come in the order of stretches, and each is read by one
// warpgroup:
//
//     warpgroup 0   | tile 0's products | its end ........... | tile 2's products | its end ...
//     warpgroup 1   | waits             | tile 1's products   | its end ......... | tile 3's products
//
// A turn passes with a stretch's last products, asked for and not done: the tensor cores have a step of 512 clocks to
// multiply while the other warpgroup begins. It must not pass before. Whoever waits for a stage's next round takes that
// of two rounds ago for it, which looks the same to an mbarrier; but all rounds before a turn have come, for they have
// been waited for. And so the ring drains in the order in which it is filled.
#pragma once

#include "gemm_norm.cuh"

constexpr int kTurnBarrier = kNormBarrier + 3;  // two: behind those of gemm_wgmma.cuh

// A warpgroup's view of it; nothing at all where both own each tile.
template <class Tiling>
struct Turns {
    static constexpr bool any = Tiling::kTurns > 0;
    int group, turn = 0;

    __device__ __forceinline__ void begin() const {
        if (any && group == 1) named_barrier_arrive(kTurnBarrier, 256);
    }
    // Whether the next stretch is this warpgroup's; if so, when it may multiply.
    __device__ __forceinline__ bool take() {
        if (!any) return true;
        const bool own = turn++ % 2 == group;
        if (own) named_barrier(kTurnBarrier + group, 256);
        return own;
    }
    __device__ __forceinline__ static void pass(int group) {
        if (any) named_barrier_arrive(kTurnBarrier + 1 - group, 256);
    }
    __device__ __forceinline__ void end() const {  // somebody takes the last turn, which is nobody's
        if (any && turn % 2 == group) named_barrier(kTurnBarrier + turn % 2, 256);
    }
};
