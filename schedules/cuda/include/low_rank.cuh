// What tokens' adapters add to a product: y[m] += B_e A_e x[m], e = adapters[m], in two launches (schedules/cuda/low_rank.py).
//
//     down    thin[m] = A_e x'[m]                       x' is x, or its norm
//     up      y[m] += B_e thin[m]                       or out[m] = act(gate) · up of what that makes of y
//
// Each is there twice:
//
//     of rows    few tokens: a block has one row of x and two outputs of A, a thread one of B, or a gate's two
//     of tiles   many: a warp has 16 rows, whose products mma.sync makes, one adapter after the other that these rows have;
//                rows that have another one are zeros meanwhile. In a prompt that is one, in company a few
//
// A row without an adapter is looked at and left. The number of rows is not known here, but where x or out lie in tiles
// (M, or 0): a launch has as many blocks as its rows want, and what is past M has no adapter.
//
// Weights lie [E][rows][columns] with rows of A filled up with zeros to whole 32 elements. Which adapters there are, and
// all weights, are known before the launch in front has ended: they are asked for then.
//
// Bytes: A and B of each adapter that a row has, from L2 after the first row; x, thin, and y twice.
#pragma once

#include "epilogue.cuh"

constexpr int kLowRankWarps = 8, kLowRankThreads = 32 * kLowRankWarps, kLowRankRows = 16, kLowRankColumns = 64;
constexpr int kLowRankOutputs = 2;  // of A, that a block of one row makes

// `L` says
//     T                              of A and B;  X of x and Y of out: float, or the T of tiles
//     kM                             rows of x and out where either lies in tiles, else 0
//     kN, kK, kRank, kParts          y [M, kN], x [M, kK], A [E, kParts kRank, kStride], B [E, kN, kRank]
//     kOutputs                       outputs of A that a block of tiles makes, 8 to 64
//     ends [kParts]                  where each part's columns of y end
//     kNorm, kNormBias, kEpsilon     as NormInput wants them
//     kGate, kStrips, kActivation    whether y becomes a gate, and its columns' order
template <class L>
struct LowRank {
    static constexpr int kRanks = L::kParts * L::kRank, kStride = round_up(L::kK, 32);
    static constexpr int kResults = L::kGate ? L::kN / 2 : L::kN;
    static constexpr bool kTiledX = sizeof(typename L::X) == 2, kTiledY = sizeof(typename L::Y) == 2;

    // Where y has the first or the second half's column of a result; and the row of B that goes with it.
    static __device__ int column_of(int n, int half) {
        if constexpr (L::kStrips) return n / 8 * 16 + 8 * half + n % 8;
        return n + half * kResults;
    }

    // The part that a row of B belongs to.
    static __device__ int part_of(int n) {
        int part = 0;
#pragma unroll
        for (int i = 0; i + 1 < L::kParts; i++) part += n >= L::ends(i);
        return part;
    }

    static __device__ const typename L::T *a_of(const typename L::T *a, int adapter, int rank) {
        return a + (int64_t(adapter) * kRanks + rank) * kStride;
    }

    static __device__ const typename L::T *b_of(const typename L::T *b, int adapter, int n) {
        return b + (int64_t(adapter) * L::kN + n) * L::kRank;
    }
};

template <class T>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<bf16> = true;

// Eight elements, widened.
template <class T>
__device__ __forceinline__ void widen_eight(float (&v)[8], const T *from) {
    if constexpr (sizeof(T) == 4) {
        load_eight<8>(v, from, 0);
    } else {
        const uint4 pairs = load_16(from);
        const uint32_t words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 two = unpack2<T>(words[i]);
            v[2 * i] = two.x, v[2 * i + 1] = two.y;
        }
    }
}

// x' of a row, eight elements at a time.
template <class L>
struct LowRankInput {
    const typename L::X *x;
    const float *weight, *bias;  // of the norm

    using Row = Moments<L::kNorm == Norm::layer>;

    // By a whole warp; nothing where there is no norm.
    __device__ Row moments(int row) const {
        if constexpr (L::kNorm == Norm::none) return {};
        else return NormInput<L>{x, weight, bias}.template moments<32>(row, 0);
    }

    // Elements k … k + 7 of x; zeros past the row's end.
    __device__ void plain(float (&v)[8], int row, int k) const {
        if constexpr (LowRank<L>::kTiledX) {
            widen_eight(v, x + activation_index(round_up(L::kM, 8), row, k));
        } else {
            load_eight<L::kK>(v, x + int64_t(row) * L::kK, k);
        }
    }

    // The same of x'; norm: a row's mean and 1/d. Late: x times the norm's weight, and their squares are given back.
    template <bool kLate>
    __device__ float eight(float (&v)[8], int row, int k, float2 norm) const {
        float squares = 0.f;
        plain(v, row, k);
        if constexpr (L::kNorm != Norm::none) {
            float scale[8], shift[8] = {};
            load_eight<L::kK>(scale, weight, k);
            if constexpr (L::kNormBias) load_eight<L::kK>(shift, bias, k);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                squares += v[i] * v[i];
                v[i] = kLate ? v[i] * scale[i] : (v[i] - norm.x) * norm.y * scale[i] + shift[i];
            }
        }
        return squares;
    }
};

// ---- of rows -------------------------------------------------------------------------------------------------------

// What a warp's part of a row comes to, for outputs of A: sums of w x g, w g and w b over its elements.
struct LowRankSums {
    float of_x[kLowRankOutputs], of_scale[kLowRankOutputs], of_shift[kLowRankOutputs];
};

// The chunk of 8 elements from k on.
template <class L>
__device__ __forceinline__ void low_rank_chunk(LowRankSums &sums, Moments<L::kNorm == Norm::layer> &moments,
                                               const LowRankInput<L> &in, const typename L::T *own, int row, int k) {
    float x[8], scale[8] = {1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f}, shift[8] = {};
    in.plain(x, row, k);
    if constexpr (L::kNorm != Norm::none) load_eight<L::kK>(scale, in.weight, k);
    if constexpr (L::kNormBias) load_eight<L::kK>(shift, in.bias, k);
    if constexpr (L::kNorm != Norm::none) moments.add(x, L::kK % 8 == 0 ? 8 : min(8, L::kK - k));
#pragma unroll
    for (int o = 0; o < kLowRankOutputs; o++) {
        float w[8];
        widen_eight(w, own + o * LowRank<L>::kStride + k);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            sums.of_x[o] += w[i] * (L::kNorm == Norm::none ? x[i] : x[i] * scale[i]);
            if constexpr (L::kNorm == Norm::layer) sums.of_scale[o] += w[i] * scale[i];
            if constexpr (L::kNormBias) sums.of_shift[o] += w[i] * shift[i];
        }
    }
}

// A block for each row and kLowRankOutputs outputs, K split over its warps: x is read once, and while it is, nothing else
// is waited for. A norm is taken on the way: it multiplies a sum by one number, after something was taken away. thin [M,
// kRanks].
template <class L>
__device__ __forceinline__ void low_rank_down_rows(LowRankInput<L> in, const int *adapters, const typename L::T *a,
                                                   float *thin) {
    using W = LowRank<L>;
    using Row = Moments<L::kNorm == Norm::layer>;
    constexpr int blocks = ceil_div(W::kRanks, kLowRankOutputs);
    __shared__ LowRankSums parts[kLowRankWarps];
    __shared__ Row rows[kLowRankWarps];
    const int row = blockIdx.x / blocks, rank = blockIdx.x % blocks * kLowRankOutputs;
    const int adapter = adapters[row];
    const typename L::T *own = W::a_of(a, max(adapter, 0), rank);
    let_next_start();
    if (adapter >= 0) {
        constexpr int line = 64 / sizeof(typename L::T);
        for (int i = threadIdx.x; i < kLowRankOutputs * W::kStride / line; i += kLowRankThreads) prefetch_l2(own + line * i);
    }
    wait_for_previous();
    if (adapter < 0) return;
    LowRankSums sums = {};
    Row moments;
#pragma unroll 4
    for (int k = 8 * int(threadIdx.x); k < L::kK; k += 8 * kLowRankThreads) low_rank_chunk<L>(sums, moments, in, own, row, k);
#pragma unroll
    for (int o = 0; o < kLowRankOutputs; o++) {
        sums.of_x[o] = warp_sum(sums.of_x[o]);
        if constexpr (L::kNorm == Norm::layer) sums.of_scale[o] = warp_sum(sums.of_scale[o]);
        if constexpr (L::kNormBias) sums.of_shift[o] = warp_sum(sums.of_shift[o]);
    }
    if constexpr (L::kNorm != Norm::none) moments = moments.over_lanes();
    const int warp = warp_index();
    if (lane_index() == 0) parts[warp] = sums, rows[warp] = moments;
    __syncthreads();
    const int o = threadIdx.x;
    if (o >= kLowRankOutputs) return;
    Row all;
    float of_x = 0.f, of_scale = 0.f, of_shift = 0.f;
    for (int i = 0; i < kLowRankWarps; i++) {
        of_x += parts[i].of_x[o], of_scale += parts[i].of_scale[o], of_shift += parts[i].of_shift[o];
        if constexpr (L::kNorm != Norm::none) all.merge(rows[i]);
    }
    if constexpr (L::kNorm != Norm::none) of_x = (of_x - all.mean * of_scale) * all.factor(L::kEpsilon) + of_shift;
    thin[int64_t(row) * W::kRanks + rank + o] = of_x;
}

// What is added to a column of y, by one thread.
template <class L>
__device__ __forceinline__ float low_rank_added(const float *thin, const typename L::T *b, int row, int adapter, int n) {
    using W = LowRank<L>;
    const typename L::T *own = W::b_of(b, adapter, n);
    const float *factors = thin + int64_t(row) * W::kRanks + W::part_of(n) * L::kRank;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < L::kRank; i += 8) {
        float w[8], v[8];
        widen_eight(w, own + i), load_eight<8>(v, factors + i, 0);
#pragma unroll
        for (int j = 0; j < 8; j++) sum += v[j] * w[j];
    }
    return sum;
}

// A block for each row and kLowRankThreads results; out is y where there is no gate.
template <class L>
__device__ __forceinline__ void low_rank_up_rows(const float *thin, const int *adapters, const typename L::T *b,
                                                 float *y, typename L::Y *out) {
    using W = LowRank<L>;
    constexpr int end = W::kTiledY ? round_up(W::kResults, kTile) : W::kResults;
    constexpr int blocks = ceil_div(end, kLowRankThreads);
    const int row = blockIdx.x / blocks, n = blockIdx.x % blocks * kLowRankThreads + threadIdx.x;
    const int adapter = adapters[row];
    let_next_start();
    if (adapter >= 0 && n < W::kResults) {
#pragma unroll
        for (int half = 0; half < 1 + L::kGate; half++) prefetch_l2(W::b_of(b, adapter, n + half * W::kResults));
    }
    wait_for_previous();
    if (n >= end || (adapter < 0 && !L::kGate)) return;
    float sums[2] = {};
    const bool is_result = n < W::kResults;
#pragma unroll
    for (int half = 0; half < 1 + L::kGate; half++) {
        if (!is_result) continue;
        sums[half] = y[int64_t(row) * L::kN + W::column_of(n, half)];
        if (adapter >= 0) sums[half] += low_rank_added<L>(thin, b, row, adapter, n + half * W::kResults);
    }
    const float value = L::kGate ? activate<L::kActivation>(sums[0]) * sums[1] : sums[0];
    if constexpr (W::kTiledY) {
        out[activation_index(round_up(L::kM, 8), row, n)] = round_to<typename L::Y>(is_result ? value : 0.f);
    } else {
        out[int64_t(row) * W::kResults + n] = value;
    }
}

// ---- of tiles ------------------------------------------------------------------------------------------------------

// The adapters of a warp's 16 rows from `first` on, one after the other: take(adapter, has[2]) says of rows g = lane / 4
// and g + 8 whether it is theirs. A row past the last one has none. n_rows: of the step.
template <class Take>
__device__ __forceinline__ void each_adapter(const int *adapters, int first, int n_rows, Take take) {
    const int mine = first + lane_index() % kLowRankRows, g = lane_index() / 4;
    const int adapter = mine < n_rows ? adapters[mine] : -1;
    uint32_t left = __ballot_sync(0xffffffffu, adapter >= 0) & 0xffffu;
    while (left) {
        const int own = __shfl_sync(0xffffffffu, adapter, __ffs(left) - 1);
        const uint32_t rows = __ballot_sync(0xffffffffu, adapter == own) & 0xffffu;
        const bool has[2] = {(rows >> g & 1) != 0, (rows >> (g + 8) & 1) != 0};
        take(own, has);
        left &= ~rows;
    }
}

// How many rows there are of a launch whose blocks have 16 each, `blocks` of them the same.
template <class L>
__device__ __forceinline__ int low_rank_rows(int blocks) {
    return L::kM > 0 ? L::kM : int(gridDim.x) / blocks * kLowRankRows;
}

// A block for 16 rows and kOutputs outputs of A; its warps take steps of 32 of K in turn, and their sums are added up in
// order. RMSNorm is taken late in bf16, which has the range for it: when the sums are there, so are the squares. In a
// step lane 4g + t has elements 8t … 8t + 7 of its rows, the operands of two products: the same order of K on
// both sides is all that a product asks for.
template <class L>
__device__ __forceinline__ void low_rank_down_tiles(LowRankInput<L> in, const int *adapters, const typename L::T *a,
                                                    float *thin) {
    using W = LowRank<L>;
    using T = typename L::T;
    constexpr int blocks = ceil_div(W::kRanks, L::kOutputs), groups = L::kOutputs / 8;
    constexpr bool is_late = L::kNorm == Norm::rms && kIsBf16<T>;
    __shared__ float2 norms[kLowRankRows];
    __shared__ float squares_of[kLowRankWarps][kLowRankRows], parts[kLowRankWarps][kLowRankRows][L::kOutputs];
    const int first = int(blockIdx.x) / blocks * kLowRankRows, outputs = int(blockIdx.x) % blocks * L::kOutputs;
    const int n_rows = low_rank_rows<L>(blocks), warp = warp_index(), g = lane_index() / 4, t = lane_index() % 4;
    let_next_start();
    wait_for_previous();
    float2 norm[2] = {{0.f, 1.f}, {0.f, 1.f}};
    if constexpr (L::kNorm != Norm::none && !is_late) {
        for (int i = warp; i < kLowRankRows && first + i < n_rows; i += kLowRankWarps) {
            const typename LowRankInput<L>::Row all = in.moments(first + i);
            if (lane_index() == 0) norms[i] = make_float2(all.mean, all.factor(L::kEpsilon));
        }
        __syncthreads();
        for (int i = 0; i < 2; i++)
            if (first + g + 8 * i < n_rows) norm[i] = norms[g + 8 * i];
    }
    float sums[groups][4] = {}, squares[2] = {};
    each_adapter(adapters, first, n_rows, [&](int adapter, const bool (&has)[2]) {
#pragma unroll (groups <= 2 ? 4 : 2)
        for (int k = 32 * warp + 8 * t; k - 8 * t < L::kK; k += 32 * kLowRankWarps) {
            uint4 w[groups];
#pragma unroll
            for (int j = 0; j < groups; j++) {
                const int rank = outputs + 8 * j + g;
                w[j] = load_16(W::a_of(a, adapter, rank < W::kRanks ? rank : 0) + k);
            }
            uint4 rows[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float v[8] = {};
                if (has[i] && k < L::kK) squares[i] += in.template eight<is_late>(v, first + g + 8 * i, k, norm[i]);
                rows[i] = round_eight<T>(v);
            }
            const uint32_t low[4] = {rows[0].x, rows[1].x, rows[0].y, rows[1].y};
            const uint32_t high[4] = {rows[0].z, rows[1].z, rows[0].w, rows[1].w};
#pragma unroll
            for (int j = 0; j < groups; j++) {
                mma_16816<T>(sums[j], low, {w[j].x, w[j].y});
                mma_16816<T>(sums[j], high, {w[j].z, w[j].w});
            }
        }
    });
#pragma unroll
    for (int j = 0; j < groups; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) parts[warp][g + i / 2 * 8][8 * j + 2 * t + i % 2] = sums[j][i];
    }
    if constexpr (is_late) {
        for (int i = 0; i < 2; i++) {
            squares[i] += __shfl_xor_sync(0xffffffffu, squares[i], 1);
            squares[i] += __shfl_xor_sync(0xffffffffu, squares[i], 2);
            if (t == 0) squares_of[warp][g + 8 * i] = squares[i];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kLowRankRows * L::kOutputs; i += kLowRankThreads) {
        const int row = i / L::kOutputs, output = i % L::kOutputs;
        if (first + row >= n_rows || outputs + output >= W::kRanks) continue;
        float sum = parts[0][row][output];
        for (int other = 1; other < kLowRankWarps; other++) sum += parts[other][row][output];
        if constexpr (is_late) {
            float all = 0.f;
            for (int other = 0; other < kLowRankWarps; other++) all += squares_of[other][row];
            sum *= rsqrtf(all / L::kK + L::kEpsilon);
        }
        thin[int64_t(first + row) * W::kRanks + outputs + output] = sum;
    }
}

// Adds to sums [16 rows, 8 rows of B from n on] what the rows' adapter makes of their thin ones, zeros where it is not
// theirs.
template <class L>
__device__ __forceinline__ void low_rank_product(float (&sums)[4], const float *thin, const typename L::T *b, int first,
                                                 int n, int adapter, const bool (&has)[2]) {
    using W = LowRank<L>;
    const int g = lane_index() / 4, t = lane_index() % 4;
    const float *factors = thin + int64_t(first + g) * W::kRanks + W::part_of(n) * L::kRank;
    const typename L::T *own = W::b_of(b, adapter, n + g);
#pragma unroll
    for (int k = 4 * t; k - 4 * t < L::kRank; k += 16) {
        uint2 w = make_uint2(0, 0), rows[2] = {};
        if (k < L::kRank) {
            w = *reinterpret_cast<const uint2 *>(own + k);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (!has[i]) continue;
                const float4 v = *reinterpret_cast<const float4 *>(factors + int64_t(8 * i) * W::kRanks + k);
                rows[i] = make_uint2(pack2<typename L::T>(v.x, v.y), pack2<typename L::T>(v.z, v.w));
            }
        }
        mma_16816<typename L::T>(sums, {rows[0].x, rows[1].x, rows[0].y, rows[1].y}, {w.x, w.y});
    }
}

// A warp for 16 rows and kLowRankColumns results, a block for kLowRankWarps times as many.
template <class L>
__device__ __forceinline__ void low_rank_up_tiles(const float *thin, const int *adapters, const typename L::T *b,
                                                  float *y, typename L::Y *out) {
    using W = LowRank<L>;
    constexpr int blocks = ceil_div(W::kResults, kLowRankColumns * kLowRankWarps), groups = kLowRankColumns / 8;
    const int first = int(blockIdx.x) / blocks * kLowRankRows, g = lane_index() / 4, t = lane_index() % 4;
    const int begin = (int(blockIdx.x) % blocks * kLowRankWarps + warp_index()) * kLowRankColumns;
    const int n_rows = low_rank_rows<L>(blocks);
    let_next_start();
    wait_for_previous();
    if (begin >= W::kResults) return;
    float sums[1 + L::kGate][groups][4] = {};
    bool is_any[2] = {L::kGate, L::kGate};
    each_adapter(adapters, first, n_rows, [&](int adapter, const bool (&has)[2]) {
        is_any[0] |= has[0], is_any[1] |= has[1];
#pragma unroll
        for (int j = 0; j < groups; j++) {
#pragma unroll
            for (int half = 0; half < 1 + L::kGate; half++) {
                if (begin + 8 * j >= W::kResults) continue;
                low_rank_product<L>(sums[half][j], thin, b, first, begin + 8 * j + half * W::kResults, adapter, has);
            }
        }
    });
#pragma unroll
    for (int j = 0; j < groups; j++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = first + g + 8 * i, n = begin + 8 * j + 2 * t;
            if (row >= n_rows || n >= W::kResults || !is_any[i]) continue;
            float2 all[1 + L::kGate];
#pragma unroll
            for (int half = 0; half < 1 + L::kGate; half++) {
                const int64_t at = int64_t(row) * L::kN + W::column_of(n, half);
                all[half] = *reinterpret_cast<const float2 *>(y + at);
                all[half].x += sums[half][j][2 * i], all[half].y += sums[half][j][2 * i + 1];
            }
            if constexpr (!L::kGate) {
                *reinterpret_cast<float2 *>(out + int64_t(row) * W::kResults + n) = all[0];
            } else {
                const float low = activate<L::kActivation>(all[0].x) * all[L::kGate].x;
                const float high = activate<L::kActivation>(all[0].y) * all[L::kGate].y;
                if constexpr (W::kTiledY) {
                    *reinterpret_cast<uint32_t *>(out + activation_index(round_up(L::kM, 8), row, n)) =
                        pack2<typename L::Y>(low, high);
                } else {
                    *reinterpret_cast<float2 *>(out + int64_t(row) * W::kResults + n) = make_float2(low, high);
                }
            }
        }
    }
}
