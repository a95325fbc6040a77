// Norms of rows, alone or on the way into a product:
//
//     RMS      x / sqrt(mean(x²) + e) * weight                           Zhang and Sennrich 2019, arXiv:1910.07467
//     layer    (x - mean) / sqrt(var + e) * weight + bias                Ba et al. 2016, arXiv:1607.06450
//
// A row is read twice, eight elements a thread at a time: once for its moments, once to be normalised (from L1). Moments
// of parts of a row are merged by Chan's formula, which no mean however large makes inexact.
#pragma once

#include "tiles.cuh"

// Elements k … k + 7 of a row of kK; zeros past its end.
template <int kK>
__device__ __forceinline__ void load_eight(float (&x)[8], const float *row, int k) {
    if constexpr (kK % 8 == 0) {
        const float4 low = reinterpret_cast<const float4 *>(row + k)[0], high = reinterpret_cast<const float4 *>(row + k)[1];
        x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
        x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = k + i < kK ? row[k + i] : 0.0f;
    }
}

template <int kK>
__device__ __forceinline__ void store_eight(float *row, int k, const float (&x)[8]) {
    if constexpr (kK % 8 == 0) {
        reinterpret_cast<float4 *>(row + k)[0] = make_float4(x[0], x[1], x[2], x[3]);
        reinterpret_cast<float4 *>(row + k)[1] = make_float4(x[4], x[5], x[6], x[7]);
    } else {
        for (int i = 0; i < 8 && k + i < kK; i++) row[k + i] = x[i];
    }
}

template <class T>
__device__ __forceinline__ uint4 round_eight(const float (&x)[8]) {
    return make_uint4(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7]));
}

__host__ __device__ constexpr int at_most(int n, int most) { return n < most ? n : most; }

// Of a part of a row: how many elements, their mean, and the sum of (x - mean)². Not centred: the mean is taken as 0.
template <bool kCentred>
struct Moments {
    float count = 0, mean = 0, squares = 0;

    __device__ void add(const float (&x)[8], int n) {
        Moments some;
        some.count = n;
        if constexpr (kCentred) {
            for (int i = 0; i < 8; i++) some.mean += x[i];  // zeros past n
            some.mean /= n;
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float d = x[i] - some.mean;
            if (i < n) some.squares += d * d;
        }
        merge(some);
    }

    __device__ void merge(const Moments &other) {
        const float total = count + other.count;
        if constexpr (kCentred) {
            const float share = total > 0 ? other.count / total : 0.0f, d = other.mean - mean;
            squares += d * d * count * share;
            mean += d * share;
        }
        squares += other.squares;
        count = total;
    }

    // Those of the parts of kLanes lanes side by side together, in each of them.
    template <int kLanes = 32>
    __device__ Moments over_lanes() const {
        Moments all = *this;
#pragma unroll
        for (int offset = kLanes / 2; offset > 0; offset /= 2) {
            Moments other;
            other.count = __shfl_xor_sync(0xffffffffu, all.count, offset);
            if constexpr (kCentred) other.mean = __shfl_xor_sync(0xffffffffu, all.mean, offset);
            other.squares = __shfl_xor_sync(0xffffffffu, all.squares, offset);
            all.merge(other);
        }
        return all;
    }

    __device__ float factor(float epsilon) const { return rsqrtf(squares / count + epsilon); }
};

// Of a part of `count` elements as a product hands it on: (mean, squares), whose mean RMSNorm takes as 0.
template <bool kCentred>
__device__ __forceinline__ Moments<kCentred> moments_of(float2 part, int count) {
    Moments<kCentred> moments;
    moments.count = count;
    moments.mean = kCentred ? part.x : 0;
    moments.squares = kCentred ? part.y : part.y + count * part.x * part.x;
    return moments;
}

enum class Norm { none, rms, layer };

// Where rows come from, and what is done to them: `N` says kK, kNorm, kNormBias (whether there is one), kEpsilon.
// x [rows, kK], weight and bias [kK], f32.
template <class N>
struct NormInput {
    const float *x, *weight, *bias;

    using RowMoments = Moments<N::kNorm == Norm::layer>;
    static constexpr int kChunks = ceil_div(N::kK, 8);  // of a row

    // Brings weight and bias, which long since left L2, back to it; a whole block calls.
    __device__ void prefetch() const {
        for (int k = 32 * threadIdx.x; k < N::kK; k += 32 * blockDim.x) {
            if constexpr (N::kNorm != Norm::none) prefetch_l2(weight + k);
            if constexpr (N::kNormBias) prefetch_l2(bias + k);
        }
    }

    // Moments of a warp's part of a row: its lanes take chunks first + lane, + kStride, … Many are asked for before the
    // first is used: they come from L2, and nothing else goes on meanwhile.
    template <int kStride>
    __device__ RowMoments moments(int row, int first) const {
        constexpr int kTogether = at_most(ceil_div(kChunks, kStride), N::kNorm == Norm::layer ? 4 : 8);
        RowMoments mine;
        for (int begin = first + lane_index(); begin < kChunks; begin += kTogether * kStride) {
            float v[kTogether][8];
#pragma unroll
            for (int i = 0; i < kTogether; i++) {
                const int chunk = begin + i * kStride;
                if (chunk < kChunks) load_eight<N::kK>(v[i], x + int64_t(row) * N::kK, 8 * chunk);
            }
#pragma unroll
            for (int i = 0; i < kTogether; i++) {
                const int chunk = begin + i * kStride;
                if (chunk < kChunks) mine.add(v[i], N::kK % 8 == 0 ? 8 : min(8, N::kK - 8 * chunk));
            }
        }
        return mine.over_lanes();
    }

    // Calls put(chunk, values) for a row's chunks first, + kStride, … below kEnd, normalised; zeros past the row's end.
    template <int kStride, int kEnd, class Put>
    __device__ void each(int row, int first, const RowMoments &all, Put put) const {
        constexpr int kTogether = at_most(ceil_div(kEnd, kStride), N::kNormBias ? 2 : 4);
        for (int begin = first; begin < kEnd; begin += kTogether * kStride) {
            Parts parts[kTogether];
#pragma unroll
            for (int i = 0; i < kTogether; i++) {
                if (begin + i * kStride < kChunks) fetch(parts[i], row, begin + i * kStride);
            }
#pragma unroll
            for (int i = 0; i < kTogether; i++) {
                const int chunk = begin + i * kStride;
                if (chunk >= kEnd) continue;
                float v[8] = {};
                if (chunk < kChunks) normalise(v, parts[i], all);
                put(chunk, v);
            }
        }
    }

  private:
    // What a normalised chunk is made of.
    struct Parts {
        float x[8], scale[8], shift[8];
    };

    __device__ void fetch(Parts &parts, int row, int chunk) const {
        load_eight<N::kK>(parts.x, x + int64_t(row) * N::kK, 8 * chunk);
        if constexpr (N::kNorm != Norm::none) load_eight<N::kK>(parts.scale, weight, 8 * chunk);
        if constexpr (N::kNormBias) load_eight<N::kK>(parts.shift, bias, 8 * chunk);
    }

    static __device__ void normalise(float (&v)[8], const Parts &parts, const RowMoments &all) {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = parts.x[i];
        if constexpr (N::kNorm != Norm::none) {
            const float factor = all.factor(N::kEpsilon);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                v[i] = (v[i] - all.mean) * factor * parts.scale[i] + (N::kNormBias ? parts.shift[i] : 0.0f);
            }
        }
    }
};
