// Attention whose keys or values have sizes that the other kernels do not take (heads of more than 256 elements, values of
// another size than keys), or over the cache of another layer, of any size. Correct before it is fast. Two launches:
//
// any_append: a block a row, a warp for each head in turn.    Normalises and turns q and k, writes k and v into the pages,
//             q to queries [M, heads * D] in float32; where the cache is another layer's, queries alone.
// any_attend: a warp for each (row, query head); its pages go by one at a time:
//
//     s[64] = q k^T             lane l has tokens l and l + 32, and reads their keys by itself
//     o[V] = o * keep + p v     lane l has pairs of columns 2 l, 64 + 2 l …, which it reads beside the other lanes'
//
// Pages lie as attention.cuh has them: K [D/8][64 tokens][8], V [V/8][64][8]; in float32 [64][D] and [64][V].
// Bytes: (D + V) elements a token of context and query head, a group's mostly from the caches; operations: 2 (D + V).
//
// Shape is attention.cuh's, its head_dim the elements V of a value, as those of a result, and beside that
//     key_dim, appends      elements D of a query and a key; whether keys and values come with the queries
#pragma once

#include "attention_heads.cuh"
#include "attention_sinks.cuh"
#include "attention_texts.cuh"

constexpr int kAnyThreads = 128, kAnyWarps = kAnyThreads / 32;

template <class Shape>
struct Any {
    static constexpr int D = Shape::key_dim, V = Shape::head_dim;
    static constexpr int heads = Shape::heads + (Shape::appends ? 2 * Shape::kv_heads : 0);
    static constexpr int columns = Shape::heads * D + (Shape::appends ? Shape::kv_heads * (D + V) : 0);
    using Kv = typename Shape::Kv;

    // A head's part of a page; values follow keys.
    static __device__ __forceinline__ Kv *head_of(Kv *kv, int page, int kv_head) {
        return kv + int64_t(page) * Shape::page_elements + kv_head * kPageTokens * (D + V);
    }

    // Where element d of a token's n lies among those of all tokens of a page and head.
    static __device__ __forceinline__ int place(int token, int d, int n) {
        if constexpr (sizeof(Kv) == 4) return token * n + d;
        else return (d / 8 * kPageTokens + token) * 8 + d % 8;
    }

    static __device__ __forceinline__ void put(Kv *to, float x) {
        if constexpr (sizeof(Kv) == 4) *to = x;
        else *reinterpret_cast<uint16_t *>(to) = uint16_t(pack2<Kv>(x, 0.f));
    }

    static __device__ __forceinline__ Eight eight(const Kv *from) {
        if constexpr (sizeof(Kv) == 4) return load_eight(from);
        else return unpack_eight<Kv>(load_16(from));
    }

    static __device__ __forceinline__ float2 pair(const Kv *from) {
        if constexpr (sizeof(Kv) == 4) return *reinterpret_cast<const float2 *>(from);
        else return unpack2<Kv>(*reinterpret_cast<const uint32_t *>(from));
    }
};

// 1 / sqrt(mean(x²) + e) of a head's n elements, in all lanes of a warp.
template <class Shape>
__device__ __forceinline__ float any_factor(const float *x, int n) {
    float squares = 0.f;
    for (int d = lane_index(); d < n; d += 32) squares = fmaf(x[d], x[d], squares);
    if constexpr (kNormed<Shape>) return rsqrtf(warp_sum(squares) / float(n) + Shape::epsilon);
    else return 1.f;
}

template <class Shape>
__device__ __forceinline__ void any_append(const float *qkv, const float *query_norm, const float *key_norm,
                                           const float *cos, const float *sin, const int *positions,
                                           const int *page_table, typename Shape::Kv *kv, float *queries) {
    using A = Any<Shape>;
    constexpr int half = Shape::rotary_dim / 2;
    const int row = blockIdx.x;
    wait_for_previous();
    let_next_start();
    const int at = positions[row];
    if (at < 0) return;
    for (int head = warp_index(); head < A::heads; head += kAnyWarps) {
        const int key = head - Shape::heads, value = key - Shape::kv_heads;
        const bool is_value = value >= 0;
        const int n = is_value ? A::V : A::D;
        const float *x = qkv + int64_t(row) * A::columns +
                         (is_value ? (Shape::heads + Shape::kv_heads) * A::D + value * A::V : head * A::D);
        const float *weight = is_value ? nullptr : key < 0 ? query_norm : key_norm;
        const float factor = kNormed<Shape> && (!is_value || kNormsValues<Shape>) ? any_factor<Shape>(x, n) : 1.f;
        const auto normed = [&](int d) { return kNormed<Shape> && weight ? x[d] * factor * weight[d] : x[d] * factor; };
        typename Shape::Kv *to = nullptr;
        if constexpr (Shape::appends)
            if (key >= 0)
                to = A::head_of(kv, page_table[row * Shape::pages + at / kPageTokens], is_value ? value : key) +
                     (is_value ? kPageTokens * A::D : 0);
        for (int d = lane_index(); d < n; d += 32) {
            float y = normed(d);
            if (half > 0 && !is_value && d < Shape::rotary_dim) {
                const bool second = Shape::interleaved ? d % 2 : d >= half;
                const int other = Shape::interleaved ? d ^ 1 : second ? d - half : d + half;
                const int angle = row * half + (Shape::interleaved ? d / 2 : second ? d - half : d);
                const float z = normed(other);
                y = fmaf(y, cos[angle], (second ? z : -z) * sin[angle]);
            }
            if (to) A::put(to + A::place(at % kPageTokens, d, n), y);
            else queries[(int64_t(row) * Shape::heads + head) * A::D + d] = y;
        }
    }
}

// The score of one token, before the softmax.
template <class Shape>
__device__ __forceinline__ float any_score(const float *q, const typename Shape::Kv *keys, int token) {
    using A = Any<Shape>;
    float s = 0.f;
#pragma unroll 2
    for (int d = 0; d < A::D; d += 8) {
        const Eight a = load_eight(q + d), b = A::eight(keys + A::place(token, d, A::D));
#pragma unroll
        for (int i = 0; i < 8; i++) s = fmaf(a.at[i], b.at[i], s);
    }
    s *= Shape::scale;
    return Shape::softcap > 0.f ? Shape::softcap * tanhf(s / Shape::softcap) : s;
}

template <class Shape>
__device__ __forceinline__ void any_attend(const float *queries, const int *positions, const int *page_table,
                                           const typename Shape::Kv *kv, typename Shape::Out *out,
                                           const float *sinks = nullptr, const float *slopes = nullptr) {
    using A = Any<Shape>;
    constexpr int pairs = (A::V + 63) / 64;
    const int unit = blockIdx.x * kAnyWarps + warp_index(), lane = lane_index();
    const int row = unit / Shape::heads, head = unit % Shape::heads;
    if (row >= Shape::rows) return;
    wait_for_previous();
    let_next_start();

    const int at = positions[row], last = last_in_sight_of<Shape>(positions, row, at);
    const float *q = queries + int64_t(unit) * A::D;
    float o[pairs][2] = {}, most = -INFINITY, sum = 0.f, slope = 0.f;
    if constexpr (kHasSlopes<Shape>) slope = slopes[head];
    const int begin = Shape::window ? max(at - sight<Shape>(at) + 1, 0) / kPageTokens : 0;
    for (int page = begin; page * kPageTokens <= last; page++) {  // a row that pads the step, at = -1, sees none
        const typename Shape::Kv *keys = A::head_of(const_cast<typename Shape::Kv *>(kv),
                                                    page_table[row * Shape::pages + page], head / kGroup<Shape>);
        float s[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int token = page * kPageTokens + lane + 32 * i;
            const bool seen = token <= last && (!Shape::window || token > at - sight<Shape>(at));
            s[i] = seen ? any_score<Shape>(q, keys, lane + 32 * i) : -INFINITY;
            if constexpr (kHasSlopes<Shape>) s[i] = fmaf(slope, float(token - at), s[i]);
            if constexpr (kHasBiases<Shape>) s[i] += biases_of<Shape>(slopes, head)[token - at];
        }
        const float top = fmaxf(most, warp_max(fmaxf(s[0], s[1])));
        const float keep = expf(most - top), p[2] = {expf(s[0] - top), expf(s[1] - top)};
        most = top;
        sum = sum * keep + warp_sum(p[0] + p[1]);
#pragma unroll
        for (int j = 0; j < pairs; j++) o[j][0] *= keep, o[j][1] *= keep;
        const typename Shape::Kv *values = keys + kPageTokens * A::D;
        for (int token = 0; token < min(kPageTokens, last + 1 - page * kPageTokens); token++) {
            const float weight = __shfl_sync(kAllLanes, token < 32 ? p[0] : p[1], token % 32);
            if (weight == 0.f) continue;  // out of sight, where a page may hold anything
#pragma unroll
            for (int j = 0; j < pairs; j++) {
                const int d = 2 * lane + 64 * j;
                if (d >= A::V) continue;
                const float2 v = A::pair(values + A::place(token, d, A::V));
                o[j][0] = fmaf(weight, v.x, o[j][0]), o[j][1] = fmaf(weight, v.y, o[j][1]);
            }
        }
    }
    if constexpr (kHasSinks<Shape>) {
        const float sink = sinks[head], top = fmaxf(most, sink), keep = expf(most - top);
        sum = fmaf(sum, keep, expf(sink - top));
#pragma unroll
        for (int j = 0; j < pairs; j++) o[j][0] *= keep, o[j][1] *= keep;
    }
#pragma unroll
    for (int j = 0; j < pairs; j++) {
        const int d = 2 * lane + 64 * j;
        const float x[2] = {at < 0 ? 0.f : o[j][0] / sum, at < 0 ? 0.f : o[j][1] / sum};
        if (d < A::V) write_result<Shape>(out, row, head * A::V + d, x);
    }
    if (head == Shape::heads - 1) write_zeros<Shape>(out, row, kColumns<Shape>, kPaddedColumns<Shape>, lane, 32);
}
