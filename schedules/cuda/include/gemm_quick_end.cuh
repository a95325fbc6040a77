// The end of a tile in a straight line: the same sums, staging and stores as gemm_epilogue.cuh's TileEnd, in other order.
//
// A thread's pieces lie in the same outputs, of tokens that are a constant apart: one pointer and one condition serve
// them all. So no branch stands between them, and what a thread waits for it waits for once in 32 tokens:
//
//     meet | 16 sums to shared memory | meet | all pieces from there, + residual | residual of two rounds later | stores
//
// where TileEnd takes its pieces one by one, each from the shared memory to its own address behind its own branch, and
// reads the residual one round ahead.
#pragma once

#include "gemm_epilogue.cuh"

// The end of 64 rows of a tile, for one thread, as TileEnd.
template <class Tiling, bool kEarly>
struct QuickEnd {
    using L = typename Tiling::L;
    using Way = Writer<L>;
    static constexpr int kPieces = Way::kPieces, kWidth = kPiece<L>;
    static constexpr int kStep = 128 / Way::kTokenPieces;  // tokens from a piece to the next
    static constexpr int kPaddedM = round_up(L::kM, 8);
    static constexpr bool kAllStaged = Tiling::kTokens % kStagedTokens == 0;
    static constexpr bool kAllTokens = L::kM % Tiling::kTokens == 0 && kAllStaged;
    static constexpr bool kAllOutputs = L::kN % kTile == 0 && Tiling::kFullTiles;
    static_assert(!Epilogue<L>::kTiled || kStep % 8 == 0, "a swizzle is the same for all pieces");

    const Epilogue<L> &epilogue;
    Warpgroup group;
    RowEpilogue<Tiling> rows;
    int first_token, token, output;  // the tile's; of the first piece
    int left;                        // tokens from it to the end of those that are stored
    alignas(16) float residual[L::kResidual ? 2 : 1][L::kResidual ? kPieces : 1][kWidth];
    alignas(16) float scale[4];  // of the norm behind

    __device__ __forceinline__ QuickEnd(const Place &place, const Warpgroup &group, const Epilogue<L> &epilogue)
        : epilogue(epilogue), group(group),
          rows((place.tile_row + group.part) * kGroupOutputs<L>, group.thread / 32, lane_index() / 4),
          first_token(place.token), token(place.token + group.thread / Way::kTokenPieces),
          output((place.tile_row + group.part) * kGroupOutputs<L> + staged_output()),
          left(kAllOutputs || output < Way::n_stored ? end_token() - token : 0) {
        if constexpr (kEarly) read();
    }

    __device__ int staged_output() const { return group.thread % Way::kTokenPieces * kWidth; }

    __device__ int end_token() const { return kAllStaged ? L::kM : min(L::kM, first_token + Tiling::kTokens); }

    // Whether the piece `later` tokens behind the first one is stored.
    __device__ bool is_there(int later) const { return (kAllOutputs && kAllTokens) || later < left; }

    __device__ __forceinline__ void read() {
        if constexpr (L::kMoments) {
            static_assert(!L::kGated && L::kN % kTile == 0 && kWidth == 4, "16 threads have a token's 64 outputs");
            const float *from = epilogue.next.weight + output;
            if (kAllOutputs || output < L::kN) {
                *reinterpret_cast<float4 *>(scale) = *reinterpret_cast<const float4 *>(from);
            }
        }
        read_residual(0);
        read_residual(kStagedTokens);
        rows.read(epilogue);
    }

    // Of the 32 tokens from the tile's `first`-th on.
    __device__ __forceinline__ void read_residual(int first) {
        if constexpr (L::kResidual) {
            if (first >= Tiling::kTokens) return;
            auto &to = residual[first / kStagedTokens % 2];
            const float *from = epilogue.residual + int64_t(token) * L::kN + output;
#pragma unroll
            for (int i = 0; i < kPieces; i++) {
                const int later = first + i * kStep;
                if constexpr (kWidth == 4) {
                    const auto *piece = reinterpret_cast<const float4 *>(from + later * L::kN);
                    const float4 read = is_there(later) ? *piece : make_float4(0, 0, 0, 0);
                    *reinterpret_cast<float4 *>(to[i]) = read;
                } else {
#pragma unroll
                    for (int j = 0; j < kWidth; j++) {
                        to[i][j] = is_there(later) && output + j < L::kN ? from[later * L::kN + j] : 0;
                    }
                }
            }
        }
    }

    // staging: the warpgroup's, in shared memory.
    __device__ __forceinline__ void store(const float (&sums)[Tiling::kRowSums], float *staging) {
        if constexpr (!kEarly) read();
        const float2 *norms = norms_at<Tiling>(epilogue.front.norms, first_token);
#pragma unroll
        for (int first = 0; first < Tiling::kTokens; first += kStagedTokens) {
            group.meet();  // the last tokens have left the shared memory
            stage_tokens<Tiling>(sums, staging, rows, first / 2, group.thread / 32, norms);
            group.meet();
            float v[kPieces][kWidth];
            take(v, staging, first);
            read_residual(first + 2 * kStagedTokens);
#pragma unroll
            for (int i = 0; i < kPieces; i++) {
                const int later = first + i * kStep;
                const bool there = is_there(later);
                if (there) store_piece(later, v[i]);
                if constexpr (kMomentsOfFour<L>) {
                    if (there) store_scaled(later, v[i]);
                } else if constexpr (L::kMoments) {
                    hand_on(later, v[i], there);  // all lanes together: they exchange sums
                }
            }
            if constexpr (kMomentsOfFour<L>) {
                const float2 moments = moments_of_four(v);
                const int later = first + group.thread % 16 / 4 * kStep;
                if (group.thread % 4 == 0 && is_there(later)) store_moments(later, moments);
            }
        }
    }

    // A thread's pieces from the shared memory, and what is added to them.
    __device__ __forceinline__ void take(float (&v)[kPieces][kWidth], const float *staging, int first) const {
        const float *from = staging + group.thread / Way::kTokenPieces * kStagedRow<L> + staged_output();
#pragma unroll
        for (int i = 0; i < kPieces; i++) {
#pragma unroll
            for (int j = 0; j < kWidth; j++) v[i][j] = from[i * kStep * kStagedRow<L> + j];
        }
        if constexpr (L::kResidual) {
#pragma unroll
            for (int i = 0; i < kPieces; i++) {
#pragma unroll
                for (int j = 0; j < kWidth; j++) v[i][j] += residual[first / kStagedTokens % 2][i][j];
            }
        }
    }

    __device__ __forceinline__ void store_piece(int later, const float (&v)[kWidth]) const {
        if constexpr (Epilogue<L>::kTiled) {
            using T = typename L::Y;
            const uint4 chunk = {pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3]),  //
                                 pack2<T>(v[4], v[5]), pack2<T>(v[6], v[7])};
            store_16(epilogue.y + activation_index(kPaddedM, token, output) + later * kTile, chunk);
        } else {
            float *to = epilogue.y + int64_t(token) * L::kN + output + later * L::kN;
            if constexpr (kWidth == 4) {
                *reinterpret_cast<float4 *>(to) = make_float4(v[0], v[1], v[2], v[3]);
            } else {
                *to = v[0];
            }
        }
    }

    __device__ __forceinline__ void hand_on(int later, const float (&v)[4], bool there) const {
        const float2 moments = moments_of_tile(v);
        if (!there) return;
        store_scaled(later, v);
        if (group.thread % 16 == 0) store_moments(later, moments);
    }

    __device__ __forceinline__ void store_scaled(int later, const float (&v)[4]) const {
        using T = typename L::T;
        T *to = epilogue.next.scaled + activation_index(kPaddedM, token, output) + later * kTile;
        *reinterpret_cast<uint2 *>(to) =
            make_uint2(pack2<T>(v[0] * scale[0], v[1] * scale[1]), pack2<T>(v[2] * scale[2], v[3] * scale[3]));
    }

    __device__ __forceinline__ void store_moments(int later, float2 moments) const {
        epilogue.next.moments[output / kTile * L::kM + token + later] = moments;
    }
};
