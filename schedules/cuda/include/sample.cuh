// The next token of each sequence, drawn from its logits; the most likely one is chosen by choose.cuh.
//
// One block a draw reads its row from L2, where the head has just written it: 3 times with temperature alone; top-k takes
// 5 times more, top-p 4, and the draw after either of them 3.
//
// The definition is that of runtime/src/sample.c: candidates are ordered by logit, then by token; one that is not a
// number is never chosen; a draw depends on the seed and the token's position alone. Here weights are whole numbers,
// exp((logit - best) / temperature) in units of 2^-WEIGHT_BITS, so that sums do not depend on the order of additions:
// the same row and seed give the same token, in any batch. Where a draw falls within rounding of the border of two
// tokens, the CPU may choose the other one.
#pragma once

#include "choose.cuh"

// llmc_draw_record of runtime/src/format.h
struct Draw {
    u64 seed;
    int row, position;
    float temperature, top_p;
    int top_k;
    unsigned reserved;
};
static_assert(sizeof(Draw) == 32, "as the runtime writes it");

// ---- walks ---------------------------------------------------------------------------------------------------------

// How much a candidate counts in a walk.
struct Weight {
    float best, temperature, unit;
    __device__ u64 operator()(float logit) const {
        if (!(logit == logit)) return 0;
        return logit == best ? u64(unit) : u64(expf((logit - best) / temperature) * unit);
    }
};

struct One {
    __device__ u64 operator()(float logit) const { return logit == logit; }
};

template <class Measure> struct OfKey {
    Measure measure;
    unsigned key;
    __device__ u64 operator()(float logit) const { return key_of(logit) == key ? measure(logit) : 0; }
};

// Where a walk over candidates stops: at the first one at which the sum of what they count exceeds a target.
struct Stop {
    unsigned key;
    int token;
    u64 through; // the sum, this candidate included
};

// In the order of tokens. Each warp sums up a stretch of them; the one that holds the target looks closer.
template <int V, class Measure>
__device__ Stop walk_tokens(const float *logits, const Measure &measure, u64 target, SampleShared &shared) {
    constexpr int STRETCH = (V + SAMPLE_THREADS - 1) / SAMPLE_THREADS * 32;
    const int first = warp_index() * STRETCH, end = first + STRETCH < V ? first + STRETCH : V;
    u64 sum = 0;
    for (int i = first + lane_index(); i < end; i += 32) sum += measure(logits[i]);
    sum = warp_total(sum);
    u64 before = block_prefix(lane_index() == 0 ? sum : 0, shared).before;
    before = __shfl_sync(ALL_LANES, before, 0);
    if (threadIdx.x == 0) shared.place = -1; // block_prefix has made sure that nobody still reads it
    __syncthreads();
    if (before <= target && target < before + sum) {
        for (int group = first; group < end; group += 32) {
            const int i = group + lane_index();
            const u64 through = before + warp_prefix(i < end ? measure(logits[i]) : 0);
            const unsigned passed = __ballot_sync(ALL_LANES, through > target);
            if (passed) {
                if (lane_index() == __ffs(passed) - 1) shared.place = i, shared.through = through;
                break;
            }
            before = __shfl_sync(ALL_LANES, through, 31);
        }
    }
    __syncthreads();
    const int token = shared.place;
    const Stop stop = {token < 0 ? 0 : key_of(logits[token]), token, shared.through};
    __syncthreads();
    return stop;
}

// Adds to a digit's sum. Most logits share a few first digits, where a multiprocessor adds 32 bits at once but 64 in a
// loop of comparisons that all others make fail.
__device__ __forceinline__ void add_to(SampleShared &shared, int digit, u64 counts) {
    const unsigned low = unsigned(counts);
    if (!counts) return;
    const unsigned old = atomicAdd(&shared.low[digit], low), high = unsigned(counts >> 32) + (old + low < low);
    if (high) atomicAdd(&shared.high[digit], high);
}

__device__ __forceinline__ u64 sum_of(const SampleShared &shared, int digit) {
    return u64(shared.high[digit]) << 32 | shared.low[digit];
}

// From the best candidate on. The key of the last one is found digit by digit, by histograms of what candidates count
// whose digits so far are the same; among those of that key the order is that of tokens.
template <int V, class Measure>
__device__ Stop walk_best(const float *logits, const Measure &measure, u64 target, SampleShared &shared) {
    unsigned key = 0;
    u64 above = 0; // what candidates with greater keys count
    for (int left = 32; left > 0;) {
        const int bits = left % DIGIT_BITS ? left % DIGIT_BITS : DIGIT_BITS, shift = left - bits;
        for (int i = threadIdx.x; i < DIGITS; i += SAMPLE_THREADS) shared.low[i] = shared.high[i] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < V; i += SAMPLE_THREADS) {
            const float logit = logits[i];
            const unsigned own = key_of(logit);
            if (left < 32 && own >> left != key >> left) continue;
            add_to(shared, own >> shift & ((1u << bits) - 1), measure(logit));
        }
        __syncthreads();
        constexpr int OWN = DIGITS / SAMPLE_THREADS; // digits of a thread, greater ones first
        u64 counts[OWN], sum = 0;
        for (int i = 0; i < OWN; i++) sum += counts[i] = sum_of(shared, DIGITS - 1 - (threadIdx.x * OWN + i));
        u64 before = above + block_prefix(sum, shared).before;
        if (threadIdx.x == 0) shared.place = 0, shared.before = above;
        __syncthreads();
        for (int i = 0; i < OWN; before += counts[i++])
            if (before <= target && target < before + counts[i])
                shared.place = DIGITS - 1 - (threadIdx.x * OWN + i), shared.before = before;
        __syncthreads();
        key |= unsigned(shared.place) << shift;
        above = shared.before;
        left = shift;
        __syncthreads();
    }
    Stop stop = walk_tokens<V>(logits, OfKey<Measure>{measure, key}, target - above, shared);
    stop.through += above;
    return stop;
}

// What candidates count up to a stop, in a walk from the best on.
template <int V, class Measure>
__device__ u64 sum_through(const float *logits, const Measure &measure, const Stop &stop, SampleShared &shared) {
    u64 sum = 0;
    for (int i = threadIdx.x; i < V; i += SAMPLE_THREADS) {
        const unsigned key = key_of(logits[i]);
        if (key > stop.key || (key == stop.key && i <= stop.token)) sum += measure(logits[i]);
    }
    return block_prefix(sum, shared).total;
}

// ---- the draw ------------------------------------------------------------------------------------------------------

// SplitMix64's output function (Steele, Lea, Flood 2014).
__device__ __forceinline__ u64 mix(u64 x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

// In [0, 1), a function of the two.
__device__ __forceinline__ double uniform(u64 seed, u64 position) {
    const u64 bits = mix(mix(seed + 0x9e3779b97f4a7c15ull) + (position + 1) * 0x9e3779b97f4a7c15ull);
    return double(bits >> 11) * 0x1p-53;
}

// The greatest whole number below the limit, and at most `most`.
__device__ __forceinline__ u64 below(double limit, u64 most) {
    const u64 whole = u64(limit);
    const u64 target = double(whole) < limit || whole == 0 ? whole : whole - 1;
    return target < most ? target : most;
}

// logits [rows, V], draws [gridDim.x] -> tokens [gridDim.x]: the token, or -1 where no logit is a number
template <int V> __device__ void draw(const float *logits, const Draw *draws, const Tokens &tokens) {
    constexpr int VOCABULARY_BITS = V <= 1 << 18 ? 18 : 30; // sums of weights are below 2^63
    __shared__ SampleShared shared;
    wait_for_previous();
    let_next_start();
    const Draw how = draws[blockIdx.x];
    if (how.row < 0) {
        if (threadIdx.x == 0) tokens.put(blockIdx.x, -1);
        return;
    }
    logits += long(how.row) * V;
    const u64 best = best_rank<V>(logits, shared);
    const Weight weight = {logit_of(unsigned(best >> 32)), how.temperature, float(1ull << (62 - VOCABULARY_BITS))};
    const double u = uniform(how.seed, u64(how.position));
    int token = -1;
    if (best) {
        Stop last = {0, V, 0}; // of the candidates that are kept: behind all, when all are
        const bool cuts_k = how.top_k > 0 && u64(how.top_k) < sum_through<V>(logits, One(), last, shared);
        const bool cuts_p = how.top_p < 1;
        if (cuts_k) last = walk_best<V>(logits, One(), u64(how.top_k - 1), shared);
        u64 kept = sum_through<V>(logits, weight, last, shared);
        if (cuts_p) {
            const u64 enough = below(double(how.top_p) * double(kept), kept - 1);
            kept = walk_best<V>(logits, weight, enough, shared).through;
        }
        const u64 target = u64(u * double(kept)) < kept ? u64(u * double(kept)) : kept - 1;
        token = cuts_k || cuts_p ? walk_best<V>(logits, weight, target, shared).token
                                 : walk_tokens<V>(logits, weight, target, shared).token;
    }
    if (threadIdx.x == 0) tokens.put(blockIdx.x, token);
}
