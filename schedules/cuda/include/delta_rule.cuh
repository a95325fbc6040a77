// The gated delta rule: each head of values keeps a state T [DK, DV] in the sequence's slot, and for each row
//
//     q, k = scale · q / |q|, k / |k|;   T = exp(g) · T;   news = beta (v - kᵀ T);   y = qᵀ T + (q · k) news;   T = T + k newsᵀ
//
// (Yang et al. 2024, arXiv:2412.06464.) Columns of T do not see each other. So a warp has four of them, whole, in its
// registers, through all rows of a sequence: it reads them once and writes them once, and two warps never wait for each
// other within a row. Both sums over DK go through the same exchanges of lanes. Rows come in chunks by cp.async, the next
// while the warps take this one; q, k and the gates are made ready once for all warps of the block.
//
// Bytes: 8 VH DK DV a sequence of a step, all asked for before the launch in front has ended: nobody else in a step
// touches this layer's states. A row: 16 DK multiply-adds, a halving exchange of 8 sums (13 shuffles), by each warp.
#pragma once

#include "state_rows.cuh"

// `R` says kRows, kKeyHeads, kValueHeads, kKeyDim: DK, kValueDim: DV; kWarps; kChunk: rows of a chunk; kRuns: of how many
// runs blocks take turns; kScale, kEpsilon; kSoftplus: gates are worked out here; kStride: float32 from a slot to the next;
// kDelta: false for Mamba 2's rule, which takes q and k as they are, and nothing out of v (Dao and Gu 2024,
// arXiv:2405.21060): T = exp(g) T + k (beta v)ᵀ.
//
// What says the gates: g and beta [kRows, kValueHeads], or a and b, of which g = rate · log(1 + exp(a + bias)) and beta =
// 1 / (1 + exp(-b)) are made; bias, rate [kValueHeads].
struct Gates {
    const float *first, *second, *bias = nullptr, *rate = nullptr;
};

template <class R>
struct DeltaRule {
    static constexpr int DK = R::kKeyDim, DV = R::kValueDim, kThreads = 32 * R::kWarps;
    static constexpr int kColumns = DV % 4 == 0 ? 4 : DV % 2 == 0 ? 2 : 1;  // of a warp: a unit
    static constexpr int kUnits = DV / kColumns, kBlocks = (kUnits + R::kWarps - 1) / R::kWarps;  // of a head
    static constexpr int kOwn = (DK + 31) / 32;  // rows of T that a lane has
    static constexpr int kWidth = 2 * R::kKeyHeads * DK + R::kValueHeads * DV;
    static constexpr int kSums = 2 * kColumns, kLanes = 32 / kSums;  // lanes that have the same sum
    // Of a row in shared memory: q, k, v, and exp(g), beta, q · k, whether the text begins here. First g is there.
    static constexpr int kPadded = (DK + 3) / 4 * 4, kValues = (R::kWarps * kColumns + 3) / 4 * 4;
    static constexpr int kK = kPadded, kV = 2 * kPadded, kGates = kV + kValues, kToken = kGates + 4;
    static constexpr int kShared = 2 * R::kChunk * kToken * 4;  // bytes
    static constexpr bool kWide = DK % 4 == 0 && DV % 4 == 0;   // copies of 16 bytes

    StateRows<R::kRows> rows;
    const float *qkv;
    Gates gates;
    float *state, *y, *shared;
    int head, block, unit;
    bool has_unit, has_waited;
    float bias, rate;  // of the head's

    // ---- the state: [VH][units][DK][columns], the rows of T in the order in which lanes take them

    // Which row of T is a lane's j-th.
    static __device__ __forceinline__ int own_row(int j) {
        return DK % 128 == 0 ? 128 * (j / 4) + 4 * lane_index() + j % 4 : 32 * j + lane_index();
    }
    static __device__ __forceinline__ bool has_row(int j) { return DK % 32 == 0 || 32 * j + lane_index() < DK; }

    __device__ __forceinline__ float *place(int slot, int j) const {
        const int64_t first = slot * int64_t(R::kStride) + (int64_t(head) * kUnits + unit) * (DK * kColumns);
        return state + first + (32 * j + lane_index()) * kColumns;
    }
    __device__ __forceinline__ void load(float (&t)[kOwn][kColumns], int slot) const {
#pragma unroll
        for (int j = 0; j < kOwn; j++) {
            if (!has_row(j)) continue;
            const float *from = place(slot, j);
            if constexpr (kColumns == 4) {
                const float4 v = *reinterpret_cast<const float4 *>(from);
                t[j][0] = v.x, t[j][1] = v.y, t[j][2] = v.z, t[j][3] = v.w;
            } else {
#pragma unroll
                for (int c = 0; c < kColumns; c++) t[j][c] = from[c];
            }
        }
    }
    __device__ __forceinline__ void store(const float (&t)[kOwn][kColumns], int slot) const {
#pragma unroll
        for (int j = 0; j < kOwn; j++) {
            if (!has_row(j)) continue;
            float *to = place(slot, j);
            if constexpr (kColumns == 4) {
                *reinterpret_cast<float4 *>(to) = make_float4(t[j][0], t[j][1], t[j][2], t[j][3]);
            } else {
#pragma unroll
                for (int c = 0; c < kColumns; c++) to[c] = t[j][c];
            }
        }
    }
    static __device__ __forceinline__ void clear(float (&t)[kOwn][kColumns]) {
#pragma unroll
        for (int j = 0; j < kOwn; j++) {
#pragma unroll
            for (int c = 0; c < kColumns; c++) t[j][c] = 0.f;
        }
    }

    // ---- rows, by way of shared memory

    __device__ __forceinline__ float *token(int stage, int i) const { return shared + (stage * R::kChunk + i) * kToken; }

    // Rows first … end - 1 of one sequence, by all threads of the block.
    __device__ __forceinline__ void ask(int stage, int first, int end) const {
        constexpr int kStep = kWide ? 4 : 1, kOfKey = DK / kStep, kPieces = 2 * kOfKey + R::kWarps * kColumns / kStep;
        constexpr int kShares = R::kValueHeads / R::kKeyHeads;
        const int column = block * (R::kWarps * kColumns);
        for (int i = threadIdx.x; i < (end - first) * kPieces; i += kThreads) {
            const int which = i / kPieces, piece = i % kPieces;
            float *to = token(stage, which);
            const float *from = qkv + int64_t(first + which) * kWidth;
            if (piece < 2 * kOfKey) {
                const int is_key = piece / kOfKey, at = kStep * (piece % kOfKey);
                copy<kStep>(to + is_key * kK + at, from + (is_key * R::kKeyHeads + head / kShares) * DK + at);
            } else {
                const int at = kStep * (piece - 2 * kOfKey);
                if (column + at < DV)
                    copy<kStep>(to + kV + at, from + 2 * R::kKeyHeads * DK + head * DV + column + at);
            }
        }
        if (threadIdx.x < 2 * (end - first)) {
            const int which = threadIdx.x / 2, is_second = threadIdx.x % 2;
            const int64_t at = int64_t(first + which) * R::kValueHeads + head;
            cp_async_4(token(stage, which) + kGates + is_second, (is_second ? gates.second : gates.first) + at);
        }
        cp_async_commit();
    }
    template <int kStep>
    static __device__ __forceinline__ void copy(float *to, const float *from) {
        if constexpr (kStep == 4) cp_async_16(to, from);
        else cp_async_4(to, from);
    }

    // q, k and gates of a chunk, a warp a row.
    __device__ __forceinline__ void make_ready(int stage, int first, int end) const {
        for (int i = warp_index(); i < end - first; i += R::kWarps) {
            float *of = token(stage, i);
            float q[kOwn], k[kOwn], squares = 0.f, of_k = 0.f, both = 0.f;
#pragma unroll
            for (int j = 0; j < kOwn; j++) {
                q[j] = has_row(j) ? of[32 * j + lane_index()] : 0.f;
                k[j] = has_row(j) ? of[kK + 32 * j + lane_index()] : 0.f;
                squares = fmaf(q[j], q[j], squares), of_k = fmaf(k[j], k[j], of_k), both = fmaf(q[j], k[j], both);
            }
            const float q_size = R::kDelta ? R::kScale / sqrtf(warp_sum(squares) + R::kEpsilon) : R::kScale;
            const float k_size = R::kDelta ? 1.f / sqrtf(warp_sum(of_k) + R::kEpsilon) : 1.f;
            both = warp_sum(both) * q_size * k_size;
#pragma unroll
            for (int j = 0; j < kOwn; j++) {
                if (!has_row(j)) continue;
                of[32 * j + lane_index()] = q[j] * q_size;
                of[kK + 32 * j + lane_index()] = k[j] * k_size;
            }
            if (lane_index() == 0) {
                const float g = R::kSoftplus ? rate * softplus(of[kGates] + bias) : of[kGates];
                if constexpr (R::kSoftplus) of[kGates + 1] = 1.f / (1.f + expf(-of[kGates + 1]));
                of[kGates] = expf(g);
                of[kGates + 2] = both;
                of[kGates + 3] = rows.positions[first + i] == 0 ? 1.f : 0.f;
            }
        }
    }

    // ---- a row

    // A lane's parts of a vector over DK.
    static __device__ __forceinline__ void own_parts(float (&part)[kOwn], const float *of) {
        if constexpr (DK % 128 == 0) {
#pragma unroll
            for (int j = 0; j < kOwn; j += 4) {
                const float4 v = *reinterpret_cast<const float4 *>(of + own_row(j));
                part[j] = v.x, part[j + 1] = v.y, part[j + 2] = v.z, part[j + 3] = v.w;
            }
        } else {
#pragma unroll
            for (int j = 0; j < kOwn; j++) part[j] = has_row(j) ? of[own_row(j)] : 0.f;
        }
    }

    // The sums over all lanes: lane l gets the (l / kLanes)-th. Each exchange halves how many a lane has.
    static __device__ __forceinline__ float add_up(float (&sums)[kSums]) {
        int bit = 16;
#pragma unroll
        for (int n = kSums / 2; n > 0; n /= 2, bit /= 2) {
            const bool is_upper = lane_index() & bit;
#pragma unroll
            for (int i = 0; i < n; i++) {
                const float mine = is_upper ? sums[i + n] : sums[i], other = is_upper ? sums[i] : sums[i + n];
                sums[i] = mine + __shfl_xor_sync(kAllOfWarp, other, bit);
            }
        }
        float sum = sums[0];
#pragma unroll
        for (bit = kLanes / 2; bit > 0; bit /= 2) sum += __shfl_xor_sync(kAllOfWarp, sum, bit);
        return sum;
    }

    __device__ __forceinline__ void take(float (&t)[kOwn][kColumns], const float *of, int row) const {
        const float4 own_gates = *reinterpret_cast<const float4 *>(of + kGates);
        const int own = lane_index() / kLanes, column = own % kColumns;
        float q[kOwn], k[kOwn], sums[kSums] = {};
        own_parts(q, of), own_parts(k, of + kK);
        const float v = of[kV + (unit - block * R::kWarps) * kColumns + column];
        if (own_gates.w != 0.f) clear(t);
#pragma unroll
        for (int j = 0; j < kOwn; j++) {
#pragma unroll
            for (int c = 0; c < kColumns; c++) {
                t[j][c] *= own_gates.x;
                if constexpr (R::kDelta) sums[c] = fmaf(k[j], t[j][c], sums[c]);
                sums[kColumns + c] = fmaf(q[j], t[j][c], sums[kColumns + c]);
            }
        }
        const float sum = add_up(sums), news = own_gates.y * (v - (R::kDelta ? sum : 0.f));  // lower lanes have kᵀ T
#pragma unroll
        for (int c = 0; c < kColumns; c++) {
            const float of_column = __shfl_sync(kAllOfWarp, news, c * kLanes);
#pragma unroll
            for (int j = 0; j < kOwn; j++) t[j][c] = fmaf(k[j], of_column, t[j][c]);
        }
        const float result = fmaf(own_gates.z, __shfl_xor_sync(kAllOfWarp, news, 16), sum);
        if (lane_index() >= 16 && lane_index() % kLanes == 0)
            y[(int64_t(row) * R::kValueHeads + head) * DV + unit * kColumns + column] = result;
    }

    // ---- runs

    __device__ __forceinline__ void wait() {
        if (has_waited) return;
        let_next_start();
        wait_for_previous();
        has_waited = true;
    }

    // All rows of the sequence whose first is `row`.
    __device__ __forceinline__ void run(int row, int slot) {
        float t[kOwn][kColumns];
        clear(t);
        if (has_unit && rows.positions[row] != 0) load(t, slot);
        wait();
        int end = rows.template end<R::kChunk>(row, slot);
        ask(0, row, end);
        for (int stage = 0; row < R::kRows; stage ^= 1) {
            const int next = rows.from(end, slot);
            const int next_end = next < R::kRows ? rows.template end<R::kChunk>(next, slot) : next;
            cp_async_wait<0>();
            __syncthreads();  // the chunk is there, and all have left the one before
            if (next < R::kRows) ask(stage ^ 1, next, next_end);
            make_ready(stage, row, end);
            __syncthreads();
            for (int i = 0; has_unit && i < end - row; i++) take(t, token(stage, i), row + i);
            row = next, end = next_end;
        }
        if (has_unit) store(t, slot);
        __syncthreads();  // shared memory is the next run's
    }

    __device__ __forceinline__ void clear_row(int row) const {
        const int first = block * (R::kWarps * kColumns), n = min(R::kWarps * kColumns, DV - first);
        float *to = y + (int64_t(row) * R::kValueHeads + head) * DV + first;
        for (int i = threadIdx.x; i < n; i += kThreads) to[i] = 0.f;
    }

    // Blocks take stretches in turns, of which those are left that go on from another; rows of nobody too.
    __device__ __forceinline__ void all(int mine) {
        int n = 0;
#pragma unroll 1
        for (int base = 0; base < R::kRows; base += 32) {
            const int row = base + lane_index();
            uint32_t firsts = __ballot_sync(kAllOfWarp, rows.begins(row));
            uint32_t empty = __ballot_sync(kAllOfWarp, row < R::kRows && row % R::kRuns == mine && rows.positions[row] < 0);
#pragma unroll 1
            for (; firsts; firsts &= firsts - 1) {
                if (n++ % R::kRuns != mine) continue;
                const int first = base + __ffs(firsts) - 1, slot = rows.slots[first];
                if (rows.before(first, slot) < 0) run(first, slot);
            }
            if (empty) wait();
            for (; empty; empty &= empty - 1) clear_row(base + __ffs(empty) - 1);
        }
        wait();
    }
};

// qkv [kRows, 2 KH·DK + VH·DV], y [kRows, VH·DV].
template <class R>
__device__ __forceinline__ void delta_rule(const float *qkv, Gates gates, const int *positions, const int *slots,
                                           float *state, float *y) {
    using Rule = DeltaRule<R>;
    static_assert(R::kChunk <= 32 && 2 * R::kChunk <= Rule::kThreads, "threads for a chunk's gates");
    const int share = blockIdx.x % (R::kValueHeads * Rule::kBlocks), block = share % Rule::kBlocks;
    const int unit = block * R::kWarps + warp_index();
    const int head = share / Rule::kBlocks;
    Rule rule = {{positions, slots}, qkv, gates, state, y, reinterpret_cast<float *>(dynamic_shared()),
                 head, block, unit, unit < Rule::kUnits, false, R::kSoftplus ? gates.bias[head] : 0.f,
                 R::kSoftplus ? gates.rate[head] : 0.f};
    rule.all(blockIdx.x / (R::kValueHeads * Rule::kBlocks));
}
