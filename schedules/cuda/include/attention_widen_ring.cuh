// A KV cache of int8 on Hopper: the ring of attention_wgmma.cuh holds pages in f16, which a warpgroup makes of codes.
//
// Operations: 5 D instructions for a page of one head, as in attention_widen.cuh, on warps that do nothing else.
#pragma once

#include "attention_ring.cuh"
#include "attention_widen.cuh"

#ifdef LLMC_HAS_BULK_COPY

// K or V of a page as a thread of 128 has it: 16 codes of every 128th place.
template <class Shape>
struct PageCodes {
    static constexpr int places = kPageTokens * Shape::head_dim / 16, n = (places + 127) / 128;
    uint4 at[n];
    float scale;  // of one token, in threads that have one

    __device__ __forceinline__ void load(const uint8_t *from, int thread, int tokens) {
#pragma unroll
        for (int i = 0; i < n; i++)
            if (places % 128 == 0 || thread + 128 * i < places) at[i] = load_16(from + 16 * (thread + 128 * i));
        if (thread < kPageTokens) scale = thread < tokens ? scales_of<Shape, kPageTokens>(from)[thread] : 0.f;
    }

    // To chunks of 8 elements of D, kPitch tokens apart.
    template <int kPitch>
    __device__ __forceinline__ void put(f16 *to, float *scales, int thread) const {
#pragma unroll
        for (int i = 0; i < n; i++) {
            const int place = thread + 128 * i, c = place / kPageTokens, token = token_at(place % kPageTokens, c);
            if (places % 128 != 0 && place >= places) break;
            put_chunk(to + 8 * (2 * c * kPitch + token), widened(at[i].x, at[i].y));
            put_chunk(to + 8 * ((2 * c + 1) * kPitch + token), widened(at[i].z, at[i].w));
        }
        if (thread < kPageTokens) scales[thread] = scale;
    }
};

// A page's codes to the ring, by 128 threads of which this is `thread`. Scales of tokens after the last, which may never
// have been written, are zeros.
template <class Shape>
__device__ __forceinline__ void widen_page(const uint8_t *from, int tokens, const Place<Shape> &place, Ring<Shape> &ring,
                                           int thread) {
    f16 *to = stage_of<Shape>(place.stage);
    float *scales = stage_scales<Shape>(place.stage);
    PageCodes<Shape> keys, values;
    keys.load(from, thread, tokens);
    values.load(from + kHeadElements<Shape>, thread, tokens);
    mbarrier_wait(&ring.done[place.stage], place.parity ^ 1);
    keys.template put<kPageTokens>(to, scales, thread);
    fence_async_shared();
    mbarrier_arrive(&ring.keys[place.stage]);
    values.template put<Warpgroups<Shape>::pitch>(to + Warpgroups<Shape>::keys, scales + kPageTokens, thread);
    fence_async_shared();
    mbarrier_arrive(&ring.values[place.stage]);
}

#endif  // LLMC_HAS_BULK_COPY
