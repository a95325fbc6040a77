// Attention in float32 throughout, for caches kept so: exact before it is fast. Two launches for steps of any size.
//
// float32_append: a block a row.     Turns q and k, writes k and v into the pages, q to queries [M, heads * D].
// float32_attend: a warp for each (row, query head); its pages go by one at a time:
//
//     s[64] = q k^T             lane l has tokens l and l + 32, and reads their keys by itself
//     o[D] = o * keep + p v     lane l has columns l, l + 32 …, which it reads beside the other lanes'
//
// A page's part for one layer has for each key head K and then V, both [64 tokens][D]. Shape is attention.cuh's.
// Bytes: 8 D a token of context and query head, a group's mostly from the caches; operations: 4 D.
#pragma once

#include "attention_heads.cuh"
#include "attention_sinks.cuh"
#include "attention_texts.cuh"

constexpr int kFloat32Threads = 128;

// Elements d .. d+7 of a row's head to the queries, or to its page.
template <class Shape>
__device__ __forceinline__ void float32_put(const Eight &y, float *kv, float *queries, int row, int head, int d, int page,
                                            int at) {
    const int key = head - Shape::heads, value = key - Shape::kv_heads;
    float *to = key < 0 ? queries + (int64_t(row) * Shape::heads + head) * Shape::head_dim
                        : page_head<Shape>(kv, page, value < 0 ? key : value) +
                              (value < 0 ? 0 : kHeadElements<Shape>) + at % kPageTokens * Shape::head_dim;
    store_16(to + d, *reinterpret_cast<const uint4 *>(y.at));
    store_16(to + d + 4, *reinterpret_cast<const uint4 *>(y.at + 4));
}

template <class Shape>
__device__ __forceinline__ void float32_append(HeadRows<Shape> qkv, const float *cos, const float *sin,
                                               const int *positions, const int *page_table, float *kv,
                                               float *queries) {
    constexpr int chunks = Shape::head_dim / 8, half = Shape::rotary_dim / 2;
    constexpr int heads = Shape::heads + 2 * Shape::kv_heads;
    const int row = blockIdx.x;
    wait_for_previous();
    let_next_start();
    const int at = positions[row];
    if (at < 0) return;
    const int page = page_table[row * Shape::pages + at / kPageTokens];
    if constexpr (kNormed<Shape>) {  // a vector by lanes of one warp
        constexpr int lanes = kVectorLanes<Shape>;
        const int chunk = threadIdx.x % lanes;
        for (int base = 0; base < heads; base += kFloat32Threads / lanes) {
            const int head = base + threadIdx.x / lanes;
            const bool is_here = head < heads && chunk < chunks;
            const Eight y = normed_eight<Shape>(qkv, cos, sin, row, head, chunk, is_here);
            if (is_here) float32_put<Shape>(y, kv, queries, row, head, 8 * chunk, page, at);
        }
    } else {
        for (int i = threadIdx.x; i < heads * chunks; i += kFloat32Threads) {
            const int head = i / chunks, d = i % chunks * 8;
            const bool is_value = head >= Shape::heads + Shape::kv_heads;
            const float *x = qkv + int64_t(row) * kRowColumns<Shape> + head * Shape::head_dim;
            const Eight y = is_value ? load_eight(x + d) : turned_eight<Shape>(x, cos + row * half, sin + row * half, d);
            float32_put<Shape>(y, kv, queries, row, head, d, page, at);
        }
    }
}

// The score of one token, before the softmax.
template <class Shape>
__device__ __forceinline__ float float32_score(const float *q, const float *key) {
    float s = 0.f;
#pragma unroll 4
    for (int d = 0; d < Shape::head_dim; d += 4) {
        const float4 a = *reinterpret_cast<const float4 *>(q + d), b = *reinterpret_cast<const float4 *>(key + d);
        s = fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, fmaf(a.w, b.w, s))));
    }
    s *= Shape::scale;
    return Shape::softcap > 0.f ? Shape::softcap * tanhf(s / Shape::softcap) : s;
}

template <class Shape>
__device__ __forceinline__ void float32_attend(const float *queries, const int *positions, const int *page_table,
                                               const float *kv, typename Shape::Out *out,
                                               const float *sinks = nullptr, const float *slopes = nullptr) {
    constexpr int D = Shape::head_dim, per_lane = (D + 31) / 32;
    const int unit = blockIdx.x * (kFloat32Threads / 32) + warp_index(), lane = lane_index();
    const int row = unit / Shape::heads, head = unit % Shape::heads;
    if (row >= Shape::rows) return;
    wait_for_previous();
    let_next_start();

    const int at = positions[row], last = last_in_sight_of<Shape>(positions, row, at);
    const float *q = queries + int64_t(unit) * D;
    float o[per_lane] = {}, most = -INFINITY, sum = 0.f, slope = 0.f;
    if constexpr (kHasSlopes<Shape>) slope = slopes[head];
    const int begin = Shape::window ? max(at - sight<Shape>(at) + 1, 0) / kPageTokens : 0;
    for (int page = begin; page * kPageTokens <= last; page++) {  // a row that pads the step, at = -1, sees none
        const float *keys = page_head<Shape>(const_cast<float *>(kv), page_table[row * Shape::pages + page],
                                             head / kGroup<Shape>);
        float s[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int token = page * kPageTokens + lane + 32 * i;
            const bool seen = token <= last && (!Shape::window || token > at - sight<Shape>(at));
            s[i] = seen ? float32_score<Shape>(q, keys + (lane + 32 * i) * D) : -INFINITY;
            if constexpr (kHasSlopes<Shape>) s[i] = fmaf(slope, float(token - at), s[i]);
            if constexpr (kHasBiases<Shape>) s[i] += biases_of<Shape>(slopes, head)[token - at];
        }
        const float top = fmaxf(most, warp_max(fmaxf(s[0], s[1])));
        const float keep = expf(most - top), p[2] = {expf(s[0] - top), expf(s[1] - top)};
        most = top;
        sum = sum * keep + warp_sum(p[0] + p[1]);
#pragma unroll
        for (int j = 0; j < per_lane; j++) o[j] *= keep;
        const float *values = keys + kHeadElements<Shape>;
        for (int token = 0; token < min(kPageTokens, last + 1 - page * kPageTokens); token++) {
            const float weight = __shfl_sync(kAllLanes, token < 32 ? p[0] : p[1], token % 32);
#pragma unroll
            for (int j = 0; j < per_lane; j++)
                if (lane + 32 * j < D) o[j] = fmaf(weight, values[token * D + lane + 32 * j], o[j]);
        }
    }
    if constexpr (kHasSinks<Shape>) {
        const float sink = sinks[head], top = fmaxf(most, sink), keep = expf(most - top);
        sum = fmaf(sum, keep, expf(sink - top));
#pragma unroll
        for (int j = 0; j < per_lane; j++) o[j] *= keep;
    }
#pragma unroll
    for (int j = 0; j < per_lane; j++) {  // even lanes write their column and the next one's
        const float x = at < 0 ? 0.f : o[j] / sum, pair[2] = {x, __shfl_down_sync(kAllLanes, x, 1)};
        const int d = lane + 32 * j;
        if (lane % 2 == 0 && d < D) write_result<Shape>(out, row, head * D + d, pair);
    }
    if (head == Shape::heads - 1) write_zeros<Shape>(out, row, kColumns<Shape>, kPaddedColumns<Shape>, lane, 32);
}
