// A quantised weight back in T, in tiles: what products of many tokens read.
//
// A warp takes one piece (16 rows by 64 of K) at a time, as the GEMV does, and stores a lane's pairs of elements.
// Bytes: the quantised weight read, 2 for each weight written.
#pragma once

#include "gemv_quant.cuh"

constexpr int kDequantiseWarps = 8;

// kStrips stored strips of kColumns pieces; row_scales [16 kStrips] is read where the weight has them.
template <class T, class Weight, int kStrips, int kColumns>
__device__ __forceinline__ void dequantise(const unsigned char *weight, unsigned char *tiles) {
    __shared__ uint4 slots[kDequantiseWarps][Weight::kPieceBytes / 16];
    const int g = lane_index() / 4, t = lane_index() % 4;
    const float *row_scales = reinterpret_cast<const float *>(weight + Weight::offset(kStrips, 0, kColumns));
    const int64_t piece = int64_t(blockIdx.x) * kDequantiseWarps + warp_index();
    let_next_start();
    wait_for_previous();
    if (piece >= int64_t(kStrips) * kColumns) return;
    const int strip = piece / kColumns, column = piece % kColumns;
    auto *slot = reinterpret_cast<unsigned char *>(slots[warp_index()]);
    Weight::ask(slot, weight + Weight::offset(strip, column, kColumns));
    cp_async_commit();
    cp_async_wait<0>();
    Weight from;
    from.take(slot);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t a[2][4];
        from.fragments(a, half);
#pragma unroll
        for (int row = 0; row < 2; row++) {
            const float scale = Weight::kRowScales ? row_scales[strip * kStripRows + 8 * row + g] : from.scale(half, row);
            uint32_t chunk[4] = {a[0][row], a[0][row + 2], a[1][row], a[1][row + 2]};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 codes = unpack2<T>(chunk[i]);
                chunk[i] = pack2<T>(codes.x * scale, codes.y * scale);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                unsigned char *to = tiles + strip_offset(strip, column, kColumns) + chunk_offset(g + 8 * row, 4 * half + i);
                reinterpret_cast<uint32_t *>(to)[t] = chunk[i];
            }
        }
    }
}
