// Experts of a few tokens, in two kernels that read the weights of chosen experts once each, as fast as memory gives them:
//
//     gate_up   inner[a][m] = share · act(x[m] Wgᵀ) · (x[m] Wuᵀ)    of the a-th chosen expert, in the order of numbers;
//                                                                    0 where token m did not choose it
//     down      y[m] = Σ_a inner[a][m] Wdᵀ [+ residual]              (kJoined)
//
// Experts' biases (kBias) join where sums leave: those of gate and up before the gate, those of down times the shares.
//
//     unit     of gate_up a band of one expert; of down a band of all: kSide strips (16 rows) side by side
//     block    a fair share of the units that there are, one after the other
//     warp w   columns w, w + kWarps, … (64 of K each) of a unit's expert, then of its next one
//
// All tokens go through every chosen expert: a product takes eight at a time anyway, and nothing has to be sorted. What a
// warp adds up does not depend on which other experts there are, since it begins with the same column of each, and zeros
// change no sum: a token has the same bits whoever its neighbours are.
//
// Rings, pieces and x are those of gemv.cuh; a ring goes on from one expert's weight into the next one's, whose columns may
// be few. Which experts were chosen is known when the launches in front have ended, and each block finds it out for itself.
//
// Bytes: weights of the chosen experts once; x, or inner, once a block, from L2. Operations: nothing but memory counts.
#pragma once

#include "epilogue.cuh"
#include "experts_table.cuh"
#include "gemv_mxfp4.cuh"
#include "gemv_ring.cuh"
#include "gemv_zeros.cuh"

// `G` is what GemvX, GemvRing and Epilogue ask for, and: kExperts, kChosen: of a token, kExpertBytes: of one's weight,
// kBlocks, kJoined.
template <class G>
struct ExpertsGemv {
    using X = GemvX<G>;
    using Weight = typename G::Weight;
    using Ring = GemvRing<G>;

    static constexpr int kPairs = G::kM * G::kChosen, kActive = G::kExperts < kPairs ? G::kExperts : kPairs;
    static constexpr int kWords = ceil_div(G::kExperts, 32), kThreads = 32 * G::kWarps;
    static constexpr int kColumns = X::kColumns, kTokenTiles = X::kTokenTiles, kFragments = G::kSide * kTokenTiles;
    static constexpr int kStoredStrips = 4 * tile_rows(G::kN, G::kGated);
    static constexpr int kBands = ceil_div(Epilogue<G>::kStrips, G::kSide);
    static constexpr bool kShares = !G::kJoined || G::kBias;  // whether blocks have to know them
    static constexpr bool kScaledApart = G::kJoined && Weight::kRowScales;  // each expert's sums have scales of their own
    static constexpr int kSumsBytes = G::kWarps * kFragments * 512;
    static constexpr int64_t kExpertXBytes = int64_t(kColumns) * X::kColumnStep;  // of inner
    static_assert(G::kWarps <= kColumns && 4 % G::kSide == 0, "each warp has a column, and a band lies in one row of tiles");

    using Sums = float[G::kSide][kTokenTiles][4];

    // Who was chosen: experts in the order of their numbers, and each token's share of each, 0 if it did not choose it.
    struct Chosen {
        uint32_t bits[kWords];
        int of_pair[kPairs];
        int n, experts[kActive];
        float shares[kShares ? kActive : 1][G::kM];

        __device__ bool has(int expert) const { return bits[expert / 32] >> expert % 32 & 1; }

        // How many with lower numbers there are.
        __device__ int place_of(int expert) const {
            int place = __popc(bits[expert / 32] & ((1u << expert % 32) - 1));
            for (int i = 0; i < expert / 32; i++) place += __popc(bits[i]);
            return place;
        }
    };

    // Where a warp is: column `i` of its own of the a-th expert, in a unit.
    struct Position {
        int unit, a, i;
    };

    const unsigned char *const weight;
    const void *const x;
    const long long *const index;
    const float *const share;     // if kShares
    const float *const residual;  // of down, if kResidual
    typename G::Y *const y;
    const float *const bias;      // [kExperts][kN], of gate_up [kExperts][2 kN], if kBias
    const int warp = warp_index();
    const int own = (kColumns - warp + G::kWarps - 1) / G::kWarps;  // columns of an expert that this warp has
    unsigned char *const shared = dynamic_shared();
    unsigned char *const rings = shared + X::kBytes + kSumsBytes, *const barriers = rings + G::kWarps * Ring::kBytes;
    Ring ring = {rings + warp * Ring::kBytes, reinterpret_cast<uint64_t *>(barriers + warp * Ring::kBarrierBytes)};
    int end = 0;                                   // of this block's units
    Position next = {};                            // the next to ask for
    const unsigned char *next_weights = nullptr, *next_x = nullptr;

    static __device__ Chosen &chosen() {
        __shared__ Chosen found;
        return found;
    }

    static __device__ void choose(const long long *index, const float *share) {
        Chosen &found = chosen();
        for (int i = threadIdx.x; i < kWords; i += kThreads) found.bits[i] = 0;
        for (int i = threadIdx.x; i < kPairs; i += kThreads) found.of_pair[i] = expert_of<G::kExperts>(index[i]);
        if constexpr (kShares) {
            for (int i = threadIdx.x; i < kActive * G::kM; i += kThreads) (&found.shares[0][0])[i] = 0;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < kPairs; i += kThreads) atomicOr(&found.bits[found.of_pair[i] / 32], 1u << found.of_pair[i] % 32);
        __syncthreads();
        for (int expert = threadIdx.x; expert < G::kExperts; expert += kThreads) {
            if (found.has(expert)) found.experts[found.place_of(expert)] = expert;
            if (expert == G::kExperts - 1) found.n = found.place_of(expert) + found.has(expert);
        }
        if constexpr (kShares) {
            for (int i = threadIdx.x; i < kPairs; i += kThreads) {
                const int token = i / G::kChosen, expert = found.of_pair[i];
                bool first = true;  // of this token's; one that it has twice counts for both
                float sum = 0;
                for (int j = token * G::kChosen; j < (token + 1) * G::kChosen; j++) {
                    if (found.of_pair[j] != expert) continue;
                    first &= j >= i;
                    sum += share[j];
                }
                if (first) found.shares[found.place_of(expert)][token] = sum;
            }
        }
        __syncthreads();
    }

    static __device__ int band_of(int unit) { return G::kJoined ? unit : unit % kBands; }

    __device__ __forceinline__ void place_next() {
        const unsigned char *expert = weight + chosen().experts[next.a] * int64_t(G::kExpertBytes);
        next_weights = expert + Weight::offset(band_of(next.unit) * G::kSide, warp, kColumns);
        next_x = static_cast<const unsigned char *>(x) + next.a * kExpertXBytes + warp * X::kColumnStep;
    }

    // Whether the warp's next step is another expert's, or another unit's.
    __device__ __forceinline__ bool advance(Position &position) const {
        if (++position.i < own) return false;
        position.i = 0;
        if (G::kJoined) {
            if (++position.a < chosen().n) return true;
            position.a = 0, position.unit++;
        } else {
            position.unit++;
            position.a = position.unit / kBands;
        }
        return true;
    }

    __device__ __forceinline__ void ask(int stage) {
        if (next.unit < end) {
            ring.ask_weights(stage, next_weights);
            ring.ask_x(stage, next_x);
            if (advance(next)) {
                if (next.unit < end) place_next();
            } else {
                next_weights += G::kWarps * Weight::kColumnStep;
                next_x += G::kWarps * X::kColumnStep;
            }
        }
        ring.close();
    }

    __device__ void run() {
        ring.start();
        wait_for_previous();
        choose(index, share);
        const int64_t units = G::kJoined ? kBands : int64_t(chosen().n) * kBands;
        const int begin = static_cast<int>(blockIdx.x * units / G::kBlocks);
        end = static_cast<int>((blockIdx.x + 1) * units / G::kBlocks);
        if (begin == end) return;
        next = {begin, G::kJoined ? 0 : begin / kBands, 0};
        place_next();
        Position now = next;
        for (int stage = 0; stage < G::kStages; stage++) ask(stage);
        if constexpr (G::kBias) prefetch_biases(begin);
        if constexpr (G::kSharedX) X::fill(shared, x, nullptr, nullptr, nullptr);
        Sums sums = {}, parts = {};
        int stage = 0;
        bool last = false;  // whether all has been asked for
#pragma unroll 1
        while (now.unit < end) {
            ring.wait(stage, true);
            multiply(kScaledApart ? parts : sums, stage, warp + G::kWarps * now.i);
            ring.release();
            ask(stage);
            if (next.unit >= end && !last) last = true, let_next_start();
            stage = stage + 1 == G::kStages ? 0 : stage + 1;
            const Position done = now;
            if (!advance(now)) continue;
            if constexpr (kScaledApart) add_scaled(sums, parts, done);
            if (now.unit == done.unit) continue;
            finish(done, sums, done.unit - begin);
            for_each(sums, [](float &sum) { sum = 0; });
        }
    }

    template <class Change>
    static __device__ __forceinline__ void for_each(Sums &sums, const Change &change) {
#pragma unroll
        for (int i = 0; i < kFragments * 4; i++) change(sums[i / 4 / kTokenTiles][i / 4 % kTokenTiles][i % 4]);
    }

    __device__ __forceinline__ void multiply(Sums &sums, int stage, int column) const {
        const unsigned char *slot = ring.slot(stage);
        typename X::Column x;
        if constexpr (G::kSharedX) {
            X::take_filled(x, shared, column);
        } else {
            X::take(x, slot + Ring::kWeightBytes);
        }
        const ColumnStart<typename G::T, Weight, kTokenTiles> start(x.chunks);
#pragma unroll
        for (int side = 0; side < G::kSide; side++) {
            Weight piece;
            piece.take(slot + side * Weight::kPieceBytes);
            multiply_piece(sums[side], piece, x.chunks, start);
        }
    }

    // Scales of rows g and g + 8 of a strip.
    __device__ __forceinline__ float2 scales(int a, int strip) const {
        const unsigned char *expert = weight + chosen().experts[a] * int64_t(G::kExpertBytes);
        const auto *behind = reinterpret_cast<const float *>(expert + Weight::offset(kStoredStrips, 0, kColumns));
        const int row = strip * kStripRows + lane_index() / 4;
        return make_float2(behind[row], behind[row + 8]);
    }

    __device__ __forceinline__ void add_scaled(Sums &sums, Sums &parts, const Position &done) const {
#pragma unroll
        for (int side = 0; side < G::kSide; side++) {
            const int strip = band_of(done.unit) * G::kSide + side;
            const float2 scale = scales(done.a, strip);
#pragma unroll
            for (int i = 0; i < kTokenTiles * 4; i++) {
                float &part = parts[side][i / 4][i % 4];
                sums[side][i / 4][i % 4] += (i % 4 < 2 ? scale.x : scale.y) * part;
                part = 0;
            }
        }
    }

    // Adds up the warps' sums and stores the results, a fragment a warp, by turns.
    __device__ __forceinline__ void finish(const Position &done, const Sums &sums, int turn) const {
        float *buffer = reinterpret_cast<float *>(shared + X::kBytes);
        if (turn > 0) named_barrier(1, kThreads);  // the last unit's sums have been read
#pragma unroll
        for (int i = 0; i < kFragments; i++) {
            const float(&sum)[4] = sums[i / kTokenTiles][i % kTokenTiles];
            *reinterpret_cast<float4 *>(buffer + ((warp * kFragments + i) * 32 + lane_index()) * 4) =
                make_float4(sum[0], sum[1], sum[2], sum[3]);
        }
        __syncthreads();
        for (int i = (warp + turn * kFragments) % G::kWarps; i < kFragments; i += G::kWarps) {
            const int strip = band_of(done.unit) * G::kSide + i / kTokenTiles, token = i % kTokenTiles * 8;
            if (strip >= Epilogue<G>::kStrips) continue;
            float total[4] = {};
            for (int w = 0; w < G::kWarps; w++) {
                const float4 part = *reinterpret_cast<const float4 *>(buffer + ((w * kFragments + i) * 32 + lane_index()) * 4);
                total[0] += part.x, total[1] += part.y, total[2] += part.z, total[3] += part.w;
            }
            if constexpr (Weight::kRowScales && !kScaledApart) {
                const float2 scale = scales(done.a, strip);
                total[0] *= scale.x, total[1] *= scale.x, total[2] *= scale.y, total[3] *= scale.y;
            }
            write(done.a, strip, token + lane_index() % 4 * 2, total);
        }
    }

    // The biases of an expert's outputs, from n on; those of up are kN further on.
    __device__ const float *biases(int a, int n) const {
        return bias + chosen().experts[a] * int64_t(G::kJoined ? G::kN : 2 * G::kN) + n;
    }

    // Brings those of the block's units to L2: they come from memory, and would be waited for at the end.
    __device__ void prefetch_biases(int begin) const {
        const int n_experts = G::kJoined ? chosen().n : 1;
        for (int i = threadIdx.x; i < (end - begin) * n_experts * G::kSide; i += kThreads) {
            const int unit = begin + i / G::kSide / n_experts, a = G::kJoined ? i / G::kSide % n_experts : unit / kBands;
            const int n = (band_of(unit) * G::kSide + i % G::kSide) * Epilogue<G>::kOutputs;
            if (n >= G::kN) continue;
            prefetch_l2(biases(a, n));
            const int other = n + (G::kJoined ? 8 : G::kN);  // eight rows at a time
            if (!G::kJoined || other < G::kN) prefetch_l2(biases(a, other));
        }
    }

    // What biases add to sums of rows g and g + 8, of outputs n and n + 8 or of n's gate and up, each of two tokens.
    __device__ __forceinline__ void add_biases(int a, int n, int first_token, float (&sums)[4]) const {
        if constexpr (G::kJoined) {
#pragma unroll 4
            for (int i = 0; i < chosen().n; i++) {
                const float *of = biases(i, n);
                const float2 both = {Epilogue<G>::is_output(n) ? of[0] : 0, Epilogue<G>::is_output(n + 8) ? of[8] : 0};
                for (int j = 0; j < 2; j++) {
                    const float part = first_token + j < G::kM ? chosen().shares[i][first_token + j] : 0;
                    if (part == 0) continue;  // others' biases, which may be anything
                    sums[j] = fmaf(part, both.x, sums[j]), sums[2 + j] = fmaf(part, both.y, sums[2 + j]);
                }
            }
        } else if (Epilogue<G>::is_output(n)) {
            const float of_gate = *biases(a, n), of_up = *biases(a, n + G::kN);
            sums[0] += of_gate, sums[1] += of_gate, sums[2] += of_up, sums[3] += of_up;
        }
    }

    // Sums of rows g and g + 8, each of two tokens.
    __device__ __forceinline__ void write(int a, int strip, int first_token, float (&sums)[4]) const {
        const int n = strip * Epilogue<G>::kOutputs + lane_index() / 4;
        if constexpr (G::kBias) add_biases(a, n, first_token, sums);
        for (int j = 0; j < 2; j++) {
            const int token = first_token + j;
            if (token >= G::kM) continue;
            if constexpr (G::kJoined) {
                for (int i = 0; i < 2; i++) {
                    const int64_t at = int64_t(token) * G::kN + n + 8 * i;
                    if (Epilogue<G>::is_output(n + 8 * i)) y[at] = sums[2 * i + j] + (G::kResidual ? residual[at] : 0.0f);
                }
            } else {
                const float part = chosen().shares[a][token], value = gate_up<G>(sums[j], sums[2 + j]);
                constexpr int64_t kElements = int64_t(round_up(G::kN, kTile)) * round_up(G::kM, 8);
                y[a * kElements + activation_index(round_up(G::kM, 8), token, n)] =
                    round_to<typename G::Y>(Epilogue<G>::is_output(n) && part != 0 ? value * part : 0.0f);
            }
        }
    }
};

template <class G>
__device__ __forceinline__ void experts_gemv(const unsigned char *weight, const void *x, const long long *index,
                                             const float *share, const float *residual, typename G::Y *y,
                                             const float *bias = nullptr) {
    ExpertsGemv<G>{weight, x, index, share, residual, y, bias}.run();
}
