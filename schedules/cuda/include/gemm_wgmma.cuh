// y[M,N] = act(x Wᵀ + bias) + residual on Hopper's tensor cores, for any M.
//
// The weight is the left matrix of wgmma: a block owns 128 stored rows of it, 64 a warpgroup, times kTokens tokens. Few
// tokens make a narrow product, and the weights stream by as fast as memory gives them; many tokens make a tile of
// 128 x 256 sums in registers. x and W lie in memory as wgmma reads them from shared memory, so that plain copies of
// 8 KiB and more fill a ring of stages, each 64 of K:
//
//     warpgroup 0    producer   one thread; W's stages before the kernel in front has ended, x's after it
//                    the others: constants to L2; what a norm in front comes to for each token (gemm_norm.cuh), of
//                    many tokens while each tile is multiplied
//     warpgroup 1    rows 0-63      | one wait for "full" a stage, four wgmma m64n{kTokens}k16 back to back;
//     warpgroup 2    rows 64-127    | a stage is given back when the next one's products are under way
//                    (or both the same 64 rows, and half of K each; or each its own tiles, in turns: gemm_tile.cuh)
//
// Two blocks may form a cluster, on the same tokens and neighbouring rows: each fetches half of x's part of a stage for
// both, and a stage is filled again when the warps of both have given it back.
//
// Bytes: W once for each of ceil(M / kTokens) rounds, from L2 after the first; x once for each 128 rows of W, or 256 of
// a cluster's, from L2. A step of 128 x 256 asks L2 for 48 KiB, in a cluster for 32, while it multiplies for 0.7 µs.
// Operations: 2 M N K. Few tokens are bound by memory: 16 KiB of W a stage and block, 2 M 128 64 operations for it.
#pragma once

#include "gemm_quick_end.cuh"
#include "gemm_turns.cuh"
#include "gemv_weight.cuh"

// Shared memory of a block.
template <class Tiling>
struct WgmmaShared {
    unsigned char stages[Tiling::kStages][Tiling::kStageBytes];
    float staging[Tiling::kGroups][kStagedFloats<typename Tiling::L>];
    uint64_t full[Tiling::kStages], empty[Tiling::kStages];
    float2 norms[kNormedTokens<Tiling>];  // at a multiple of 16 bytes, as all before it are
    uint64_t normed[kTileNorms<Tiling> ? 4 : 1];  // TileNorms' barriers, or that all are there
    uint32_t arrived[Tiling::kGroups];
};

constexpr int kOtherThreads = 96;  // of the producer's warpgroup
constexpr int kFreeBarrier = kNormBarrier + 1, kThereBarrier = kFreeBarrier + 1;

// Sums of few tokens take few registers: enough are left to read early what is added to them last, and for the launch
// behind, whose blocks come beside this one's if they are a norm's, so that the product behind that can be let in.
template <class Tiling>
constexpr bool kFewTokens = Tiling::kSums <= 32;

// So are of a quick end, of which nothing hides that it waits if a tile is both warpgroups'.
template <class Tiling>
constexpr bool kReadsEarly = kFewTokens<Tiling> || (Tiling::kQuick && !Tiling::kTurns);

// How 64 rows of a tile end, or all of what appends (gemm_append.cuh, which only kernels of that kind include).
template <class Tiling, bool kEarly>
struct AppendEnd;
enum class End { plain, quick, appends };
template <class Tiling>
constexpr End kEnd = kAppends<typename Tiling::L> ? End::appends : Tiling::kQuick ? End::quick : End::plain;

template <class Tiling, bool kEarly, End = kEnd<Tiling>>
struct EndOf {
    using Type = TileEnd<Tiling, kEarly>;
};
template <class Tiling, bool kEarly>
struct EndOf<Tiling, kEarly, End::quick> {
    using Type = QuickEnd<Tiling, kEarly>;
};
template <class Tiling, bool kEarly>
struct EndOf<Tiling, kEarly, End::appends> {
    using Type = AppendEnd<Tiling, kEarly>;
};

// A position in the ring: which stage, and the parity of the round it is in.
template <int kStages>
struct RingPosition {
    int stage = 0;
    uint32_t parity = 0;

    __device__ void advance() {
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
    __device__ void pass(int n) {
        stage += n;
        parity ^= stage / kStages & 1;
        stage %= kStages;
    }
};

// Fills the ring, in one thread: W as far ahead as the ring reaches, then x behind it.
template <class Tiling>
struct Producer {
    using Walk = Steps<typename Tiling::W>;

    WgmmaShared<Tiling> &shared;
    const void *x, *weight;

    __device__ void copy_weight(int stage, const Stretch &now) const {
        const Place place = Tiling::place_of(now.tile);
        const int n_groups = Tiling::kAlong ? Tiling::kGroups : Tiling::tile_rows_at(place);
        const int n_x_bytes = Tiling::kHalves * Tiling::tokens_at(place) * kRowBytes;
        mbarrier_arrive_expect(&shared.full[stage], n_groups * Tiling::kGroupBytes + n_x_bytes);
        for (int group = 0; group < n_groups; group++) {
            const unsigned char *from = Tiling::weight_at(weight, place, group, now.begin);
            unsigned char *to = shared.stages[stage] + group * Tiling::kGroupBytes;
            if constexpr (Tiling::n_token_tiles == 1) {  // nobody reads it again
                bulk_copy_streaming(to, from, Tiling::kGroupBytes, &shared.full[stage]);
            } else {
                bulk_copy(to, from, Tiling::kGroupBytes, &shared.full[stage]);
            }
        }
    }

    __device__ void copy_x(int stage, const Stretch &now) const {
        const Place place = Tiling::place_of(now.tile);
        unsigned char *to = shared.stages[stage] + Tiling::kWeightBytes;
        const int n_tokens = Tiling::tokens_at(place);
        if constexpr (Tiling::kCluster == 1) {
            for (int half = 0; half < Tiling::kHalves; half++) {
                const unsigned char *from = Tiling::x_at(x, place, now.begin, half);
                bulk_copy(to + half * Tiling::kXBytes, from, n_tokens * kRowBytes, &shared.full[stage]);
            }
        } else {  // this block's share, whole swizzled 8 rows, to all
            static_assert(Tiling::kHalves == 1, "of a cluster");
            const unsigned char *from = Tiling::x_at(x, place, now.begin, 0);
            const int share = round_up(ceil_div(n_tokens, Tiling::kCluster), 8), begin = Tiling::rank() * share;
            const int n_bytes = min(share, n_tokens - begin) * kRowBytes, offset = begin * kRowBytes;
            if (n_bytes <= 0) return;
            bulk_copy_multicast(to + offset, from + offset, n_bytes, &shared.full[stage], (1 << Tiling::kCluster) - 1);
        }
    }

    // Stages whose W is under way.
    __device__ int run_ahead() const {
        int n_early = 0;
#pragma unroll 1
        for (Walk ahead(Tiling::worker()); ahead.any && n_early < Tiling::kStages; ahead.advance()) {
            copy_weight(n_early++, ahead.now);
        }
        return n_early;
    }

    // n_early: as run_ahead() says. From here on other blocks of the cluster are reached into.
    __device__ void run(int n_early) const {
        wait_for_previous();
        RingPosition<Tiling::kStages> at;
#pragma unroll 1
        for (Walk walk(Tiling::worker()); walk.any; walk.advance(), at.advance()) {
            if (n_early > 0) {
                n_early--;
            } else {
                wait_empty(at);
                copy_weight(at.stage, walk.now);
            }
            copy_x(at.stage, walk.now);
        }
        if constexpr (Tiling::kCluster > 1) {  // stay until the other block's warps have given back this one's stages
            for (int i = 0; i < Tiling::kStages; i++, at.advance()) wait_empty(at);
        }
    }

    __device__ void wait_empty(const RingPosition<Tiling::kStages> &at) const {
        mbarrier_wait(&shared.empty[at.stage], at.parity ^ 1);
    }
};

// One warp's word that it has done with a stage, to all who fill it.
template <class Tiling>
__device__ __forceinline__ void give_back(uint64_t *empty, const Warpgroup &group) {
    const int lane = group.thread % 32;
    if constexpr (Tiling::kCluster == 1) {
        if (lane == 0) mbarrier_arrive(empty);
    } else {
        if (lane < Tiling::kCluster) mbarrier_arrive_in(empty, lane);
    }
}

// The sums of a warpgroup's `own`-th 64 rows.
template <class Tiling>
__device__ __forceinline__ float (&row_sums(float (&sums)[Tiling::kSums], int own))[Tiling::kRowSums] {
    return reinterpret_cast<float (&)[Tiling::kRowSums]>(sums[own * Tiling::kRowSums]);
}

// Where a warpgroup's x is in a stage.
template <class Tiling>
__device__ __forceinline__ unsigned char *x_of(unsigned char *stage, const Warpgroup &group) {
    return stage + Tiling::kWeightBytes + (Tiling::kAlong ? group.index * Tiling::kXBytes : 0);
}

// Sums a stretch of a tile into `sums`, giving back each stage once its products are done.
template <class Tiling>
__device__ void sum_stretch(float (&sums)[Tiling::kSums], const Stretch &stretch, const Warpgroup &group,
                            WgmmaShared<Tiling> &shared, RingPosition<Tiling::kStages> &at) {
    const uint64_t rows = k_major_descriptor(shared.stages[0] + group.part * kTileBytes);
    const uint64_t tokens = k_major_descriptor(x_of<Tiling>(shared.stages[0], group));
    int previous = 0;
    for (int step = stretch.begin; step < stretch.end; step++) {
        mbarrier_wait(&shared.full[at.stage], at.parity);
        const uint64_t stage = at.stage * (Tiling::kStageBytes / 16);  // descriptors count in 16 bytes, k-steps in 32
        wgmma_fence();
#pragma unroll
        for (int k_step = 0; k_step < 4; k_step++) {
            const uint64_t offset = stage + 2 * k_step;
            const bool adds = k_step > 0 || step > stretch.begin;
#pragma unroll
            for (int own = 0; own < Tiling::kOwnRows; own++) {
                const uint64_t a = rows + offset + own * (kTileBytes / 16);
                wgmma<Tiling::kTokens, typename Tiling::L::T>(row_sums<Tiling>(sums, own), a, tokens + offset, adds);
            }
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (step > stretch.begin) give_back<Tiling>(&shared.empty[previous], group);
        previous = at.stage;
        at.advance();
    }
    Turns<Tiling>::pass(group.index);
    wgmma_wait<0>(sums);
    give_back<Tiling>(&shared.empty[previous], group);
}

// The second warpgroup's sums of a tile, to the first, where both share K: through the memory where results are staged,
// which the first has not begun to use, and does not use before it has read them. Whoever would do with arriving waits
// too, and is no later for it: the first needs what the second writes in between, and is there before it. So that
// racecheck, which does not know what an arrival orders, follows.
template <class Tiling>
__device__ __forceinline__ void hand_over(const float (&sums)[Tiling::kSums], float *exchange, int thread) {
    named_barrier(kFreeBarrier, 256);
#pragma unroll
    for (int i = 0; i < Tiling::kSums; i++) exchange[128 * i + thread] = sums[i];
    named_barrier(kThereBarrier, 256);
}

template <class Tiling>
__device__ __forceinline__ void take_over(float (&sums)[Tiling::kSums], const float *exchange, int thread) {
    static_assert(128 * Tiling::kSums <= Tiling::kGroups * kStagedFloats<typename Tiling::L>, "they fit");
    named_barrier(kFreeBarrier, 256);
    named_barrier(kThereBarrier, 256);
#pragma unroll
    for (int i = 0; i < Tiling::kSums; i++) sums[i] += exchange[128 * i + thread];
}

// The way to sum a stretch of a weight in tiles. (gemm_wgmma_codes.cuh has another, for quantised weights.)
template <class Tiling>
struct TileSums {
    __device__ __forceinline__ void operator()(float (&sums)[Tiling::kSums], const Stretch &stretch,
                                               const Warpgroup &group, WgmmaShared<Tiling> &shared,
                                               RingPosition<Tiling::kStages> &at) const {
        sum_stretch<Tiling>(sums, stretch, group, shared, at);
    }
};

// The ring's barriers, and of a cluster the first half of its own.
template <class Tiling>
__device__ __forceinline__ void prepare(WgmmaShared<Tiling> &shared) {
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < Tiling::kStages; stage++) {
            mbarrier_init(&shared.full[stage], 1);
            mbarrier_init(&shared.empty[stage], 4 * Tiling::kReaders * Tiling::kCluster);  // a warp gives back for itself
        }
        for (int i = 0; i < (kTileNorms<Tiling> ? 2 : 1); i++) mbarrier_init(&shared.normed[i], kOtherThreads);
        for (int i = 2; kTileNorms<Tiling> && i < 4; i++) mbarrier_init(&shared.normed[i], 4 * Tiling::kReaders);
        fence_mbarrier_init();
    }
    __syncthreads();
    if constexpr (Tiling::kCluster > 1) cluster_arrive();
}

// Norms of each tile that the block sums, or of which it sums a part.
template <class Tiling>
__device__ __forceinline__ void merge_norms_of_tiles(WgmmaShared<Tiling> &shared, const float2 *parts) {
    const TileNorms<Tiling> norms{shared.norms, shared.normed};
    typename Tiling::W work(Tiling::worker());
    int n = 0;
#pragma unroll 1
    for (Stretch stretch; work.next(stretch); norms.fill(n++)) {
        norms.wait_for_place(n);
        const int first_token = Tiling::place_of(stretch.tile).token;
        merge_tile_norms<Tiling, kOtherThreads>(norms.place(n), parts, first_token, threadIdx.x - 32);
    }
}

// What the first warpgroup does: one thread fills the ring; the other warps ask for what the end of a tile reads, and
// merge the moments of a norm.
template <class Tiling>
__device__ __forceinline__ void supply(WgmmaShared<Tiling> &shared, const void *x, const void *weight,
                                       const Epilogue<typename Tiling::L> &epilogue) {
    const bool other = warp_index() > 0, fetches = warp_index() == 0 && elect_one();
    if (other) prefetch_constants<Tiling, kOtherThreads>(epilogue, threadIdx.x - 32);
    const Producer<Tiling> producer{shared, x, weight};
    const int n_early = fetches ? producer.run_ahead() : 0;
    if constexpr (Tiling::kCluster > 1) {
        __syncwarp();
        cluster_wait();
    }
    if (fetches) producer.run(n_early);
    if constexpr (Tiling::L::kNorm != Norm::none) {
        if (other) {
            wait_for_previous();  // for the moments
            if constexpr (kTileNorms<Tiling>) {
                merge_norms_of_tiles(shared, epilogue.front.moments);
            } else {
                merge_norms<Tiling, kOtherThreads>(shared.norms, epilogue.front.moments, shared.staging[0],
                                                  threadIdx.x - 32);
                mbarrier_arrive(&shared.normed[0]);
            }
        }
    }
}

// end: of the warpgroup's first 64 rows, or of all of them. staging: the warpgroup's, or of all who end the tile.
template <class Tiling, class First>
__device__ __forceinline__ void end_tile(First &end, float (&sums)[Tiling::kSums], const Place &place,
                                         const Warpgroup &group, const Epilogue<typename Tiling::L> &epilogue,
                                         float *staging) {
    if constexpr (kEnd<Tiling> == End::appends) {
        end.store(sums, staging);
    } else {
        end.store(row_sums<Tiling>(sums, 0), staging);
#pragma unroll
        for (int own = 1; own < Tiling::kOwnRows; own++) {
            const Warpgroup rows{group.index, own, group.thread};
            typename EndOf<Tiling, false>::Type(place, rows, epilogue).store(row_sums<Tiling>(sums, own), staging);
        }
    }
}

// x [M,K] tiled, weight [N,K] or gated [2N,K] in tiles; parts and counters as add_parts' (gemm_epilogue.cuh).
template <class Tiling, class Sum = TileSums<Tiling>>
__device__ __forceinline__ void gemm_wgmma(const void *x, const void *weight,
                                           Epilogue<typename Tiling::L> epilogue, float4 *parts,
                                           uint32_t *counters, const Sum &sum = {}) {
    constexpr bool kNorms = Tiling::L::kNorm != Norm::none;
    using Shared = WgmmaShared<Tiling>;
    Shared &shared = *reinterpret_cast<Shared *>(dynamic_shared());
    prepare(shared);
    let_next_start();

    if (warp_index() < 4) {
        if constexpr (!kFewTokens<Tiling>) set_max_registers_down<40>();
        supply(shared, x, weight, epilogue);
    } else {
        if constexpr (!kFewTokens<Tiling>) set_max_registers_up<232>();
        if constexpr (Tiling::kCluster > 1) cluster_wait();
        wait_for_previous();
        epilogue.front.norms = shared.norms;
        const TileNorms<Tiling> norms{shared.norms, shared.normed};
        const int index = warp_index() / 4 - 1;
        const Warpgroup group{index, Tiling::kTurns ? 0 : index, int(threadIdx.x) % 128};
        Turns<Tiling> turns{index};
        RingPosition<Tiling::kStages> at;
        typename Tiling::W work(Tiling::worker());
        float *const staging = shared.staging[kJoint<Tiling> ? 0 : group.index];
        uint32_t *const arrived = &shared.arrived[kJoint<Tiling> ? 0 : group.index];
        turns.begin();
        for (Stretch stretch; work.next(stretch);) {
            if (!turns.take()) {
                at.pass(stretch.end - stretch.begin);
                continue;
            }
            float sums[Tiling::kSums];
            if (Tiling::kAlong && group.index == 1) {
                sum(sums, stretch, group, shared, at);
                if constexpr (kNorms) mbarrier_wait(&shared.normed[0], 0);  // it is made in the same memory
                hand_over<Tiling>(sums, shared.staging[0], group.thread);
                continue;
            }
            const Place place = Tiling::place_of(stretch.tile);
            typename EndOf<Tiling, kReadsEarly<Tiling>>::Type end(place, group, epilogue);
            sum(sums, stretch, group, shared, at);
            if constexpr (Tiling::kAlong) take_over<Tiling>(sums, shared.staging[0], group.thread);
            if constexpr (kTileNorms<Tiling>) {
                uint32_t worker[1] = {uint32_t(Tiling::worker())};
                pin_registers(worker);  // or what follows is worked out before the loop, and kept
                epilogue.front.norms = norms.wait(Tiling::W::stretches_before(int(worker[0]), stretch.tile));
            } else if constexpr (kNorms) {
                mbarrier_wait(&shared.normed[0], 0);  // once it has been, it stays so
            }
            if (completes<Tiling>(sums, stretch, group, arrived, parts, counters)) {
                end_tile<Tiling>(end, sums, place, group, epilogue, staging);
            }
            if constexpr (kTileNorms<Tiling>) norms.give_back(epilogue.front.norms);
        }
        turns.end();
    }
}
