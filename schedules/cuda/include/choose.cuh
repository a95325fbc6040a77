// The most likely token of each row of logits; and what drawing one (sample.cuh) takes of the same: the order of candidates,
// and sums over a block.
//
// One block a row reads it from L2, where the head has just written it; or a cluster of eight, where there are any, since
// L2 gives a multiprocessor 64 bytes a clock: 1.2 us of a vocabulary of 32000, 10 of 262144. Either reads a row once, 4 V
// bytes.
#pragma once

#include "device.cuh"

constexpr int SAMPLE_THREADS = 1024, SAMPLE_WARPS = SAMPLE_THREADS / 32;
constexpr int DIGIT_BITS = 11, DIGITS = 1 << DIGIT_BITS; // of a logit's key, looked at together
constexpr unsigned ALL_LANES = 0xffffffffu, NAN_BITS = 0x7fffffffu;

using u64 = unsigned long long;

// ---- the order of candidates ---------------------------------------------------------------------------------------

// A number whose order is that of the logits; 0 for what is not a number, and for nothing else. Both zeros are equal.
__device__ __forceinline__ unsigned key_of(float logit) {
    if (!(logit == logit)) return 0;
    const unsigned bits = __float_as_uint(logit + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float logit_of(unsigned key) {
    return __uint_as_float(key >> 31 ? key ^ 0x80000000u : ~key);
}

// Better candidates are greater; of equal logits the lower token.
__device__ __forceinline__ u64 rank_of(float logit, int token) {
    const unsigned key = key_of(logit);
    return key ? u64(key) << 32 | (~unsigned(token)) : 0;
}

// ---- sums and maxima over a block ----------------------------------------------------------------------------------

struct SampleShared {
    unsigned low[DIGITS], high[DIGITS]; // halves of a histogram's sums
    u64 parts[SAMPLE_WARPS];
    u64 before, through;
    int place;
};

__device__ inline u64 warp_total(u64 x) {
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
    return x;
}

// The sum of this lane's and all lower lanes' values.
__device__ inline u64 warp_prefix(u64 x) {
    for (int offset = 1; offset < 32; offset *= 2) {
        const u64 below = __shfl_up_sync(ALL_LANES, x, offset);
        if (lane_index() >= offset) x += below;
    }
    return x;
}

__device__ inline u64 warp_max(u64 x) {
    for (int offset = 16; offset > 0; offset /= 2) {
        const u64 other = __shfl_xor_sync(ALL_LANES, x, offset);
        x = other > x ? other : x;
    }
    return x;
}

__device__ inline u64 block_max(u64 x, SampleShared &shared) {
    x = warp_max(x);
    const int own = warp_index();
    if (lane_index() == 0) shared.parts[own] = x;
    __syncthreads();
    u64 best = 0;
    for (int warp = 0; warp < SAMPLE_WARPS; warp++) best = shared.parts[warp] > best ? shared.parts[warp] : best;
    __syncthreads();
    return best;
}

// The sum over the threads below this one, and over all.
struct BlockPrefix {
    u64 before, total;
};

__device__ inline BlockPrefix block_prefix(u64 x, SampleShared &shared) {
    const u64 through = warp_prefix(x);
    const int own = warp_index();
    if (lane_index() == 31) shared.parts[own] = through;
    __syncthreads();
    BlockPrefix prefix = {through - x, 0};
    for (int warp = 0; warp < SAMPLE_WARPS; warp++) {
        if (warp < own) prefix.before += shared.parts[warp];
        prefix.total += shared.parts[warp];
    }
    __syncthreads();
    return prefix;
}

// ---- the most likely token -----------------------------------------------------------------------------------------

// Of those of V logits that one of N threads has, one after the other.
template <int V, int N> __device__ u64 best_of_each(const float *logits, int thread) {
    u64 best = 0;
    for (int i = thread; i < V; i += N) {
        const u64 rank = rank_of(logits[i], i);
        best = rank > best ? rank : best;
    }
    return best;
}

// The same four at a time, of which TOGETHER are asked for at once, the last ones too: the largest of four is compared
// with the largest so far. What is no number is no maximum; 0 where all are -infinity or none.
template <int V, int N, int TOGETHER = 8> __device__ u64 best_of_fours(const float *logits, int thread) {
    constexpr int FOURS = V / 4;
    float best = -INFINITY;
    int token = 0;
    for (int first = thread; first < FOURS; first += TOGETHER * N) {
        uint4 some[TOGETHER];
#pragma unroll
        for (int k = 0; k < TOGETHER; k++) {
            const int i = first + k * N;
            some[k] = i < FOURS ? load_16(logits + 4 * i) : make_uint4(NAN_BITS, NAN_BITS, NAN_BITS, NAN_BITS);
        }
#pragma unroll
        for (int k = 0; k < TOGETHER; k++) {
            const float a = __uint_as_float(some[k].x), b = __uint_as_float(some[k].y), c = __uint_as_float(some[k].z);
            const float most = fmaxf(fmaxf(a, b), fmaxf(c, __uint_as_float(some[k].w)));
            if (most > best) {
                best = most;
                token = 4 * (first + k * N) + (a == most ? 0 : b == most ? 1 : c == most ? 2 : 3);
            }
        }
    }
    return best > -INFINITY ? rank_of(best, token) : 0;
}

template <int V> __device__ u64 best_rank(const float *logits, SampleShared &shared) {
    u64 best = 0;
    if constexpr (V % 4 == 0) best = block_max(best_of_fours<V, SAMPLE_THREADS>(logits, threadIdx.x), shared);
    return best ? best : block_max(best_of_each<V, SAMPLE_THREADS>(logits, threadIdx.x), shared);  // all threads alike
}

__device__ __forceinline__ int token_of(u64 rank) { return rank ? int(~unsigned(rank)) : -1; }

// Where tokens go, one for each row or draw: chosen, to be copied from; next, what the step behind embeds, so that it is
// always a token; told, memory of the host, which reads it when the kernel has ended.
struct Tokens {
    int *chosen, *next, *told;

    // By one thread.
    __device__ __forceinline__ void put(int row, int token) const {
        chosen[row] = token;
        next[row] = token < 0 ? 0 : token;
        told[row] = token;
    }
};

// logits [gridDim.x, V] -> tokens [gridDim.x]
template <int V> __device__ void choose(const float *logits, const Tokens &tokens) {
    __shared__ SampleShared shared;
    wait_for_previous();
    let_next_start();
    const u64 best = best_rank<V>(logits + long(blockIdx.x) * V, shared);
    if (threadIdx.x == 0) tokens.put(blockIdx.x, token_of(best));
}

#ifdef LLMC_HAS_BULK_COPY

constexpr int CHOOSER_BLOCKS = 8, CHOOSER_THREADS = 128, CHOOSERS = CHOOSER_BLOCKS * CHOOSER_THREADS;
constexpr int CHOOSER_WARPS = CHOOSERS / 32;

// Shared memory of a block of choose_together(): what the warps of all blocks have found, in the first block's.
struct Found {
    uint4 ranks[CHOOSER_WARPS];  // of which half is used: what a thread stores in another block is 16 bytes
    uint64_t all;                // the barrier that counts them

    // A warp's, by one lane.
    __device__ __forceinline__ void put(int warp, u64 rank) {
        const float high = __uint_as_float(unsigned(rank >> 32)), low = __uint_as_float(unsigned(rank));
        store_in(ranks + warp, make_float4(high, low, 0.f, 0.f), &all, 0);
    }
    __device__ __forceinline__ u64 get(int warp) const { return u64(ranks[warp].x) << 32 | ranks[warp].y; }
};
static_assert(CHOOSER_WARPS == 32, "a lane of the first warp for each");

// The same by a cluster of CHOOSER_BLOCKS for each row, all of whose threads share its logits out. Each warp tells the
// first block what it has found, and that one's first warp, when all have, which is best. Blocks are small enough to find
// room beside those of the head, and wait for it there.
template <int V> __device__ void choose_together(const float *logits, const Tokens &tokens) {
    Found &found = *reinterpret_cast<Found *>(dynamic_shared());
    const int rank = cluster_rank(), row = blockIdx.x / CHOOSER_BLOCKS, warp = warp_index();
    if (threadIdx.x == 0) {
        mbarrier_init(&found.all, 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect(&found.all, sizeof found.ranks);
    }
    __syncwarp();
    cluster_arrive();
    cluster_wait();
    wait_for_previous();
    let_next_start();
    logits += long(row) * V;
    const int thread = rank * CHOOSER_THREADS + threadIdx.x;
    u64 best;
    if constexpr (V % 4 == 0) {
        best = best_of_fours<V, CHOOSERS, (V > 8 * 4 * CHOOSERS ? 16 : 8)>(logits, thread);
    } else {
        best = best_of_each<V, CHOOSERS>(logits, thread);
    }
    best = warp_max(best);
    if (lane_index() == 0) found.put(thread / 32, best);
    if (rank > 0 || warp > 0) return;
    mbarrier_wait(&found.all, 0);
    best = warp_max(found.get(lane_index()));
    if (V % 4 == 0 && !best) best = warp_max(best_of_each<V, 32>(logits, lane_index()));  // all are -infinity, or none
    if (lane_index() == 0) tokens.put(row, token_of(best));
}

#endif
