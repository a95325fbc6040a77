// What happens to the sums of a matrix product while they are still in registers:
//
//     y = act(sum + bias) + residual                  plain
//     y = act(gate + bias_g) * (up + bias_u)          gated: gate and up are rows g and g + 8 of a strip, one thread's
//
// Sums come as the accumulators of mma.sync and wgmma, 16 rows of the weight (a strip) by 8 tokens: with g = lane / 4
// and t = lane % 4 a thread holds (row g, token 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1). Results are stored as
// f32 [M,N], or in T as a tiled activation (tiles.cuh), whose columns past N become zero.
#pragma once

#include "norm.cuh"

enum class Activation { none, relu, gelu, gelu_tanh, silu, clamped_swish };

// kQuick: quotients by an approximate reciprocal, 2 instructions instead of about 12, to about 2 ulp.
template <Activation kActivation, bool kQuick = false>
__device__ __forceinline__ float activate(float x) {
    if constexpr (kActivation == Activation::relu) {
        return x > 0.0f || isnan(x) ? x : 0.0f;  // NaN stays NaN
    } else if constexpr (kActivation == Activation::gelu) {
        return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    } else if constexpr (kActivation == Activation::gelu_tanh) {
        return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    } else if constexpr (kActivation == Activation::silu) {
        const float d = 1.0f + exp2_approx(-1.44269504f * x);
        return kQuick ? x * reciprocal_approx(d) : x / d;
    }
    return x;
}

// Gate and up of experts to one output: act(gate) up; of a clamped gate g sigmoid(kAlpha g) (u + kOffset), g at most kLimit,
// u within it on both sides; NaN stays NaN.
template <class L, bool kQuick = false>
__device__ __forceinline__ float gate_up(float gate, float up) {
    if constexpr (L::kActivation == Activation::clamped_swish) {
        const float g = gate > L::kLimit ? L::kLimit : gate;
        const float u = up > L::kLimit ? L::kLimit : up < -L::kLimit ? -L::kLimit : up;
        const float d = 1.0f + exp2_approx(-1.44269504f * L::kAlpha * g);
        return (kQuick ? g * reciprocal_approx(d) : g / d) * (u + L::kOffset);
    } else {
        return activate<L::kActivation, kQuick>(gate) * up;
    }
}

// void, of a member that a layer has; none of others.
template <class...>
struct Void {
    using Type = void;
};

// What a product hands on to the norm behind it (gemm_norm.cuh, gemv_norm.cuh); or to attention (gemm_append.cuh).
template <class L, class = void>
struct HandedOn {
    const float *weight;    // [n], the norm's
    typename L::T *scaled;  // y ∘ weight, tiled
    float2 *moments;        // of y's parts [n/64][m], a GEMV's [n/16][m]: mean, and sum of squared differences from it
};

// What a product takes of the norm in front of it.
struct TakenOver {
    const float2 *moments;     // of x's parts [k/64][m], behind a GEMV [k/16][m]
    const float *weight_sums;  // [n], gated [2 n]: a row's sum over k of W g
    const float2 *norms;       // of each token its mean and 1/d, in shared memory
};

// Whether a product appends queries, keys and values to a cache: gemm_append.cuh says of which it does.
template <class L, class = void>
constexpr bool kAppends = false;

// A layer `L` says: kM tokens, kN outputs, kGated, kBias, kResidual, kActivation, T, and `Y`: float, or the T of a tiled
// result; kMoments, whether it prepares the norm behind it; and kNorm, which a GEMM applies to its sums, and a GEMV if it
// is kDeferred. The pointers of operands it lacks are null and never read.
template <class L>
struct Epilogue {
    const float *bias;      // [n], gated [2 n]: of gate rows, then of up rows
    const float *residual;  // [m, n]
    typename L::Y *y;
    HandedOn<L> next = {};
    TakenOver front = {};

    static constexpr bool kTiled = sizeof(typename L::Y) == 2;
    static constexpr int kStrips = strips_of(L::kN, L::kGated, kTiled);
    static constexpr int kOutputs = L::kGated ? 8 : 16;  // of a strip

    // What is added to a thread's sums; worth reading long before they are ready.
    struct Addends {
        float bias[2];
        float residual[4];
    };

    // Brings the constants of strips first … end - 1 to L2; a whole block calls.
    __device__ void prefetch_constants(int first, int end) const {
        if constexpr (L::kBias) prefetch_rows(bias, first, end);
        if constexpr (L::kMoments) prefetch_rows(next.weight, first, end);
        if constexpr (L::kDeferred && L::kNorm == Norm::layer) prefetch_rows(front.weight_sums, first, end);
    }

    __device__ void prefetch_rows(const float *vector, int first, int end) const {
        for (int n = first * kOutputs + 8 * threadIdx.x; n < min(end * kOutputs, L::kN); n += 8 * blockDim.x) {
            prefetch_l2(vector + n);
            if constexpr (L::kGated) prefetch_l2(vector + L::kN + n);
        }
    }

    __device__ Addends read(int strip, int first_token) const {
        Addends addends = {};
        const int n = strip * kOutputs + lane_index() / 4, token = first_token + lane_index() % 4 * 2;
        for (int i = 0; i < 2; i++) {
            const int row = L::kGated ? n : n + 8 * i;
            if (!is_output(row)) continue;
            if constexpr (L::kBias) addends.bias[i] = bias[L::kGated ? row + i * L::kN : row];
            if constexpr (L::kResidual) {
                for (int j = 0; j < 2; j++) {
                    if (token + j < L::kM) addends.residual[2 * i + j] = residual[int64_t(token + j) * L::kN + row];
                }
            }
        }
        return addends;
    }

    __device__ void write(int strip, int first_token, const float (&sums)[4], const Addends &addends) const {
        const int n = strip * kOutputs + lane_index() / 4, token = first_token + lane_index() % 4 * 2;
        for (int j = 0; j < 2; j++) {
            if (token + j >= L::kM) continue;
            const float first = activate<L::kActivation>(sums[j] + addends.bias[0]);
            if constexpr (L::kGated) {
                store(token + j, n, first * (sums[2 + j] + addends.bias[1]));
            } else {
                store(token + j, n, first + addends.residual[j]);
                const float second = activate<L::kActivation>(sums[2 + j] + addends.bias[1]);
                store(token + j, n + 8, second + addends.residual[2 + j]);
            }
        }
    }

    // One result; nothing for a row that is padding. Tiled: n < N rounded up to 64.
    __device__ void store(int token, int n, float value) const {
        if constexpr (kTiled) {
            y[activation_index(round_up(L::kM, 8), token, n)] = round_to<typename L::Y>(is_output(n) ? value : 0.0f);
        } else if (is_output(n)) {
            y[int64_t(token) * L::kN + n] = value;
        }
    }

    static __device__ bool is_output(int n) { return L::kN % kTile == 0 || n < L::kN; }
};
