// Sinks: one more score for each query head, which no key has and no value belongs to. It joins the sum of a row's
// weights once, where that divides the row's result: after all pages, warps and splits. arXiv:2309.17453.
//
// Where heads have them, Shape has beside what attention.cuh lists:
//     has_sinks    true
// and kernels take `sinks`, f32 [heads]; else null, and not an instruction more.
#pragma once

#include "attention.cuh"

template <class Shape, class = void>
constexpr bool kHasSinks = false;
template <class Shape>
constexpr bool kHasSinks<Shape, decltype(void(Shape::has_sinks))> = true;

// Brings sinks, which long since left L2, back to it; a whole warp calls. They are constants: before the wait.
template <class Shape>
__device__ __forceinline__ void prefetch_sinks(const float *sinks) {
    if constexpr (kHasSinks<Shape>)
        for (int head = 8 * lane_index(); head < Shape::heads; head += 8 * 32) prefetch_l2(sinks + head);
}

// unit / (sum of a row's weights): `sum` counts 2^(c most), and a sink may be larger than every score. A row that has
// seen nothing is worth nothing beside it.
template <class Shape>
__device__ __forceinline__ float inverse_sum(float most, float sum, const float *sinks, int head, float unit = 1.f) {
    if constexpr (kHasSinks<Shape>) {
        const float sink = sinks[head] * kLog2E, score = most * kExponent<Shape>, top = fmaxf(score, sink);
        const float keep = exp2_approx(score - top);
        return unit * (keep / fmaf(sum, keep, exp2_approx(sink - top)));
    } else {
        return unit / sum;
    }
}
