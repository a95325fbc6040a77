// y[M,N] = act(x' Wᵀ + bias) + residual for M <= 16 tokens, x' = x or its norm: as fast as memory gives the weights.
//
//     block    a fair share of W's bands, one after the other         a band: kSide strips (16 rows) side by side
//     warp w   columns w, w + kWarps, … (64 of K each) of every band, copied kStages stages ahead of its products
//     cluster  of two blocks, of weights in codes as a rule: both take the same bands, and the second's warps stand
//              behind the first's, kWarps + w, … (gemv_split.cuh)
//
//          K ->   w0  w1  w2  w3  w0  w1  w2  w3              a stage: one column of a band; a ring of kStages in shared
//     band 0     [ 0 | 0 | 0 | 0 | 1 | 1 | 1 | 1 ]            memory for each warp, filled again as it is used, from one
//     band 1     [ 2 | 2 | 2 | 2 | 3 | 3 | 3 | 3 ]            band into the next: copies never stop
//
// At a band's end warps leave their sums in shared memory; one warp, another each time, adds them in the order of the
// warps, finishes and stores them, while copies for the next band are under way.
//
// Bytes: W once, x once a block (from L2), y. Operations: 2 M N K, on tensor cores that are idle nine tenths of the
// time at M = 8: nothing but memory counts. kWarps kStages kSide 2048 bytes are in flight in each block; at 4.8 TB/s and
// 0.8 µs an H200 needs 29 KiB an SM, of codes by bulk copies 80 to 100 (linear/gemv_cost.py: what was measured).
//
// Codes of a column of 64 rows lie side by side, column by column: a band of four strips is one stretch of memory, which
// the warps read in order, a band of fewer leaves gaps. An H200 was a third slower with the first half of each 4 KB, and
// half as slow again with a quarter.
//
// x comes beside the weights, or once for all bands: to the block (gemv_x.cuh), or to each warp what it multiplies itself
// (gemv_kept.cuh).
//
// The first ring of weights, and kAhead stages a warp beyond it (to L2), are asked for before the kernel in front has
// ended: memory works on while this one waits, and reads and normalises x, or merges what a deferred norm is made of. A
// kernel that reads x as it comes lets the next one in when it has asked for its own last weights: the total is the same,
// and memory would lie idle between the two. Where each block normalises x for itself the next one has more to do than to
// wait, and is let in at once (kEarly): so it was measured. So is it behind a kernel whose ring leaves its blocks no room.
#pragma once

#include "epilogue.cuh"
#include "gemv_digits.cuh"
#include "gemv_kept.cuh"
#include "gemv_norm.cuh"
#include "gemv_quant.cuh"
#include "gemv_ring.cuh"
#include "gemv_split.cuh"

// A GEMV `G` is what GemvX, GemvNorm and Epilogue ask for, and: Weight (gemv_weight.cuh), kSide, kStages, kBlocks, kAhead,
// what GemvRing asks for, kSplit: blocks that share bands, kEarly: whether the next kernel is let in at once, kDigits:
// whether x is multiplied in digits, and kKept: whether each warp keeps x of its own columns.
template <class G>
struct GemvOperands {
    const unsigned char *weight;
    const void *x;
    const float *norm_weight, *norm_bias;
    Epilogue<G> epilogue;
};

template <class G>
struct Gemv {
    using X = GemvX<G>;
    using Weight = typename G::Weight;
    using Ring = GemvRing<G>;
    using Digits = GemvDigits<G>;
    using DeferredNorm = GemvNorm<G>;

    static constexpr int kColumns = X::kColumns, kTokenTiles = X::kTokenTiles;
    static constexpr int kStoredStrips = 4 * tile_rows(G::kN, G::kGated);
    static constexpr int kBands = ceil_div(Epilogue<G>::kStrips, G::kSide);
    static constexpr int kSteps = kColumns / G::kDepth, kBeside = G::kSplit * G::kWarps;  // warps that share a band
    static constexpr int kGroups = ceil_div(kSteps, kBeside * G::kStages);  // of kStages steps of a warp, in a band
    static constexpr bool kWhole = kSteps == kGroups * kBeside * G::kStages;
    static constexpr int kStepBytes = kBeside * G::kDepth * Weight::kColumnStep;  // from a warp's step to its next
    static constexpr int kStepXBytes = kBeside * G::kDepth * X::kColumnStep;
    static constexpr int kFragments = G::kSide * kTokenTiles;  // of sums, in each warp
    static constexpr int kOwn = ceil_div(kSteps, kBeside) * G::kDepth;  // columns of a warp
    using Kept = GemvKept<G, kOwn, kBeside>;
    static constexpr bool kReady = G::kKept && !G::kDigits;                             // x is kept as f16
    static constexpr bool kMergedMeanwhile = G::kKept && G::kDigits && G::kDeferred;  // a norm's parts: while x comes
    static constexpr int kOwnBytes = G::kDigits ? Digits::kPartBytes : Kept::kBytes;  // of a warp whose x is kept
    static constexpr int kXBytes = G::kKept ? G::kWarps * kOwnBytes : G::kDigits ? Digits::kBytes : X::kBytes;
    static constexpr int kSums = G::kDigits ? 2 : 4;  // of a lane, in a fragment
    static constexpr int kBuffers = G::kBulk ? 1 : 2;  // what one takes is room for stages
    static constexpr int kSumsBytes = kBuffers * G::kWarps * kFragments * 32 * kSums * int(sizeof(float));
    using Split = GemvSplit<G::kSplit, kFragments>;

    using Sums = float[G::kSide][kTokenTiles][kSums];

    // A group of kStages steps of a warp, of kDepth columns each, and where a lane finds the weights and x of its first:
    // what follows is at constant distances, so that asking takes no arithmetic.
    struct Position {
        int band, group;
        const unsigned char *weights, *x;
    };

    // Shared memory: x, sums, the warps' rings and their barriers, what comes from the other block, then norms that are
    // deferred, or moments of a row's parts.
    const GemvOperands<G> &in;
    const int warp = warp_index();
    const int end = share(blockIdx.x / G::kSplit + 1);
    unsigned char *const shared = dynamic_shared();
    unsigned char *const rings = shared + kXBytes + kSumsBytes, *const barriers = rings + G::kWarps * Ring::kBytes;
    const Split split = {barriers + round_up(G::kWarps * Ring::kBarrierBytes, 16)};
    unsigned char *const behind_rings = split.place + Split::kBytes;
    Position next = at(share(blockIdx.x / G::kSplit), 0);  // the next to ask for
    Ring ring = {rings + warp * Ring::kBytes, reinterpret_cast<uint64_t *>(barriers + warp * Ring::kBarrierBytes)};

    __device__ unsigned char *own_x() const { return G::kKept ? shared + warp * kOwnBytes : shared; }
    __device__ float2 *norms() const { return reinterpret_cast<float2 *>(behind_rings); }

    static __device__ int share(int cluster) {
        return static_cast<int>(int64_t(cluster) * kBands / (G::kBlocks / G::kSplit));
    }

    __device__ int step(int group, int stage) const {
        return split.rank() * G::kWarps + warp + kBeside * (group * G::kStages + stage);
    }
    __device__ int place_of_x(int group, int stage) const {
        return G::kKept ? group * G::kStages + stage : step(group, stage);
    }
    __device__ bool is_step(int group, int stage) const { return kWhole || step(group, stage) < kSteps; }

    // The strips of a band lie side by side.
    static_assert(4 % G::kSide == 0, "a band is in one row of tiles");
    static_assert(kColumns % G::kDepth == 0 && G::kBlocks % G::kSplit == 0, "whole steps, and whole clusters");

    __device__ Position at(int band, int group) const {
        const int column = step(group, 0) * G::kDepth;
        const unsigned char *weights = in.weight + Weight::offset(band * G::kSide, column, kColumns);
        return {band, group, weights, static_cast<const unsigned char *>(in.x) + column * X::kColumnStep};
    }

    __device__ __forceinline__ void advance(Position &position) const {
        if (++position.group == kGroups) {
            position = at(position.band + 1, 0);
        } else {
            position.weights += G::kStages * kStepBytes;
            position.x += G::kStages * kStepXBytes;
        }
    }

    // Asks for the weights, or x, of one stage of a group.
    __device__ __forceinline__ void ask_weights(int stage) const {
        if (is_step(next.group, stage)) ring.ask_weights(stage, next.weights + stage * kStepBytes);
    }

    __device__ __forceinline__ void ask_x(const Position &position, int stage) const {
        if (is_step(position.group, stage)) ring.ask_x(stage, position.x + stage * kStepXBytes);
    }

    // The stages that follow the ring, to L2.
    __device__ void prefetch() const {
        Position position = next;
        advance(position);
        for (int i = 0; i < G::kAhead; i += G::kStages, advance(position)) {
            for (int stage = 0; stage < G::kStages && position.band < end; stage++) {
                if (!is_step(position.group, stage)) break;
                prefetch_piece<Ring::kWeightBytes>(position.weights + stage * kStepBytes);
            }
        }
    }

    __device__ void run() {
        if constexpr (G::kEarly) let_next_start();
        if (next.band == end) return;
        ring.start();
#pragma unroll
        for (int stage = 0; stage < G::kStages; stage++) ask_weights(stage);
        split.start();
        prefetch();
        in.epilogue.prefetch_constants(next.band * G::kSide, end * G::kSide);
        if constexpr (!G::kDeferred) NormInput<G>{nullptr, in.norm_weight, in.norm_bias}.prefetch();
        wait_for_previous();
        split.meet();
        bring_x();
#pragma unroll
        for (int stage = 0; stage < G::kStages; stage++) {
            ask_x(next, stage);
            ring.close();  // the first with all early weights, which have long been on their way
        }
        if constexpr (G::kDigits) {
            Digits::fill(own_x(), in.x, step(0, 0) * G::kDepth, [&] {
                if constexpr (kMergedMeanwhile) DeferredNorm::merge(norms(), in.epilogue.front.moments);
            });
        } else if constexpr (G::kSharedX) {
            X::fill(shared, in.x, in.norm_weight, in.norm_bias, reinterpret_cast<float *>(behind_rings));
        }
        if constexpr (G::kDeferred && !kMergedMeanwhile) DeferredNorm::merge(norms(), in.epilogue.front.moments);
        typename Kept::Units units;
        prepare_x(units);
        advance(next);
        const int begin = share(blockIdx.x / G::kSplit);
        for (int band = begin; band < end; band++) {
            const int turn = band - begin, mine = (warp + G::kWarps - turn * kFragments % G::kWarps) % G::kWarps;
            const Addends addends = read(band, mine);  // early, for it comes from far
            Sums sums = {};
#pragma unroll 1
            for (int group = 0; group < kGroups; group++, advance(next)) {
                if (!G::kEarly && next.band == end) let_next_start();
#pragma unroll
                for (int stage = 0; stage < G::kStages; stage++) {
                    ring.wait(stage, is_step(group, stage));
                    if (is_step(group, stage)) multiply(sums, stage, place_of_x(group, stage));
                    ring.release();
                    if (next.band < end) {
                        ask_weights(stage);
                        ask_x(next, stage);
                    }
                    ring.close();
                }
            }
            if constexpr (kReady) in_units(sums, units);
            finish(band, sums, turn, mine, addends);
        }
    }

    // x that is kept.
    __device__ void bring_x() const {
#ifdef LLMC_HAS_BULK_COPY
        if constexpr (kReady) {
            Kept::ask(own_x(), static_cast<const unsigned char *>(in.x), step(0, 0) * G::kDepth, ring.full + G::kStages);
        }
#endif
    }

    __device__ void prepare_x(typename Kept::Units &units) const {
#ifdef LLMC_HAS_BULK_COPY
        if constexpr (kReady) Kept::prepare(units, own_x(), step(0, 0) * G::kDepth, ring.full + G::kStages);
#endif
    }

    static __device__ __forceinline__ void in_units(Sums &sums, const typename Kept::Units &units) {
#pragma unroll
        for (int i = 0; i < kFragments; i++) {
            float(&sum)[kSums] = sums[i / kTokenTiles][i % kTokenTiles];
            const float2 unit = units[i % kTokenTiles];
            sum[0] *= unit.x, sum[1] *= unit.y, sum[2] *= unit.x, sum[3] *= unit.y;
        }
    }

    __device__ __forceinline__ void multiply(Sums &sums, int stage, int place) const {
        const unsigned char *slot = ring.slot(stage);
#pragma unroll
        for (int i = 0; i < G::kDepth; i++) {
            const unsigned char *x = slot + Ring::kWeightBytes + i * X::kSlotBytes;
            multiply_column(sums, slot + i * (G::kSide * Weight::kPieceBytes), x, place * G::kDepth + i);
        }
    }

    __device__ __forceinline__ void multiply_column(Sums &sums, const unsigned char *weights, const unsigned char *x_slot,
                                                    int column) const {
        if constexpr (G::kDigits) {
            typename Digits::Column x;
            Digits::take(x, own_x(), column);
            for_each_piece(weights, [&](int side, const Weight &weight) { multiply_digits(sums[side][0], weight, x); });
        } else if constexpr (kReady) {
            typename Kept::Column x;
            Kept::take(x, own_x(), column);
            for_each_piece(weights, [&](int side, const Weight &weight) { multiply_ready(sums[side], weight, x); });
        } else {
            typename X::Column x;
            if constexpr (G::kSharedX) {
                X::take_filled(x, shared, column);
            } else {
                X::take(x, x_slot);
            }
            const ColumnStart<typename G::T, Weight, kTokenTiles> start(x.chunks);
            for_each_piece(weights, [&](int side, const Weight &weight) {
                multiply_piece(sums[side], weight, x.chunks, start);
            });
        }
    }

    template <class Multiply>
    static __device__ __forceinline__ void for_each_piece(const unsigned char *slot, const Multiply &multiply) {
#pragma unroll
        for (int side = 0; side < G::kSide; side++) {
            Weight weight;
            weight.take(slot + side * Weight::kPieceBytes);
            multiply(side, weight);
        }
    }

    // What the sums of a fragment of a band need from memory before they are stored.
    struct Addends {
        typename Epilogue<G>::Addends addends;
        typename DeferredNorm::Rows rows;
        float scales[2];  // of rows g and g + 8
    };

    static __device__ int strip_of(int band, int fragment) { return band * G::kSide + fragment / kTokenTiles; }
    static __device__ int token_of(int fragment) { return fragment % kTokenTiles * 8; }

    // Whether there is such a fragment: the last band may be cut off.
    static __device__ bool is_fragment(int band, int fragment) {
        return fragment < kFragments && (G::kSide == 1 || strip_of(band, fragment) < Epilogue<G>::kStrips);
    }

    __device__ __forceinline__ Addends read(int band, int fragment) const {
        Addends read = {};
        if (!is_fragment(band, fragment)) return read;
        read.addends = in.epilogue.read(strip_of(band, fragment), token_of(fragment));
        read.rows = DeferredNorm::read(in.epilogue, strip_of(band, fragment));
        if constexpr (Weight::kRowScales) {
            const auto *scales = reinterpret_cast<const float *>(in.weight + Weight::offset(kStoredStrips, 0, kColumns));
            for (int i = 0; i < 2; i++) {
                read.scales[i] = scales[strip_of(band, fragment) * kStripRows + lane_index() / 4 + 8 * i];
            }
        }
        return read;
    }

    // A warp's sums of a fragment, as the epilogue wants them. In digits lane 4 g + t has left token t of rows g and g + 8,
    // so that those of tokens 2t and 2t + 1, of four, are neighbours.
    static __device__ __forceinline__ void add(float (&total)[4], const float *fragment) {
        const int lane = G::kDigits ? lane_index() / 4 * 4 + lane_index() % 2 * 2 : lane_index();
        const float4 part = *reinterpret_cast<const float4 *>(fragment + lane * kSums);
        total[0] += part.x, total[3] += part.w;
        total[1] += G::kDigits ? part.z : part.y;
        total[2] += G::kDigits ? part.y : part.z;
    }

    // Adds up the warps' sums and stores the results: fragments `mine`, + kWarps, …, of which the first one's addends are
    // here. Two buffers by turns: one barrier a band keeps them apart; of a single one the last band's sums must be read.
    __device__ __forceinline__ void finish(int band, const Sums &sums, int turn, int mine, Addends addends) const {
        constexpr int kFragment = 32 * kSums, kBuffer = G::kWarps * kFragments * kFragment;
        float *buffer = reinterpret_cast<float *>(shared + kXBytes) + turn % kBuffers * kBuffer;
        if constexpr (kBuffers == 1) {
            if (!G::kKept || turn > 0) named_barrier(1, 32 * G::kWarps);
        }
        split.expect(turn);
#pragma unroll
        for (int i = 0; i < kFragments; i++) {
            const float(&sum)[kSums] = sums[i / kTokenTiles][i % kTokenTiles];
            float *to = buffer + (warp * kFragments + i) * kFragment + lane_index() * kSums;
            if constexpr (G::kDigits) {
                *reinterpret_cast<float2 *>(to) = make_float2(sum[0], sum[1]);
            } else {
                *reinterpret_cast<float4 *>(to) = make_float4(sum[0], sum[1], sum[2], sum[3]);
            }
        }
        __syncthreads();
#pragma unroll
        for (int i = mine; i < kFragments; i += G::kWarps) {
            float total[4] = {};
            for (int w = 0; w < G::kWarps; w++) add(total, buffer + (w * kFragments + i) * kFragment);
            if (!split.owns(i)) {
                split.send(turn, i, total);
                continue;
            }
            split.receive(turn, i, total);  // of a band that is cut off too: what is sent must have come
            if (i != mine) addends = read(band, i);
            if (!is_fragment(band, i)) continue;
            if constexpr (Weight::kRowScales) {
                for (int j = 0; j < 4; j++) total[j] *= addends.scales[j / 2];
            }
            if constexpr (G::kDeferred) DeferredNorm::apply(total, norms(), token_of(i), addends.rows);
            if constexpr (G::kMoments) {
                DeferredNorm::write(in.epilogue, strip_of(band, i), token_of(i), total, addends.addends, addends.rows);
            } else {
                in.epilogue.write(strip_of(band, i), token_of(i), total, addends.addends);
            }
        }
    }
};

template <class G>
__device__ __forceinline__ void gemv(const GemvOperands<G> &operands) {
    Gemv<G>{operands}.run();
}
