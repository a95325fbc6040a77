// y[M,N] = act(x Wᵀ + bias) + residual with mma.sync, for any M on any GPU since sm_80.
//
// The same tiles, sums and epilogue as gemm_wgmma.cuh, but every thread fetches and multiplies: a block of two
// warpgroups owns 128 stored rows of W by kTokens tokens, a warp 16 rows of them.
//
//     stage s + kStages - 1   cp.async, 16 bytes a lane, in memory's order: conflict-free as it lies
//     stage s                 a k-step of 16: ldmatrix of 16 x 16 of W, or a quarter of a piece of codes, which a warp
//                             takes apart in registers; then kTokens/16 times 16 x 16 of x and two mma.m16n8k16 each
//
// Bytes and operations are those of gemm_wgmma.cuh.
#pragma once

#include "gemm_codes.cuh"
#include "gemm_epilogue.cuh"
#include "gemv_quant.cuh"

constexpr int kMmaThreads = 256;

// Shared memory of a block.
template <class Tiling>
struct MmaShared {
    unsigned char stages[Tiling::kStages][Tiling::kStageBytes];
    float staging[Tiling::kGroups][kStagedFloats<typename Tiling::L>];
    float2 norms[kNormedTokens<Tiling>];
    uint32_t arrived[Tiling::kGroups];
};

// The block's share of a stage's copies: chunk by chunk, the threads side by side.
template <class Tiling>
struct Fetcher {
    MmaShared<Tiling> &shared;
    const void *x, *weight;

    __device__ void copy(unsigned char *to, const unsigned char *from, int n_chunks) const {
        for (int chunk = threadIdx.x; chunk < n_chunks; chunk += kMmaThreads) {
            cp_async_16(to + chunk * 16, from + chunk * 16);
        }
    }

    __device__ void copy_weight(int stage, const Stretch &now) const {
        const Place place = Tiling::place_of(now.tile);
        for (int group = 0; group < Tiling::tile_rows_at(place); group++) {
            const unsigned char *from = Tiling::weight_at(weight, place, group, now.begin);
            copy(shared.stages[stage] + group * Tiling::kGroupBytes, from, Tiling::kGroupBytes / 16);
        }
    }

    __device__ void copy_x(int stage, const Stretch &now) const {
        const Place place = Tiling::place_of(now.tile);
        unsigned char *to = shared.stages[stage] + Tiling::kWeightBytes;
        copy(to, Tiling::x_at(x, place, now.begin, 0), Tiling::tokens_at(place) * 8);
    }
};

// Adds 16 of K, which a holds of the weight, to a warp's sums.
template <class Tiling>
__device__ __forceinline__ void multiply_step(float (&sums)[Tiling::kSums], const uint32_t (&a)[4],
                                              const unsigned char *stage, int k_step) {
    const int lane = lane_index(), matrix = lane / 8, row = lane % 8;
    const unsigned char *b_row = stage + Tiling::kWeightBytes + (matrix / 2 * 8 + row) * 128;
#pragma unroll
    for (int pair = 0; pair < Tiling::kTokens / 16; pair++) {
        uint32_t b[4];
        ldmatrix_x4(b, b_row + pair * 2048 + ((2 * k_step + matrix % 2) ^ row) * 16);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float (&d)[4] = *reinterpret_cast<float (*)[4]>(&sums[(2 * pair + half) * 4]);
            const uint32_t b_half[2] = {b[2 * half], b[2 * half + 1]};
            mma_16816<typename Tiling::L::T>(d, a, b_half);
        }
    }
}

// Adds a stage's 64 of K to a warp's sums.
template <class Tiling>
__device__ __forceinline__ void multiply_stage(float (&sums)[Tiling::kSums], const unsigned char *stage, int warp) {
    using Weight = typename Tiling::L::Weight;
    if constexpr (Weight::kByChunks) {
        const int lane = lane_index(), matrix = lane / 8, row = lane % 8;
        const unsigned char *a_row = stage + (warp * 16 + matrix % 2 * 8 + row) * 128;
#pragma unroll
        for (int k_step = 0; k_step < 4; k_step++) {
            uint32_t a[4];
            ldmatrix_x4(a, a_row + ((2 * k_step + matrix / 2) ^ row) * 16);
            multiply_step<Tiling>(sums, a, stage, k_step);
        }
    } else {
        Weight codes;
        codes.take(stage + warp * Weight::kPieceBytes);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t a[2][4];
            operands_of<typename Tiling::L::T>(a, codes, half);
#pragma unroll
            for (int i = 0; i < 2; i++) multiply_step<Tiling>(sums, a[i], stage, 2 * half + i);
        }
    }
}

// Operands as gemm_wgmma()'s.
template <class Tiling>
__device__ __forceinline__ void gemm_mma(const void *x, const void *weight,
                                         Epilogue<typename Tiling::L> epilogue, float4 *parts, uint32_t *counters) {
    static_assert(Tiling::kTokens % 16 == 0 && Tiling::kTokens <= 128, "pairs of fragments; sums that registers hold");
    using Shared = MmaShared<Tiling>;
    using Walk = Steps<typename Tiling::W>;
    Shared &shared = *reinterpret_cast<Shared *>(dynamic_shared());
    const Fetcher<Tiling> fetcher{shared, x, weight};
    let_next_start();
    prefetch_constants<Tiling, kMmaThreads>(epilogue, threadIdx.x);

    constexpr int kAhead = Tiling::kStages - 1;
    Walk early(Tiling::worker()), ahead(Tiling::worker());
    for (int stage = 0; stage < kAhead && early.any; stage++, early.advance()) fetcher.copy_weight(stage, early.now);
    wait_for_previous();
    for (int stage = 0; stage < kAhead; stage++) {
        if (ahead.any) fetcher.copy_x(stage, ahead.now), ahead.advance();
        cp_async_commit();
    }
    if constexpr (Tiling::L::kNorm != Norm::none) {  // the loop's barriers come before they are read
        merge_norms<Tiling, kMmaThreads>(shared.norms, epilogue.front.moments, shared.staging[0], threadIdx.x);
        epilogue.front.norms = shared.norms;
    }

    const int warp = warp_index();
    const Warpgroup group{warp / 4, warp / 4, int(threadIdx.x) % 128};
    int stage = 0;
    typename Tiling::W work(Tiling::worker());
    for (Stretch stretch; work.next(stretch);) {
        const RowScales<Tiling> scales(weight, Tiling::place_of(stretch.tile), group);
        float sums[Tiling::kSums];
#pragma unroll
        for (int i = 0; i < Tiling::kSums; i++) sums[i] = 0;
        for (int step = stretch.begin; step < stretch.end; step++) {
            cp_async_wait<kAhead - 1>();
            __syncthreads();  // this stage has come for all, and all are done with the one before
            const int free_stage = stage == 0 ? Tiling::kStages - 1 : stage - 1;
            if (ahead.any) {
                fetcher.copy_weight(free_stage, ahead.now);
                fetcher.copy_x(free_stage, ahead.now);
                ahead.advance();
            }
            cp_async_commit();
            multiply_stage<Tiling>(sums, shared.stages[stage], warp);
            stage = stage + 1 == Tiling::kStages ? 0 : stage + 1;
        }
        scales.apply(sums);
        if (!completes<Tiling>(sums, stretch, group, &shared.arrived[group.index], parts, counters)) continue;
        TileEnd<Tiling, false>(Tiling::place_of(stretch.tile), group, epilogue).store(sums, shared.staging[group.index]);
    }
}
