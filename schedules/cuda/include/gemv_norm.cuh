// A norm between two products of few tokens (deferred_norm.py): what gemm_norm.cuh does, for a GEMV.
//
//     in front    one warp finishes a strip: it has 16 outputs of each token, and hands on their moments
//     behind      each warp merges the parts of a token or two, always in the same order, while its ring fills: mean and
//                 1/d in shared memory, which the barrier at the first band's end shows to all
#pragma once

#include "epilogue.cuh"

constexpr int kPart = kStripRows;  // columns

// A GEMV `G` also says kMoments, whether it prepares the norm behind it, and kDeferred, whether it applies kNorm to its
// sums, and not to x.
template <class G>
struct GemvNorm {
    static constexpr bool kCentred = G::kDeferred && G::kNorm == Norm::layer;

    // Of rows g and g + 8 of a strip, worth reading long before their sums are ready.
    struct Rows {
        float weight_sums[2];
        float scales[2];  // of the norm behind
    };

    static __device__ Rows read(const Epilogue<G> &epilogue, int strip) {
        Rows rows = {};
        const int n = strip * Epilogue<G>::kOutputs + lane_index() / 4;
        for (int i = 0; i < 2; i++) {
            const int output = G::kGated ? n : n + 8 * i;
            if (!Epilogue<G>::is_output(output)) continue;
            if constexpr (kCentred) rows.weight_sums[i] = epilogue.front.weight_sums[G::kGated ? n + i * G::kN : output];
            if constexpr (G::kMoments) rows.scales[i] = epilogue.next.weight[output];
        }
        return rows;
    }

    // norms[token] = (mean, 1/d) from parts [K/16][M]. Two tokens share a warp if there are more tokens than warps: all
    // loads of most blocks are then under way at a time.
    static __device__ void merge(float2 *norms, const float2 *parts) {
        using RowMoments = Moments<kCentred>;
        constexpr int kLanes = G::kM > G::kWarps ? 16 : 32, kTogether = 32 / kLanes, kParts = G::kK / kPart;
        static_assert(G::kK % kTile == 0, "whole parts");
        for (int first = warp_index() * kTogether; first < G::kM; first += G::kWarps * kTogether) {
            const int token = first + lane_index() / kLanes;
            RowMoments mine;
#pragma unroll 16
            for (int part = lane_index() % kLanes; part < kParts && token < G::kM; part += kLanes) {
                mine.merge(moments_of<kCentred>(parts[part * G::kM + token], kPart));
            }
            const RowMoments all = mine.template over_lanes<kLanes>();
            if (lane_index() % kLanes == 0 && token < G::kM) norms[token] = {all.mean, all.factor(G::kEpsilon)};
        }
    }

    // To a thread's sums, of rows g, g + 8 for tokens 2t, 2t + 1.
    static __device__ void apply(float (&sums)[4], const float2 *norms, int first_token, const Rows &rows) {
        for (int j = 0; j < 2; j++) {
            const int token = first_token + lane_index() % 4 * 2 + j;
            if (token >= G::kM) continue;
            const float2 norm = norms[token];
            for (int i = 0; i < 2; i++) {
                float &sum = sums[2 * i + j];
                if constexpr (kCentred) sum -= norm.x * rows.weight_sums[i];
                sum *= norm.y;
            }
        }
    }

    // Stores y, y ∘ weight of the norm behind, and moments of y's strip; a whole warp calls.
    static __device__ void write(const Epilogue<G> &epilogue, int strip, int first_token, const float (&sums)[4],
                                 const typename Epilogue<G>::Addends &addends, const Rows &rows) {
        static_assert(!G::kGated && G::kN % kTile == 0 && G::kActivation == Activation::none, "a sum of whole tiles");
        const int g = lane_index() / 4, n = strip * kStripRows + g;
        for (int j = 0; j < 2; j++) {
            const int token = first_token + lane_index() % 4 * 2 + j;
            float v[2];
            for (int i = 0; i < 2; i++) v[i] = sums[2 * i + j] + addends.bias[i] + addends.residual[2 * i + j];
            const float mean = sum_of_rows(v[0] + v[1]) / kPart, low = v[0] - mean, high = v[1] - mean;
            const float squares = sum_of_rows(low * low + high * high);
            if (token >= G::kM) continue;
            for (int i = 0; i < 2; i++) {
                epilogue.store(token, n + 8 * i, v[i]);
                epilogue.next.scaled[activation_index(round_up(G::kM, 8), token, n + 8 * i)] =
                    round_to<typename G::T>(v[i] * rows.scales[i]);
            }
            if (g == 0) epilogue.next.moments[strip * G::kM + token] = make_float2(mean, squares);
        }
    }

  private:
    // The sum over the lanes of a token, eight rows, in each of them.
    static __device__ float sum_of_rows(float x) {
#pragma unroll
        for (int offset = 16; offset > 2; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
        return x;
    }
};
