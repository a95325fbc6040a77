// The stages that a warp has on their way: kStages of them, each filled again when it has been multiplied.
//
//     by lanes      cp.async, 16 bytes at a time, in the order in which they are waited for
//     in bulk       one copy for the weights of a stage and one for x, by one lane; a barrier for each stage counts bytes
//
// A warp whose lanes copied had about eight copies on their way, however long its ring was: so it was measured on an H200,
// where half as many warps with twice the ring were as slow. Bulk copies are another unit's, and as many as are asked for.
#pragma once

#include "gemv_weight.cuh"

// A GEMV `G` also says kSide, kStages, kDepth: columns of a stage, and kBulk: weights in codes, which lie as their lanes
// read them.
template <class G>
struct GemvRing {
    using X = GemvX<G>;
    using Weight = typename G::Weight;

    static_assert(!G::kBulk || !Weight::kByChunks, "pieces are copied as they lie");
    static_assert(G::kDepth == 1 || G::kSide == 4, "only whole columns are neighbours");
    static constexpr int kPieces = G::kDepth * G::kSide, kWeightBytes = kPieces * Weight::kPieceBytes;
    static constexpr int kStageBytes = kWeightBytes + G::kDepth * X::kSlotBytes;
    static constexpr int kBytes = G::kStages * kStageBytes;                 // of a warp
    static constexpr int kBarriers = G::kBulk ? G::kStages + G::kKept : 0;  // of a warp; the last is of an x that is kept
    static constexpr int kBarrierBytes = 8 * kBarriers;

    unsigned char *const stages;
    uint64_t *const full;
    uint32_t parities = 0;  // of the phases to be waited for, a bit for each stage

    __device__ void start() const {
#ifdef LLMC_HAS_BULK_COPY
        if constexpr (G::kBulk) {
            if (lane_index() == 0) {
                for (int i = 0; i < kBarriers; i++) mbarrier_init(full + i, 1);
                fence_mbarrier_init();
            }
            __syncwarp();
        }
#endif
    }

    __device__ __forceinline__ unsigned char *slot(int stage) const { return stages + stage * kStageBytes; }

    __device__ __forceinline__ void ask_weights(int stage, const unsigned char *from) const {
#ifdef LLMC_HAS_BULK_COPY
        if constexpr (G::kBulk) {
            if (lane_index() == 0) {
                mbarrier_arrive_expect(full + stage, kStageBytes);  // x too, which may be asked for later
                bulk_copy_streaming(slot(stage), from, kWeightBytes, full + stage);
            }
            return;
        }
#endif
#pragma unroll
        for (int piece = 0; piece < kPieces; piece++) {
            Weight::ask(slot(stage) + piece * Weight::kPieceBytes, from + piece * Weight::kPieceBytes);
        }
    }

    __device__ __forceinline__ void ask_x(int stage, const unsigned char *from) const {
        if constexpr (!G::kSharedX && !G::kKept) {
#pragma unroll
            for (int i = 0; i < G::kDepth; i++) ask_column_of_x(stage, i, from + i * X::kColumnStep);
        }
    }

    // What was asked for since is one stage's.
    __device__ __forceinline__ void close() const {
        if constexpr (!G::kBulk) cp_async_commit();
    }

    // Waits for the stage; `some`: whether it was asked for.
    __device__ __forceinline__ void wait(int stage, bool some) {
        if constexpr (!G::kBulk) cp_async_wait<G::kStages - 1>();
#ifdef LLMC_HAS_BULK_COPY
        if constexpr (G::kBulk) {
            if (!some) return;
            mbarrier_wait(full + stage, parities >> stage & 1);
            parities ^= 1u << stage;
        }
#endif
    }

    // What the lanes read of a stage is read: it may be asked for again.
    __device__ __forceinline__ void release() const {
        constexpr bool kRowsOfX = X::kSlotBytes > 0 && !Weight::kByChunks;
        if constexpr (G::kBulk || Weight::kGroupScales || kRowsOfX) __syncwarp();  // lanes copy for others
    }

  private:
    __device__ __forceinline__ void ask_column_of_x(int stage, int i, const unsigned char *from) const {
        unsigned char *to = slot(stage) + kWeightBytes + i * X::kSlotBytes;
#ifdef LLMC_HAS_BULK_COPY
        if constexpr (G::kBulk) {
            if (lane_index() == 0) bulk_copy(to, from, X::kSlotBytes, full + stage);
            return;
        }
#endif
        X::ask(to, from);
    }
};
