// A selective scan: each channel keeps N states in the sequence's slot, and for each row, whose b and c [N] all channels
// share,
//
//     d = log(1 + exp(dt + bias));   T = exp(d · rate) · T + d · x · b;   y = (Tᵀ c + skip · x) · silu(gate)
//
// (Gu and Dao 2023, arXiv:2312.00752.) Channels do not see each other. A few lanes have one, a part of its states each, in
// their registers through all rows of a sequence: they read them once and write them once, and no warp waits for another.
// Rows come kAhead at a time, the next while these are taken. The sum over states goes over a lane's own in order, then
// over the lanes by halves, for every row alike.
//
// Bytes: 8 C N a sequence of a step, asked for before the launch in front has ended: nobody else in a step touches this
// layer's states; 16 C + 8 N a row. A prompt is bound by its rows' order, N / kLanes exponentials each and three for d and
// the gate.
#pragma once

#include "state_rows.cuh"

// `S` says kRows, kChannels: C, kStates: N; kLanes: that have a channel; kWarps; kRuns: of how many runs blocks take turns;
// kStride: float32 from a slot to the next.
template <class S>
struct SelectiveScan {
    static constexpr int kThreads = 32 * S::kWarps, kOfBlock = kThreads / S::kLanes;  // channels
    static constexpr int kBlocks = (S::kChannels + kOfBlock - 1) / kOfBlock;
    static constexpr int kOwn = S::kStates / S::kLanes;  // states of a lane
    static constexpr int kAhead = kOwn <= 4 ? 4 : 1;

    // What goes in. x, dt, gate [kRows, kChannels], of this channel on; b, c [kRows, N], of the lane's first state on.
    const float *x, *dt, *gate, *b, *c;
    float *state;  // [slots][C][N], of the lane's first state on
    float *y;      // [kRows, kChannels], of this channel on
    StateRows<S::kRows> rows;
    bool has_channel, has_waited;
    float rate[kOwn], bias, skip;

    struct Row {
        float x, dt, gate, b[kOwn], c[kOwn];
    };

    static __device__ __forceinline__ void read(float (&to)[kOwn], const float *from) {
        if constexpr (kOwn == 4) {
            const float4 v = *reinterpret_cast<const float4 *>(from);
            to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        } else {
#pragma unroll
            for (int n = 0; n < kOwn; n++) to[n] = from[n];
        }
    }
    static __device__ __forceinline__ void write(float *to, const float (&from)[kOwn]) {
        if constexpr (kOwn == 4) {
            *reinterpret_cast<float4 *>(to) = make_float4(from[0], from[1], from[2], from[3]);
        } else {
#pragma unroll
            for (int n = 0; n < kOwn; n++) to[n] = from[n];
        }
    }
    static __device__ __forceinline__ void clear(float (&t)[kOwn]) {
#pragma unroll
        for (int n = 0; n < kOwn; n++) t[n] = 0.f;
    }
    __device__ __forceinline__ float *kept(int slot) const { return state + slot * int64_t(S::kStride); }

    __device__ __forceinline__ void wait() {
        if (has_waited) return;
        let_next_start();
        wait_for_previous();
        has_waited = true;
    }

    // Rows first … end - 1, kAhead at most; the last again in the place of those that there are not.
    __device__ __forceinline__ void read(Row (&to)[kAhead], int first, int end) const {
#pragma unroll
        for (int i = 0; i < kAhead; i++) {
            const int64_t row = min(first + i, end - 1), at = row * S::kChannels;
            to[i].x = x[at], to[i].dt = dt[at], to[i].gate = gate[at];
            read(to[i].b, b + row * S::kStates), read(to[i].c, c + row * S::kStates);
        }
    }

    __device__ __forceinline__ void take(float (&t)[kOwn], const Row &of, int row) const {
        const float d = softplus(of.dt + bias), news = d * of.x;
        float sum = 0.f;
        if (rows.positions[row] == 0) clear(t);
#pragma unroll
        for (int n = 0; n < kOwn; n++) {
            t[n] = fmaf(expf(d * rate[n]), t[n], news * of.b[n]);
            sum = fmaf(t[n], of.c[n], sum);
        }
#pragma unroll
        for (int bit = S::kLanes / 2; bit > 0; bit /= 2) sum += __shfl_xor_sync(kAllOfWarp, sum, bit);
        const float silu = of.gate / (1.f + expf(-of.gate));
        if (is_first()) y[int64_t(row) * S::kChannels] = fmaf(skip, of.x, sum) * silu;
    }

    // Of the lanes of a channel that there is.
    __device__ __forceinline__ bool is_first() const { return has_channel && lane_index() % S::kLanes == 0; }

    // All rows of the sequence whose first is `row`.
    __device__ __forceinline__ void run(int row, int slot) {
        float t[kOwn];
        clear(t);
        if (rows.positions[row] != 0) read(t, kept(slot));
        wait();
        while (row < S::kRows) {
            const int end = rows.template end<32>(row, slot);
            Row now[kAhead], next[kAhead];
            read(now, row, end);
#pragma unroll 1
            for (; row < end; row += kAhead) {
                if (row + kAhead < end) read(next, row + kAhead, end);
#pragma unroll
                for (int i = 0; i < kAhead; i++)
                    if (row + i < end) take(t, now[i], row + i);
#pragma unroll
                for (int i = 0; i < kAhead; i++) now[i] = next[i];
            }
            row = rows.from(end, slot);
        }
        if (has_channel) write(kept(slot), t);
    }

    // Blocks take stretches in turns, of which those are left that go on from another; rows of nobody too.
    __device__ __forceinline__ void all(int mine) {
        int n = 0;
#pragma unroll 1
        for (int base = 0; base < S::kRows; base += 32) {
            const int row = base + lane_index();
            uint32_t firsts = __ballot_sync(kAllOfWarp, rows.begins(row));
            uint32_t empty = __ballot_sync(kAllOfWarp, row < S::kRows && row % S::kRuns == mine && rows.positions[row] < 0);
#pragma unroll 1
            for (; firsts; firsts &= firsts - 1) {
                if (n++ % S::kRuns != mine) continue;
                const int first = base + __ffs(firsts) - 1, slot = rows.slots[first];
                if (rows.before(first, slot) < 0) run(first, slot);
            }
            if (empty) wait();
            for (; empty; empty &= empty - 1)
                if (is_first()) y[int64_t(base + __ffs(empty) - 1) * S::kChannels] = 0.f;
        }
        wait();
    }
};

// x, dt, gate, y [kRows, C], b, c [kRows, N], rate [C, N], bias, skip [C].
template <class S>
__device__ __forceinline__ void selective_scan(const float *x, const float *dt, const float *gate, const float *b,
                                               const float *c, const float *rate, const float *bias, const float *skip,
                                               const int *positions, const int *slots, float *state, float *y) {
    using Scan = SelectiveScan<S>;
    const int channel = blockIdx.x % Scan::kBlocks * Scan::kOfBlock + threadIdx.x / S::kLanes;
    const int own = min(channel, S::kChannels - 1), part = threadIdx.x % S::kLanes * Scan::kOwn;
    const int first = own * S::kStates + part;
    Scan scan = {x + own, dt + own, gate + own, b + part, c + part, state + first, y + own, {positions, slots},
                 channel < S::kChannels, false};
    Scan::read(scan.rate, rate + first);
    scan.bias = bias[own], scan.skip = skip[own];
    scan.all(blockIdx.x / Scan::kBlocks);
}
