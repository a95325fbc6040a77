// What happens to a tile of sums: parts are added, then norm, bias, activation, gate, residual, and the way to memory.
//
// Both GEMMs hold sums alike. A warpgroup (128 threads) owns 64 stored rows of the weight by kTokens rows of x:
//
//     sums[4j + 2h + c] of lane 4g + t of warp w  =  sum of row 16w + 8h + g for token 8j + 2t + c
//
// Neighbours in y[M,N] lie in different lanes, so 32 tokens at a time go through shared memory, from where each thread
// takes a few neighbouring outputs of one token: full sectors are written, and the residual is read so.
#pragma once

#include "epilogue.cuh"
#include "gemm_norm.cuh"
#include "gemm_tile.cuh"

constexpr int kStagedTokens = 32;  // tokens that go through shared memory together

// Outputs of a warpgroup, and floats of shared memory from one token's to the next: 4 more, to spread lanes over banks.
template <class L>
constexpr int kGroupOutputs = 4 * Epilogue<L>::kOutputs;
template <class L>
constexpr int kStagedRow = kGroupOutputs<L> + 4;
template <class L>
constexpr int kStagedFloats = kStagedTokens * kStagedRow<L>;

// Whether the warpgroups of a tile end it together: what appends has halves of a head's vector in both.
template <class Tiling>
constexpr bool kJoint = kAppends<typename Tiling::L> && Tiling::kOwners > 1;

constexpr int kJointBarrier = kNormBarrier + 5;  // behind those of gemm_turns.cuh

// Those who end a tile.
template <class Tiling>
__device__ __forceinline__ void meet(const Warpgroup &group) {
    if constexpr (kJoint<Tiling>) {
        named_barrier(kJointBarrier, 128 * Tiling::kOwners);
    } else {
        group.meet();
    }
}

// Adds the parts of a shared tile. Each block leaves one in `parts` [n_parts][warpgroups][kSums/4][128 threads]; the
// last to come adds them in the order of K and gets true, the others have nothing more to do.
// counters [shared tiles][warpgroups] are zero again afterwards. Warpgroups: those that finish the tile, a cluster's;
// where they finish it together, one counts for all, and `arrived` is theirs.
template <class Tiling>
__device__ bool add_parts(float (&sums)[Tiling::kSums], const Stretch &stretch, const Warpgroup &group, float4 *parts,
                          uint32_t *counters, uint32_t *arrived) {
    using W = typename Tiling::W;
    constexpr int kSums = Tiling::kSums, kGroupPart = kSums / 4 * 128;
    constexpr int kOwners = Tiling::kOwners * Tiling::kCluster, kPart = kOwners * kGroupPart;
    const int owner = Tiling::rank() * Tiling::kOwners + group.part;
    const int first = W::first_block(stretch.tile), n = W::last_block(stretch.tile) - first + 1;
    float4 *tile_parts = parts + int64_t(first + stretch.tile) * kPart + owner * kGroupPart + group.thread;

    float4 *own = tile_parts + int64_t(Tiling::worker() - first) * kPart;
#pragma unroll
    for (int i = 0; i < kSums / 4; i++) {
        own[i * 128] = make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
    }
    meet<Tiling>(group);
    if (group.thread == 0 && (!kJoint<Tiling> || group.part == 0)) {
        uint32_t *counter = counters + stretch.tile * kOwners + owner;
        *arrived = count_up(counter) + 1;
        if (*arrived == n) *counter = 0;
    }
    meet<Tiling>(group);
    if (*arrived != n) return false;

#pragma unroll
    for (int i = 0; i < kSums; i++) sums[i] = 0;
#pragma unroll(kSums <= 8 ? 4 : kSums <= 24 ? 2 : 1)
    for (int part = 0; part < n; part++) {
        const float4 *from = tile_parts + int64_t(part) * kPart;
#pragma unroll
        for (int i = 0; i < kSums / 4; i++) {
            const float4 more = from[i * 128];
            sums[4 * i] += more.x, sums[4 * i + 1] += more.y, sums[4 * i + 2] += more.z, sums[4 * i + 3] += more.w;
        }
    }
    return true;
}

// Norm, bias, activation and gate, where the sums are: for the rows 8h + g of a thread's warp.
template <class Tiling>
struct RowEpilogue {
    using L = typename Tiling::L;

    int n;          // the output that row g makes; row g + 8 makes the one 8 after it, or is its up part
    float bias[2];  // of rows g and g + 8
    float weight_sums[2];

    __device__ RowEpilogue(int first_output, int warp, int g)
        : n(first_output + warp * Epilogue<L>::kOutputs + g), bias{0, 0}, weight_sums{0, 0} {}

    // first_bias: from the first bias to that of W's first row.
    __device__ void read(const Epilogue<L> &epilogue, int64_t first_bias = 0) {
        if constexpr (L::kBias) read(bias, epilogue.bias + first_bias);
        if constexpr (L::kNorm == Norm::layer) read(weight_sums, epilogue.front.weight_sums);
    }

    __device__ void read(float (&values)[2], const float *from) const {
        if (is_output(0)) values[0] = from[n];
        if (is_output(1)) values[1] = from[L::kGated ? L::kN + n : n + 8];
    }

    // Whether row 8h + g makes an output, or a part of one; always, if all tiles are full.
    __device__ bool is_output(int h) const {
        return (L::kN % kTile == 0 && Tiling::kFullTiles) || (L::kGated ? n : n + 8 * h) < L::kN;
    }

    // norm: the token's mean and 1/d.
    __device__ float biased(float sum, int h, float2 norm) const {
        if constexpr (L::kNorm == Norm::layer) sum -= norm.x * weight_sums[h];
        if constexpr (L::kNorm != Norm::none) sum *= norm.y;
        return L::kBias ? sum + bias[h] : sum;
    }

    // Zero past the last output: a tiled y is padded with it.
    __device__ float plain(float sum, int h, float2 norm) const {
        return is_output(h) ? activate<L::kActivation, Tiling::kQuick>(biased(sum, h, norm)) : 0;
    }

    __device__ float gated(float gate, float up, float2 norm) const {
        return is_output(0) ? gate_up<L, Tiling::kQuick>(biased(gate, 0, norm), biased(up, 1, norm)) : 0;
    }
};

// The norms of a thread's tokens among kCount, read before any of its sums is stored: the compiler would not read past a
// store to shared memory, and each sum would wait for its own.
template <class Tiling, int kCount, bool = kTileNorms<Tiling>>
struct NormsOfRound {
    __device__ NormsOfRound(const float2 *, int) {}
};
template <class Tiling, int kCount>
struct NormsOfRound<Tiling, kCount, true> {
    float2 norms[kCount / 8][2];

    // tile: those of the thread's first token in the tile, an even one. first: the round's.
    __device__ NormsOfRound(const float2 *tile, int first) {
#pragma unroll
        for (int j = 0; j < kCount / 8; j++) {
            if (first + 8 * j >= Tiling::kTokens) continue;
            const float4 two = *reinterpret_cast<const float4 *>(tile + first + 8 * j);
            norms[j][0] = make_float2(two.x, two.y), norms[j][1] = make_float2(two.z, two.w);
        }
    }
};

// Brings up to kCount tokens' outputs to shared memory: staging [token][output]. sums: those of the tile's first token
// on; norms: its tokens'.
template <class Tiling, int kCount = kStagedTokens>
__device__ __forceinline__ void stage_tokens(const float (&sums)[Tiling::kRowSums], float *staging,
                                             const RowEpilogue<Tiling> &rows, int first_sum, int warp,
                                             const float2 *norms) {
    using L = typename Tiling::L;
    const int g = lane_index() / 4, t = lane_index() % 4;
    float *to = staging + 2 * t * kStagedRow<L> + warp * Epilogue<L>::kOutputs + g;
    const NormsOfRound<Tiling, kCount> read(norms + 2 * t, 2 * first_sum);
#pragma unroll
    for (int j = 0; j < kCount / 8; j++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const int i = first_sum + 4 * j + c;
            if (i >= Tiling::kRowSums) continue;
            float *at = to + (8 * j + c) * kStagedRow<L>;
            float2 norm = {};
            if constexpr (kTileNorms<Tiling>) {
                norm = read.norms[j][c];
            } else if constexpr (L::kNorm != Norm::none) {
                norm = norms[2 * first_sum + 8 * j + 2 * t + c];
            }
            if constexpr (L::kGated) {
                at[0] = rows.gated(sums[i], sums[i + 2], norm);
            } else {
                at[0] = rows.plain(sums[i], 0, norm);
                at[8] = rows.plain(sums[i + 2], 1, norm);
            }
        }
    }
}

// Outputs of a token that a thread stores at once: a chunk of a tiled y, or what a vector of f32 holds.
template <class L>
constexpr int kPiece = Epilogue<L>::kTiled ? 8 : L::kN % 4 == 0 ? 4 : 1;

// The way of staged tokens to y, for one thread: pieces thread, thread + 128, … of [token][piece].
template <class L>
struct Writer {
    static constexpr int kTokenPieces = kGroupOutputs<L> / kPiece<L>;
    static constexpr int kPieces = kStagedTokens * kTokenPieces / 128;  // of a thread
    static constexpr int n_stored = Epilogue<L>::kTiled ? round_up(L::kN, kTile) : L::kN;

    const Epilogue<L> &epilogue;
    int first_token, end_token, first_output, thread;
    float residual[L::kResidual ? kPieces : 1][kPiece<L>];
    float scale[4];  // of the norm behind

    __device__ int staged_token(int i) const { return (thread + 128 * i) / kTokenPieces; }
    __device__ int staged_output(int i) const { return (thread + 128 * i) % kTokenPieces * kPiece<L>; }
    __device__ int token(int i) const { return first_token + staged_token(i); }
    __device__ int output(int i) const { return first_output + staged_output(i); }
    __device__ bool is_there(int i) const { return token(i) < end_token && output(i) < n_stored; }

    // Reads what scales the outputs for the norm behind: early, for it comes from far.
    __device__ void read_scale() {
        if constexpr (L::kMoments) {
            static_assert(!L::kGated && L::kN % kTile == 0 && kPiece<L> == 4, "16 threads have a token's 64 outputs");
            const float *from = epilogue.next.weight + output(0);
            if (output(0) < L::kN) *reinterpret_cast<float4 *>(scale) = *reinterpret_cast<const float4 *>(from);
        }
    }

    // Reads what is added to the tokens from `first` on: as early.
    __device__ void read_residual(int first) {
        first_token = first;
        if constexpr (L::kResidual) {
#pragma unroll
            for (int i = 0; i < kPieces; i++) {
                const float *from = epilogue.residual + int64_t(token(i)) * L::kN + output(i);
                if constexpr (kPiece<L> == 4) {
                    if (is_there(i)) *reinterpret_cast<float4 *>(residual[i]) = *reinterpret_cast<const float4 *>(from);
                } else {
#pragma unroll
                    for (int j = 0; j < kPiece<L>; j++) {
                        residual[i][j] = is_there(i) && output(i) + j < L::kN ? from[j] : 0;
                    }
                }
            }
        }
    }

    __device__ void write(const float *staging) const {
        float handed[kMomentsOfFour<L> ? kPieces : 1][kPiece<L>];
#pragma unroll
        for (int i = 0; i < kPieces; i++) {
            const bool there = is_there(i);
            float v[kPiece<L>] = {};
            if (there) {
                const float *from = staging + staged_token(i) * kStagedRow<L> + staged_output(i);
#pragma unroll
                for (int j = 0; j < kPiece<L>; j++) v[j] = L::kResidual ? from[j] + residual[i][j] : from[j];
                store(token(i), output(i), v);
            }
            if constexpr (kMomentsOfFour<L>) {
                if (there) store_scaled(i, v);
#pragma unroll
                for (int j = 0; j < 4; j++) handed[i][j] = v[j];
            } else if constexpr (L::kMoments) {
                hand_on(i, v, there);  // all lanes together: they exchange sums
            }
        }
        if constexpr (kMomentsOfFour<L>) {
            const float2 moments = moments_of_four(handed);
            const int i = thread % 16 / 4;
            if (thread % 4 == 0 && is_there(i)) store_moments(i, moments);
        }
    }

    __device__ void hand_on(int i, const float (&v)[4], bool there) const {
        const float2 moments = moments_of_tile(v);
        if (!there) return;
        store_scaled(i, v);
        if (thread % 16 == 0) store_moments(i, moments);
    }

    __device__ void store_scaled(int i, const float (&v)[4]) const {
        using T = typename L::T;
        const int64_t at = activation_index(round_up(L::kM, 8), token(i), output(i));
        *reinterpret_cast<uint2 *>(epilogue.next.scaled + at) =
            make_uint2(pack2<T>(v[0] * scale[0], v[1] * scale[1]), pack2<T>(v[2] * scale[2], v[3] * scale[3]));
    }

    __device__ void store_moments(int i, float2 moments) const {
        epilogue.next.moments[output(i) / kTile * L::kM + token(i)] = moments;
    }

    __device__ void store(int token, int n, const float (&v)[kPiece<L>]) const {
        typename L::Y *y = epilogue.y;
        if constexpr (Epilogue<L>::kTiled) {
            using T = typename L::Y;
            const uint4 chunk = {pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3]),  //
                                 pack2<T>(v[4], v[5]), pack2<T>(v[6], v[7])};
            store_16(y + activation_index(round_up(L::kM, 8), token, n), chunk);
        } else if constexpr (kPiece<L> == 4) {
            reinterpret_cast<float4 *>(y)[(int64_t(token) * L::kN + n) / 4] = make_float4(v[0], v[1], v[2], v[3]);
        } else {
            y[int64_t(token) * L::kN + n] = v[0];
        }
    }
};

// Brings the epilogue's constants to L2, by kThreads threads of each block, all blocks together: they come from memory,
// and each block would wait for its own at its end.
template <class Tiling, int kThreads>
__device__ __forceinline__ void prefetch_constants(const Epilogue<typename Tiling::L> &epilogue, int thread) {
    using L = typename Tiling::L;
    constexpr int n_rows = L::kGated ? 2 * L::kN : L::kN;
    if constexpr (!Tiling::kOfExperts && (L::kBias || L::kMoments || L::kNorm == Norm::layer)) {
        for (int n = 8 * (blockIdx.x * kThreads + thread); n < n_rows; n += 8 * gridDim.x * kThreads) {
            if constexpr (L::kBias) prefetch_l2(epilogue.bias + n);
            if constexpr (L::kMoments) prefetch_l2(epilogue.next.weight + n);
            if constexpr (L::kNorm == Norm::layer) prefetch_l2(epilogue.front.weight_sums + n);
        }
    }
}

// The end of 64 rows of a tile, for one thread: what is added to its sums is read, at once if kEarly, and they are stored.
template <class Tiling, bool kEarly>
struct TileEnd {
    using L = typename Tiling::L;

    Place place;
    Warpgroup group;
    int first_output;
    Writer<L> writer;
    RowEpilogue<Tiling> rows;

    __device__ __forceinline__ TileEnd(const Place &place, const Warpgroup &group, const Epilogue<L> &epilogue)
        : place(place), group(group), first_output((place.tile_row + group.part) * kGroupOutputs<L>),
          writer{epilogue, place.token, min(L::kM, place.token + Tiling::kTokens), first_output, group.thread},
          rows(first_output, group.thread / 32, lane_index() / 4) {
        if constexpr (kEarly) read();
    }

    __device__ __forceinline__ void read() {
        writer.read_scale();
        writer.read_residual(place.token);
        rows.read(writer.epilogue, Tiling::bias_offset(place));
    }

    // staging: the warpgroup's, in shared memory.
    __device__ __forceinline__ void store(const float (&sums)[Tiling::kRowSums], float *staging) {
        if constexpr (!kEarly) read();
        const float2 *norms = norms_at<Tiling>(writer.epilogue.front.norms, place.token);
#pragma unroll
        for (int first = 0; first < Tiling::kTokens; first += kStagedTokens) {
            group.meet();  // the last tokens have left the shared memory
            stage_tokens<Tiling>(sums, staging, rows, first / 2, group.thread / 32, norms);
            group.meet();
            writer.write(staging);
            if (first + kStagedTokens < Tiling::kTokens) writer.read_residual(place.token + first + kStagedTokens);
        }
    }
};

// Whether `sums` are those of the whole tile now. arrived: the warpgroup's, in shared memory.
template <class Tiling>
__device__ __forceinline__ bool completes(float (&sums)[Tiling::kSums], const Stretch &stretch,
                                          const Warpgroup &group, uint32_t *arrived, float4 *parts,
                                          uint32_t *counters) {
    if (Tiling::W::n_parts == 0 || !Tiling::W::is_part(stretch)) return true;
    return add_parts<Tiling>(sums, stretch, group, parts, counters, arrived);
}
