// Which experts a token goes through, and by what share: the k of the largest scores, and their scores.
//
//     score = softmax(x) or sigmoid(x)      better = score [+ bias] [in the best groups alone, kFill elsewhere]
//     index = the k of the largest `better`, the first of equals first;  share = score there [over their sum]
//
// A warp a token, experts lane, lane + 32, … in its registers; k times the largest of those that are left. 4 E bytes come
// and 12 k go: what it costs is its launch, and k exchanges one after the other.
#pragma once

#include "device.cuh"

constexpr int kRouterWarps = 4;

// A number whose order is that of the scores; 0 for what is not a number.
__device__ __forceinline__ uint32_t order_of(float score) {
    if (!(score == score)) return 0;
    const uint32_t bits = __float_as_uint(score + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// `R` says kTokens, kExperts, kChosen (at most 32), kSigmoid, kBias, kNormed, kLeast: of the sum, and kGroups (1: none, at
// most 32), kKept of them, kBest: scores (1 or 2) whose sum says how good one is, fill().
template <class R>
struct Router {
    static constexpr int kOwn = (R::kExperts + 31) / 32, kGroupExperts = R::kExperts / R::kGroups;

    float scores[kOwn], better[kOwn];

    static __device__ int expert(int i) { return lane_index() + 32 * i; }
    static __device__ bool is_expert(int i) { return R::kExperts % 32 == 0 || expert(i) < R::kExperts; }

    __device__ void score(const float *x) {
        float v[kOwn], most = -INFINITY, sum = 0;
#pragma unroll
        for (int i = 0; i < kOwn; i++) {
            v[i] = is_expert(i) ? x[expert(i)] : -INFINITY;
            most = fmaxf(most, v[i]);
        }
        if constexpr (!R::kSigmoid) most = warp_max(most);
#pragma unroll
        for (int i = 0; i < kOwn; i++) {
            scores[i] = expf(R::kSigmoid ? -v[i] : v[i] - most);
            if constexpr (R::kSigmoid) scores[i] = 1.0f / (1.0f + scores[i]);
            if (is_expert(i)) sum += scores[i];
        }
        if constexpr (!R::kSigmoid) {
            sum = warp_sum(sum);
#pragma unroll
            for (int i = 0; i < kOwn; i++) scores[i] /= sum;
        }
    }

    // room: for a number of each expert, in shared memory.
    __device__ void keep_groups(float *room) {
#pragma unroll
        for (int i = 0; i < kOwn; i++) {
            if (is_expert(i)) room[expert(i)] = better[i];
        }
        __syncwarp();
        float first = -INFINITY, second = -INFINITY;  // the largest of this lane's group
        if (lane_index() < R::kGroups) {
            for (int i = 0; i < kGroupExperts; i++) {
                const float v = room[lane_index() * kGroupExperts + i];
                second = v > first ? first : fmaxf(second, v);
                first = fmaxf(first, v);
            }
        }
        const float good = R::kBest == 2 ? first + second : first;
        int n_better = 0;
        for (int group = 0; group < R::kGroups; group++) {
            const float other = __shfl_sync(0xffffffffu, good, group);
            n_better += other > good || (other == good && group < lane_index());
        }
        const uint32_t kept = __ballot_sync(0xffffffffu, lane_index() < R::kGroups && n_better < R::kKept);
#pragma unroll
        for (int i = 0; i < kOwn; i++) {
            if (is_expert(i) && !(kept >> expert(i) / kGroupExperts & 1)) better[i] = R::fill();
        }
    }

    __device__ void choose(float *share, long long *index) const {
        uint32_t taken = 0;  // a bit for each of the lane's experts
        float own_share = 0;
        int own_index = 0;
#pragma unroll 1
        for (int j = 0; j < R::kChosen; j++) {
            uint32_t best = 0;
            int place = 0x7fffffff;
            float of_best = 0;
#pragma unroll
            for (int i = 0; i < kOwn; i++) {
                const uint32_t order = order_of(better[i]);
                if (is_expert(i) && !(taken >> i & 1) && (place == 0x7fffffff || order > best)) {
                    best = order, place = expert(i), of_best = scores[i];
                }
            }
            for (int offset = 16; offset > 0; offset /= 2) {
                const uint32_t other = __shfl_xor_sync(0xffffffffu, best, offset);
                const int there = __shfl_xor_sync(0xffffffffu, place, offset);
                const float its = __shfl_xor_sync(0xffffffffu, of_best, offset);
                if (there != 0x7fffffff && (place == 0x7fffffff || other > best || (other == best && there < place))) {
                    best = other, place = there, of_best = its;
                }
            }
            if (place % 32 == lane_index()) taken |= 1u << place / 32;
            if (j == lane_index()) own_share = of_best, own_index = place;
        }
        if constexpr (R::kNormed) own_share /= fmaxf(warp_sum(own_share), R::kLeast);
        if (lane_index() < R::kChosen) share[lane_index()] = own_share, index[lane_index()] = own_index;
    }
};

template <class R>
__device__ __forceinline__ void route(const float *x, const float *bias, float *share, long long *index) {
    __shared__ float room[R::kGroups > 1 ? kRouterWarps : 1][R::kGroups > 1 ? R::kExperts : 1];
    using Own = Router<R>;
    wait_for_previous();
    let_next_start();
    const int token = blockIdx.x * kRouterWarps + warp_index();
    if (token >= R::kTokens) return;
    Own router;
    router.score(x + int64_t(token) * R::kExperts);
#pragma unroll
    for (int i = 0; i < Own::kOwn; i++) {
        router.better[i] = router.scores[i];
        if constexpr (R::kBias) router.better[i] += Own::is_expert(i) ? bias[Own::expert(i)] : 0.0f;
    }
    if constexpr (R::kGroups > 1) router.keep_groups(room[R::kGroups > 1 ? warp_index() : 0]);
    router.choose(share + int64_t(token) * R::kChosen, index + int64_t(token) * R::kChosen);
}
