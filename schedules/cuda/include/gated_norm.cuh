// Rows normalised and multiplied by their gates: y = x / sqrt(mean(x²) + e) · weight · silu(z). A warp a row.
//
// Bytes: 12 an element.
#pragma once

#include "device.cuh"

constexpr int kGatedWarps = 4;

// `G` says kRows, kColumns, kEpsilon. x, z, y [kRows, kColumns], weight [kColumns].
template <class G>
__device__ __forceinline__ void gated_norm(const float *x, const float *z, const float *weight, float *y) {
    constexpr int kStep = G::kColumns % 4 == 0 ? 4 : 1, kOwn = (G::kColumns + 32 * kStep - 1) / (32 * kStep);
    const int row = blockIdx.x * kGatedWarps + warp_index();
    let_next_start();
    wait_for_previous();
    if (row >= G::kRows) return;
    const int64_t first = int64_t(row) * G::kColumns;
    float v[kOwn][kStep], gate[kOwn][kStep], squares = 0.f;
    const auto column = [](int j) { return kStep * (32 * j + lane_index()); };
    const auto load = [&](float (&to)[kStep], const float *from) {
        if constexpr (kStep == 4) {
            const float4 four = *reinterpret_cast<const float4 *>(from);
            to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
        } else {
            to[0] = *from;
        }
    };
#pragma unroll
    for (int j = 0; j < kOwn; j++) {
        if (column(j) >= G::kColumns) continue;
        load(v[j], x + first + column(j)), load(gate[j], z + first + column(j));
    }
#pragma unroll
    for (int j = 0; j < kOwn; j++) {
#pragma unroll
        for (int i = 0; i < kStep; i++) squares += column(j) < G::kColumns ? v[j][i] * v[j][i] : 0.f;
    }
    const float size = rsqrtf(warp_sum(squares) / G::kColumns + G::kEpsilon);
#pragma unroll
    for (int j = 0; j < kOwn; j++) {
        if (column(j) >= G::kColumns) continue;
        float w[kStep];
        load(w, weight + column(j));
#pragma unroll
        for (int i = 0; i < kStep; i++) v[j][i] *= size * w[i] * (gate[j][i] / (1.f + expf(-gate[j][i])));
        float *to = y + first + column(j);
        if constexpr (kStep == 4) *reinterpret_cast<float4 *>(to) = make_float4(v[j][0], v[j][1], v[j][2], v[j][3]);
        else *to = v[j][0];
    }
}
