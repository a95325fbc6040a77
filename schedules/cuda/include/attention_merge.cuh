// How small steps (attention_stream.cuh) put together what warps, and then splits, have gathered of a unit.
#pragma once

#include "attention_codes.cuh"
#include "attention_sinks.cuh"
#include "attention_unit.cuh"

// Parts' sums of a column quad (4 columns) of a query: x, and its (most, sum). All parts' largest scores are seen first, so
// that no part waits for another.
template <class Shape>
struct Merged {
    float x[4], most, sum;

    __device__ __forceinline__ Merged() : x{0.f, 0.f, 0.f, 0.f}, most(-INFINITY), sum(0.f) {}

    __device__ __forceinline__ void see(float o_most) { most = fmaxf(most, o_most); }

    // top: (most, sum) of the part.
    __device__ __forceinline__ void add(float4 o, float2 top) {
        constexpr float c = kExponent<Shape>;
        const float base = most == -INFINITY ? 0.f : most, take = exp2_approx((top.x - base) * c);
        x[0] = fmaf(o.x, take, x[0]), x[1] = fmaf(o.y, take, x[1]);
        x[2] = fmaf(o.z, take, x[2]), x[3] = fmaf(o.w, take, x[3]);
        sum = fmaf(top.y, take, sum);
    }
};

// A finished column quad.
template <class Shape>
__device__ __forceinline__ void finish(typename Shape::Out *out, const Part &part, int query, int quad,
                                       const Merged<Shape> &merged, const float *sinks) {
    constexpr int heads = Stream<Shape>::tile_heads;
    const float scale = inverse_sum<Shape>(merged.most, merged.sum, sinks, part.head + query % heads);
    const float x[4] = {merged.x[0] * scale, merged.x[1] * scale, merged.x[2] * scale, merged.x[3] * scale};
    write_result<Shape>(out, part.row + query / heads, (part.head + query % heads) * Shape::head_dim + 4 * quad, x);
}

// Everything this warp gathered for the unit's queries, to shared memory.
template <class Shape>
__device__ __forceinline__ void hand_over(const Gathered<Shape> &state, const Part &part, float *o, float2 *tops) {
    using S = Stream<Shape>;
    const int warp = team_warp<Shape>(), n = part.count * heads_of<Shape>(part);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int query = lane_index() / 4 + 8 * half, first = kCoded<Shape> ? 0 : 2 * (lane_index() % 4);
        const float sum = row_sum(state.sum[half]);
        if (query < n) {
            if (lane_index() % 4 == 0) tops[warp * S::queries + query] = make_float2(state.most[half], sum);
            float *to = o + (warp * S::queries + query) * S::D + first;
#pragma unroll
            for (int j = 0; j < S::D / 8; j++) {
                if constexpr (kCoded<Shape>) {
                    const Column mine = column<Shape>(j);
                    to[mine.at] = state.o[j][2 * half] * value_unit(state);
                    to[mine.at + mine.codes] = state.o[j][2 * half + 1] * value_unit(state);
                } else {
                    *reinterpret_cast<float2 *>(to + 8 * j) = make_float2(state.o[j][2 * half], state.o[j][2 * half + 1]);
                }
            }
        }
    }
}

// Warps, and a row's own key and value (scores [queries], value [D]; null: none), then splits, merged in order.
// partial: o [units][splits][queries][D], (most, sum) [units][splits][queries].
template <class Shape>
__device__ __forceinline__ void merge(const Part &part, const float *o, const float2 *tops, const float *own_value,
                                      const float *own_scores, typename Shape::Out *out, float *partial,
                                      uint32_t *counters, const float *sinks) {
    using S = Stream<Shape>;
    constexpr int quads = S::D / 4;
    float2 *partial_tops = reinterpret_cast<float2 *>(partial + S::units * Shape::splits * S::queries * S::D);
    const int n = part.count * heads_of<Shape>(part) * quads;
    for (int i = team_thread<Shape>(); i < n; i += S::threads) {
        const int query = i / quads, quad = i % quads;
        Merged<Shape> merged;
#pragma unroll
        for (int w = 0; w < S::team; w++) merged.see(tops[w * S::queries + query].x);
        if (own_value) merged.see(own_scores[query]);
#pragma unroll
        for (int w = 0; w < S::team; w++) {
            const int place = w * S::queries + query;
            merged.add(reinterpret_cast<const float4 *>(o)[place * quads + quad], tops[place]);
        }
        if (own_value)
            merged.add(reinterpret_cast<const float4 *>(own_value)[quad], make_float2(own_scores[query], 1.f));
        if (part.splits == 1) {
            finish<Shape>(out, part, query, quad, merged, sinks);
            continue;
        }
        const int place = (part.unit * Shape::splits + part.split) * S::queries + query;
        reinterpret_cast<float4 *>(partial)[place * quads + quad] =
            make_float4(merged.x[0], merged.x[1], merged.x[2], merged.x[3]);
        if (quad == 0) partial_tops[place] = make_float2(merged.most, merged.sum);
    }
    if (part.splits == 1) return;

    __shared__ int all_last[S::teams];
    int &is_last = all_last[team_index<Shape>()];
    team_barrier<Shape>();
    if (team_thread<Shape>() == 0) is_last = count_up(counters + part.unit) == uint32_t(part.splits - 1);
    team_barrier<Shape>();
    if (!is_last) return;
    for (int i = team_thread<Shape>(); i < n; i += S::threads) {
        const int query = i / quads, quad = i % quads;
        Merged<Shape> merged;
        const auto place = [&](int split) { return (part.unit * Shape::splits + split) * S::queries + query; };
#pragma unroll 4
        for (int split = 0; split < part.splits; split++) merged.see(partial_tops[place(split)].x);
#pragma unroll 4
        for (int split = 0; split < part.splits; split++)
            merged.add(reinterpret_cast<const float4 *>(partial)[place(split) * quads + quad],
                       partial_tops[place(split)]);
        finish<Shape>(out, part, query, quad, merged, sinks);
    }
    if (team_thread<Shape>() == 0) counters[part.unit] = 0;
}
