// The product of gemm_wgmma.cuh with a quantised weight: its codes fill the ring, half or a quarter of the bytes.
//
// The left matrix comes from registers, which a product reads until it has been waited for. A step's 64 of K are two
// halves with registers of their own, so that codes become operands while the tensor cores are at the other half:
//
//     products    | half 0 of step i | half 1 of step i | half 0 of i + 1  | …
//     registers   |  half 1 of i     |  half 0 of i + 1 |  half 1 of i + 1 | …       16 for operands, 8 or 6 for codes
//
// A stage is given back in the middle of the next step, when its second half has been multiplied, by one lane of each
// warp, whose lanes have met since they read it. (Met there, behind a branch, ptxas would let no two products be under
// way.) A warpgroup that owns 128 rows does so with 64 of them, then with the others.
#pragma once

#include "gemm_codes.cuh"
#include "gemm_wgmma.cuh"
#include "gemv_quant.cuh"

// Sums a stretch of a tile from codes.
template <class Tiling>
struct CodeSums {
    using T = typename Tiling::L::T;
    using Weight = typename Tiling::L::Weight;

    const void *weight;

    __device__ __forceinline__ void operator()(float (&sums)[Tiling::kSums], const Stretch &stretch,
                                               const Warpgroup &group, WgmmaShared<Tiling> &shared,
                                               RingPosition<Tiling::kStages> &at) const {
        const RowScales<Tiling> scales(weight, Tiling::place_of(stretch.tile), group);
        const uint64_t tokens = k_major_descriptor(x_of<Tiling>(shared.stages[0], group));
        const int own_piece = group.part * Tiling::kGroupBytes + group.thread / 32 * Weight::kPieceBytes;
        uint32_t a[2][2][4] = {};  // [half][k-step]
        int previous = 0;
        for (int step = stretch.begin; step < stretch.end; step++) {
            mbarrier_wait(&shared.full[at.stage], at.parity);
            Weight codes;
            codes.take(shared.stages[at.stage] + own_piece);
            if constexpr (!Weight::kGroupScales) __syncwarp();  // of groups they meet in take(), of the next step too
            const uint64_t x = tokens + at.stage * (Tiling::kStageBytes / 16);
#pragma unroll
            for (int part = 0; part < 2 * Tiling::kOwnRows; part++) {
                const int half = part % 2, own = part / 2;
                if (part == 2) codes.take(shared.stages[at.stage] + own_piece + Tiling::kGroupBytes);
                wgmma_wait<1>();  // the other half may be under way, this one's registers are free
                pin_registers(a[half][0]), pin_registers(a[half][1]);
                if (part == 1 && step > stretch.begin) give_back<Tiling>(&shared.empty[previous], group);
                operands_of<T>(a[half], codes, half);
                wgmma_fence();
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int k_step = 2 * half + i;
                    const bool adds = k_step > 0 || step > stretch.begin;
                    wgmma<Tiling::kTokens, T>(row_sums<Tiling>(sums, own), a[half][i], x + 2 * k_step, adds);
                }
                wgmma_commit();
            }
            previous = at.stage;
            at.advance();
        }
        Turns<Tiling>::pass(group.index);
        wgmma_wait<0>(sums);
#pragma unroll
        for (int i = 0; i < 4; i++) pin_registers(a[i / 2][i % 2]);
        __syncwarp();  // since they took the last stage's last codes
        give_back<Tiling>(&shared.empty[previous], group);
        scales.apply(row_sums<Tiling>(sums, 0));
        if constexpr (Tiling::kOwnRows > 1) {  // no registers are left for these before
            const Warpgroup rows{group.index, 1, group.thread};
            RowScales<Tiling>(weight, Tiling::place_of(stretch.tile), rows).apply(row_sums<Tiling>(sums, 1));
        }
    }
};

// x [M,K] tiled, weight [N,K] or gated [2N,K] in pieces; parts and counters as add_parts' (gemm_epilogue.cuh).
template <class Tiling>
__device__ __forceinline__ void gemm_wgmma_codes(const void *x, const void *weight,
                                                 const Epilogue<typename Tiling::L> &epilogue, float4 *parts,
                                                 uint32_t *counters) {
    gemm_wgmma<Tiling>(x, weight, epilogue, parts, counters, CodeSums<Tiling>{weight});
}
