// Biases by distance (ALiBi): to each score a head adds its slope times (the key's position - the query's).
// arXiv:2108.12409.
//
// Where heads have them, Shape has beside what attention.cuh lists:
//     has_slopes    true
// and kernels take `slopes`, f32 [heads]; else null, and not an instruction more. Or each distance has a bias of its own,
// which a head looks up (MPNet's; arXiv:1803.02155). Then Shape has
//     reach         C, as many tokens as a sequence's pages hold
// and `slopes` are biases [heads, 2 C], of key - query at C + key - query: in large steps alone.
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
struct HeadSlopes<Shape, decltype(void(Shape::reach))> {
    static constexpr bool there = false;
    struct OfRows {
        const float *biases;  // of the head, from distance 0 on
    };
};

template <class Shape>
constexpr bool kHasSlopes = HeadSlopes<Shape>::there;

template <class Shape, class = void>
constexpr bool kHasBiases = false;
template <class Shape>
constexpr bool kHasBiases<Shape, decltype(void(Shape::reach))> = true;

// Where the biases of a head begin that are of keys behind its query, at distance 0.
template <class Shape>
__device__ __forceinline__ const float *biases_of(const float *biases, int head) {
    return biases + int64_t(head) * (2 * Shape::reach) + Shape::reach;
}

// What a bias counts among scores before they are weighed.
template <class Shape>
constexpr float kBiasUnit = Shape::softcap > 0.f ? 1.f : 1.f / Shape::scale;

// Slopes of the lane's two rows, whose heads these are. They are constants: before the wait.
template <class Shape>
__device__ __forceinline__ void read_slopes(typename HeadSlopes<Shape>::OfRows &rows, const float *slopes, int first,
                                            int second) {
    if constexpr (kHasSlopes<Shape>) {
        rows.slope[0] = slopes[first] * kBiasUnit<Shape>, rows.slope[1] = slopes[second] * kBiasUnit<Shape>;
    } else if constexpr (kHasBiases<Shape>) {
        rows.biases = biases_of<Shape>(slopes, first);  // of both
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

// The same of biases that are looked up.
template <class Shape>
struct LookedUpBias {
    static constexpr bool any = true;
    const float *from[2];

    // Rows that are none of the sequence's may say any position; nothing of theirs counts.
    __device__ __forceinline__ LookedUpBias(const typename HeadSlopes<Shape>::OfRows &rows, int key, int at, int other_at) {
        const auto place = [&](int query) { return rows.biases - min(max(query, 0), Shape::reach - 1); };
        const int own = key + 2 * (lane_index() % 4);
        from[0] = place(at) + own, from[1] = place(other_at) + own;
    }
    __device__ __forceinline__ float operator()(int half, int n, int i) const {
        return kBiasUnit<Shape> * from[half][8 * n + i];
    }
};

// Whichever a shape's scores have.
template <class Shape, bool kLookedUp = kHasBiases<Shape>>
struct BiasOfKeys {
    using type = DistanceBias<Shape>;
};
template <class Shape>
struct BiasOfKeys<Shape, true> {
    using type = LookedUpBias<Shape>;
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
