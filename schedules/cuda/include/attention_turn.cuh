// Queries and keys of a prompt on their way: how they are turned, and where queries lie.
#pragma once

#include "attention.cuh"

constexpr int kTileRows = 64;

// Queries of tile `tile` and head `head` [D/8][64][8].
template <class Shape>
__device__ __forceinline__ typename Shape::T *query_tile(typename Shape::T *queries, int tile, int head) {
    return queries + (int64_t(tile) * Shape::heads + head) * (kTileRows * Shape::head_dim);
}

// Two chunks of a head that turn each other: pairs (a, b) -> (a cos - b sin, b cos + a sin), as turned_eight() has them.
__device__ __forceinline__ void turn_chunks(Eight (&x)[2], const Eight &cos, const Eight &sin) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float a = x[0].at[i], b = x[1].at[i];
        x[0].at[i] = fmaf(a, cos.at[i], -b * sin.at[i]);
        x[1].at[i] = fmaf(b, cos.at[i], a * sin.at[i]);
    }
}

// Two chunks of a head's vector that a thread has of each of its heads, and the angles that turn them.
template <class Shape>
struct Turn {
    static constexpr int half = Shape::rotary_dim / 2;
    static constexpr bool in_chunks = half > 0 && half % 8 == 0 && !Shape::interleaved;  // which turn each other
    const float *cos_row, *sin_row;
    int chunk[2];
    bool turns;
    Eight cos, sin;

    __device__ __forceinline__ Turn(const float *all_cos, const float *all_sin, int row, int unit)
        : cos_row(all_cos + row * half), sin_row(all_sin + row * half), chunk{2 * unit, 2 * unit + 1}, turns(false) {
        if constexpr (in_chunks) {
            turns = unit < half / 8;
            if (!turns) return;
            chunk[0] = unit, chunk[1] = unit + half / 8;
            cos = load_eight(cos_row + 8 * unit), sin = load_eight(sin_row + 8 * unit);
        }
    }

    // x: the chunks as they are; element(d): any of the vector.
    template <class Element>
    __device__ __forceinline__ void apply(Eight (&x)[2], Element element) const {
        if constexpr (in_chunks) {
            if (turns) turn_chunks(x, cos, sin);
        } else if constexpr (half > 0) {
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const int d = 8 * chunk[j] + i;
                    if (d >= Shape::rotary_dim) break;
                    const bool second = Shape::interleaved ? d % 2 : d >= half;
                    const float other = element(Shape::interleaved ? d ^ 1 : second ? d - half : d + half);
                    const int angle = Shape::interleaved ? d / 2 : second ? d - half : d;
                    x[j].at[i] = fmaf(x[j].at[i], cos_row[angle], (second ? other : -other) * sin_row[angle]);
                }
        }
    }
};
