// A head's vector of a row of qkv as attention wants it: normalised where the operator has that, and turned.
//
// Queries and keys that are normalised (Qwen 3, Gemma 3) are x / sqrt(mean(x²) + e) * weight over a head's D elements,
// arXiv:1910.07467. kVectorLanes lanes of one warp have eight elements each and add up their squares, so that whichever
// kernel forms a key, and in whatever step, it is the same to the last bit.
//
// Where that is so, Shape has beside what attention.cuh lists:
//     epsilon           of the norm
//     norms_values      where values are normalised too, without a weight
// and `qkv` is a NormedRows instead of a pointer.
#pragma once

#include "attention.cuh"

// Lanes that share a head's vector, eight elements each: a power of two, so that lanes beyond D/8 have none.
template <class Shape>
constexpr int kVectorLanes = Shape::head_dim > 128 ? 32 : Shape::head_dim > 64 ? 16 : Shape::head_dim > 32 ? 8 : 4;

// qkv [M, (H + 2 KH) D]; the norms' weights [D].
struct NormedRows {
    const float *qkv, *query_norm, *key_norm;
};

template <class Shape, class = void>
struct HeadNorm {
    static constexpr bool there = false;
    using Rows = const float *;
};
template <class Shape>
struct HeadNorm<Shape, decltype(void(Shape::epsilon))> {
    static constexpr bool there = true;
    using Rows = NormedRows;
};

template <class Shape>
constexpr bool kNormed = HeadNorm<Shape>::there;
template <class Shape, class = void>
constexpr bool kNormsValues = false;
template <class Shape>
constexpr bool kNormsValues<Shape, decltype(void(Shape::norms_values))> = true;
template <class Shape>
using HeadRows = typename HeadNorm<Shape>::Rows;

// Brings the norms' weights, which long since left L2, back to it; a whole warp calls. They are constants: before the wait.
template <class Shape>
__device__ __forceinline__ void prefetch_norms(HeadRows<Shape> qkv) {
    if constexpr (kNormed<Shape>) {
        const int d = lane_index() % 16 * 32;
        if (d < Shape::head_dim) prefetch_l2((lane_index() < 16 ? qkv.query_norm : qkv.key_norm) + d);
    }
}

// A head's vector that is normalised: what to multiply it by, element by element, and all alike.
struct NormedVector {
    const float *x, *weight;
    float factor;

    __device__ __forceinline__ NormedVector operator+(int d) const { return {x + d, weight + d, factor}; }
    __device__ __forceinline__ NormedVector operator-(int d) const { return *this + -d; }
    __device__ __forceinline__ float operator[](int d) const { return x[d] * factor * weight[d]; }
};

__device__ __forceinline__ Eight load_eight(const NormedVector &from) {
    Eight x = load_eight(from.x);
    const Eight weight = load_eight(from.weight);
#pragma unroll
    for (int i = 0; i < 8; i++) x.at[i] = x.at[i] * from.factor * weight.at[i];
    return x;
}

// Elements d .. d+7 of a head's vector x, a pointer or a NormedVector, turned: pairs (a, b) -> (a cos - b sin,
// b cos + a sin), a pair being (i, i + RD/2), or (2i, 2i + 1) when interleaved; the rest as it is. cos, sin [RD/2].
// arXiv:2104.09864.
template <class Shape, class Vector>
__device__ __forceinline__ Eight turned_eight(Vector x, const float *cos, const float *sin, int d) {
    constexpr int half = Shape::rotary_dim / 2;
    Eight y = load_eight(x + d);
    if constexpr (half % 8 == 0 && half > 0 && !Shape::interleaved) {
        if (d < Shape::rotary_dim) {
            const bool second = d >= half;
            const Eight other = load_eight(second ? x + d - half : x + d + half);
            const Eight c = load_eight(cos + (second ? d - half : d)), s = load_eight(sin + (second ? d - half : d));
#pragma unroll
            for (int i = 0; i < 8; i++)
                y.at[i] = fmaf(y.at[i], c.at[i], (second ? other.at[i] : -other.at[i]) * s.at[i]);
        }
    } else if constexpr (half > 0) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int e = d + i;
            if (e >= Shape::rotary_dim) break;
            const bool second = Shape::interleaved ? e % 2 : e >= half;
            const float other = x[Shape::interleaved ? e ^ 1 : second ? e - half : e + half];
            const int angle = Shape::interleaved ? e / 2 : second ? e - half : e;
            y.at[i] = fmaf(y.at[i], cos[angle], (second ? other : -other) * sin[angle]);
        }
    }
    return y;
}

// as(elements) of chunk `chunk` of head `head` of a row of qkv (queries, keys, values), turned.
template <class Shape, class As>
__device__ __forceinline__ auto head_eight(const float *qkv, const float *cos, const float *sin, int row, int head,
                                           int chunk, As as) {
    constexpr int half = Shape::rotary_dim / 2;
    const float *x = qkv + int64_t(row) * kRowColumns<Shape> + head * Shape::head_dim;
    if (head >= Shape::heads + Shape::kv_heads) return as(load_eight(x + 8 * chunk));
    return as(turned_eight<Shape>(x, cos + row * half, sin + row * half, 8 * chunk));
}

// The same as the products take it; and as it is.
template <class Shape>
__device__ __forceinline__ uint4 head_chunk(const float *qkv, const float *cos, const float *sin, int row, int head,
                                            int chunk) {
    return head_eight<Shape>(qkv, cos, sin, row, head, chunk,
                             [](const Eight &x) { return pack_eight<typename Shape::T>(x); });
}
template <class Shape>
__device__ __forceinline__ Eight head_eight(const float *qkv, const float *cos, const float *sin, int row, int head,
                                            int chunk) {
    return head_eight<Shape>(qkv, cos, sin, row, head, chunk, [](const Eight &x) { return x; });
}

// The same of a row that is to be normalised: by all lanes of a warp, kVectorLanes of which have the vector. is_here:
// this one has a chunk of it; zeros for others.
template <class Shape>
__device__ __forceinline__ Eight normed_eight(const NormedRows &rows, const float *cos, const float *sin, int row, int head,
                                              int chunk, bool is_here) {
    constexpr int half = Shape::rotary_dim / 2;
    const float *x = rows.qkv + int64_t(row) * kRowColumns<Shape> + head * Shape::head_dim;
    Eight y = {};
    if (is_here) y = load_eight(x + 8 * chunk);
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++) squares = fmaf(y.at[i], y.at[i], squares);
#pragma unroll
    for (int offset = kVectorLanes<Shape> / 2; offset > 0; offset /= 2)
        squares += __shfl_xor_sync(kAllLanes, squares, offset);
    const bool is_value = head >= Shape::heads + Shape::kv_heads;
    if (!is_here || (is_value && !kNormsValues<Shape>)) return y;
    const float factor = rsqrtf(squares * (1.f / Shape::head_dim) + Shape::epsilon);
    if (is_value) {
#pragma unroll
        for (int i = 0; i < 8; i++) y.at[i] *= factor;
        return y;
    }
    const NormedVector normed = {x, head < Shape::heads ? rows.query_norm : rows.key_norm, factor};
    return turned_eight<Shape>(normed, cos + row * half, sin + row * half, 8 * chunk);
}
