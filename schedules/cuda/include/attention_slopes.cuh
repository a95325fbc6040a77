// Biases by distance (ALiBi): to each score a head adds its slope times (the key's position - the query's).
// arXiv:2108.12409.
//
// Where heads have them, Shape has beside what attention.cuh lists:
//     has_slopes    true
// and kernels take `slopes`, f32 [heads]; else null, and not an instruction more.
#pragma once

#include "device.cuh"

template <class Shape, class = void>
struct HeadSlopes {
    static constexpr bool there = false;
    struct OfRows {};
};
template <class Shape>
struct HeadSlopes<Shape, decltype(void(Shape::has_slopes))> {
    static constexpr bool there = true;
    struct OfRows {
        float slope[2];  // of the lane's rows g and g + 8, in what scores count before they are weighed
    };
};

template <class Shape>
constexpr bool kHasSlopes = HeadSlopes<Shape>::there;

// Slopes of the lane's two rows, whose heads these are. They are constants: before the wait.
template <class Shape>
__device__ __forceinline__ void read_slopes(typename HeadSlopes<Shape>::OfRows &rows, const float *slopes, int first,
                                            int second) {
    if constexpr (kHasSlopes<Shape>) {
        constexpr float unit = Shape::softcap > 0.f ? 1.f : 1.f / Shape::scale;
        rows.slope[0] = slopes[first] * unit, rows.slope[1] = slopes[second] * unit;
    }
}

// What is added to a score: bias(half, n, i) of the lane's row g + 8 half and key 8 n + 2 (lane % 4) + i.
struct NoBias {
    static constexpr bool any = false;
};

// Of keys in a row, the lane's first ones `from` away from its rows' queries.
template <class Shape>
struct DistanceBias {
    static constexpr bool any = kHasSlopes<Shape>;
    const typename HeadSlopes<Shape>::OfRows &rows;
    float from[2];

    // key: position of the first; at: of the queries.
    __device__ __forceinline__ DistanceBias(const typename HeadSlopes<Shape>::OfRows &rows, int key, int at, int other_at)
        : rows(rows) {
        if constexpr (any) {
            const int own = key + 2 * (lane_index() % 4);
            from[0] = float(own - at), from[1] = float(own - other_at);
        }
    }
    __device__ __forceinline__ float operator()(int half, int n, int i) const {
        return rows.slope[half] * (from[half] + float(8 * n + i));
    }
};

// Of any keys: distance(half, n, i) as an integer.
template <class Shape, class Distance>
struct AnyBias {
    static constexpr bool any = true;
    const typename HeadSlopes<Shape>::OfRows &rows;
    const Distance &distance;

    __device__ __forceinline__ float operator()(int half, int n, int i) const {
        return rows.slope[half] * float(distance(half, n, i));
    }
};
template <class Shape, class Distance>
__device__ __forceinline__ AnyBias<Shape, Distance> biased_by(const typename HeadSlopes<Shape>::OfRows &rows,
                                                              const Distance &distance) {
    return {rows, distance};
}
