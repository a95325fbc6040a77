// A short causal convolution of each channel, which keeps its last inputs in the sequence's slot.
//
//     y[t] = act(bias + sum over l of weight[l] · x[t - L + 1 + l]);   act: silu, or nothing
//
// A thread has a channel and a tile of rows. What a row needs of the L - 1 before it is in x, but for the first L - 1 rows
// of a run, which need the state too: those are all made by the thread that has the first of them, wherever the others
// stand, and it leaves the new state, so that nobody else sees it half written. Sums go from l = 0 on, in every case.
// Bytes: 8 a row and channel, 8 (L - 1) a sequence and channel.
#pragma once

#include "state_rows.cuh"

constexpr int kConvThreads = 128;

// `C` says kRows, kChannels, kTaps: L; kTile: rows of a thread; kBias, kSilu; kStride: float32 from a slot to the next.
template <class C>
struct CausalConv {
    static constexpr int kKept = C::kTaps - 1, kBlocks = (C::kChannels + kConvThreads - 1) / kConvThreads;

    const float *x;  // [kRows, kChannels], of this thread's channel on; so are the next two
    float *state;    // [slots][L - 1][kChannels]
    float *y;
    StateRows<C::kRows> rows;
    bool has_channel, has_waited;
    float weight[C::kTaps], bias;

    __device__ __forceinline__ float input(int row) const { return x[int64_t(row) * C::kChannels]; }
    __device__ __forceinline__ float *kept(int slot, int place) const {
        return state + slot * int64_t(C::kStride) + place * C::kChannels;
    }
    __device__ __forceinline__ void wait() {
        if (!has_waited) wait_for_previous();
        has_waited = true;
    }
    __device__ __forceinline__ void put(int row, float value) const {
        if (has_channel) y[int64_t(row) * C::kChannels] = value;
    }

    // window [L - 1], the oldest first; then x.
    __device__ __forceinline__ float sum(const float *window, float newest) const {
        float total = bias;
#pragma unroll
        for (int l = 0; l < kKept; l++) total = fmaf(weight[l], window[l], total);
        total = fmaf(weight[kKept], newest, total);
        if constexpr (C::kSilu) total = total / (1.f + expf(-total));
        return total;
    }

    // A row behind `window`, which it joins; zeros lie in front of a text's first.
    __device__ __forceinline__ float next(float (&window)[kKept], int row) const {
        const float newest = input(row);
        if (rows.positions[row] == 0) clear(window);
        const float value = sum(window, newest);
        push(window, newest);
        return value;
    }

    static __device__ __forceinline__ void clear(float (&window)[kKept]) {
#pragma unroll
        for (int l = 0; l < kKept; l++) window[l] = 0.f;
    }
    static __device__ __forceinline__ void push(float (&window)[kKept], float newest) {
#pragma unroll
        for (int l = 0; l < kKept; l++) window[l] = l + 1 < kKept ? window[l + 1] : newest;
    }

    // The inputs of the slot's last L - 1 rows in front of `row`. How many there are; the rest is 0.
    __device__ __forceinline__ int look_back(float (&window)[kKept], int row, int slot) const {
        int n = 0;
        bool is_cut = false;  // a text begins behind
        clear(window);
#pragma unroll
        for (int l = kKept - 1; l >= 0; l--) {
            row = row < 0 ? row : rows.before(row, slot);
            if (row < 0) continue;
            if (!is_cut) window[l] = input(row);
            is_cut |= rows.positions[row] == 0;
            n++;
        }
        return n;
    }

    // The first rows of a run, and the state behind the last.
    __device__ __forceinline__ void begin(int row, int slot) {
        float window[kKept];
        clear(window);
        if (rows.positions[row] != 0) {
#pragma unroll
            for (int l = 0; l < kKept; l++) window[l] = *kept(slot, l);
        }
        wait();
        int n = 0;
        for (; n < kKept && row < C::kRows; n++) {
            put(row, next(window, row));
            row = rows.from(row + 1, slot);
        }
        if (row < C::kRows) look_back(window, C::kRows, slot);
        if (!has_channel) return;
#pragma unroll
        for (int l = 0; l < kKept; l++) *kept(slot, l) = window[l];
    }

    // Rows one by one, of whatever sequences.
    __device__ __forceinline__ void each(int first, int end) {
        float window[kKept];
        int last = -1, n_known = 0;  // the row that `window` ends with, and how many of its run it has
#pragma unroll 1
        for (int row = first; row < end; row++) {
            if (rows.positions[row] < 0) {
                wait();
                put(row, 0.f);
                continue;
            }
            const int slot = rows.slots[row], previous = rows.before(row, slot);
            if (previous < 0) begin(row, slot);
            if (previous < 0 && C::kTile == 1) break;
            wait();
            if (previous < 0 || previous != last) n_known = look_back(window, row, slot);
            const float value = next(window, row);
            if (n_known == kKept) put(row, value);
            else n_known++;
            last = row;
        }
    }

    // Whether all rows of a tile go on from one another and from the L - 1 before, which none of them begins behind.
    __device__ __forceinline__ bool is_plain(int first, int end) const {
        const int row = first - kKept + lane_index(), slot = rows.slots[first];
        const bool is_good = row >= end || (row >= 0 && rows.is_of(row, slot) &&
                                            (rows.positions[row] != 0 || row == first - kKept));
        return end - first == C::kTile && __all_sync(kAllOfWarp, is_good);
    }

    __device__ __forceinline__ void tile(int first) {
        float in[kKept + C::kTile];
        wait();
#pragma unroll
        for (int i = 0; i < kKept + C::kTile; i++) in[i] = input(first - kKept + i);
#pragma unroll
        for (int i = 0; i < C::kTile; i++) put(first + i, sum(in + i, in[kKept + i]));
    }
};

// x, y [kRows, kChannels], weight [L, kChannels], bias [kChannels] or null.
template <class C>
__device__ __forceinline__ void causal_conv(const float *x, const float *weight, const float *bias,
                                            const int *positions, const int *slots, float *state, float *y) {
    using Conv = CausalConv<C>;
    static_assert(Conv::kKept >= 1 && C::kTile + Conv::kKept <= 32, "a lane looks at each row that a tile reads");
    const int channel = blockIdx.x % Conv::kBlocks * kConvThreads + threadIdx.x;
    const int own = min(channel, C::kChannels - 1);
    const int first = blockIdx.x / Conv::kBlocks * C::kTile, end = min(first + C::kTile, C::kRows);
    Conv conv = {x + own, state + own, y + own, {positions, slots}, channel < C::kChannels, false};
    let_next_start();
#pragma unroll
    for (int l = 0; l < C::kTaps; l++) conv.weight[l] = weight[l * C::kChannels + own];
    conv.bias = C::kBias ? bias[own] : 0.f;
    if (C::kTile > 1 && conv.is_plain(first, end)) conv.tile(first);
    else conv.each(first, end);
    conv.wait();
}
