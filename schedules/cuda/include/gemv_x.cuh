// How x comes to a block of a GEMV: all of it, [M,K] in T, to shared memory, or column by column beside the weights.
//
// A lane (g = lane / 4, t = lane % 4) multiplies with 16 elements of token g in a column of 64 of K, eight of each half.
// Which eight depends on how the weight lies (Weight::kByChunks):
//
//     by chunks     chunks t and t + 4, each read by the lane itself
//     in order      elements 2t, 2t + 1 of each chunk, mma's own order: ldmatrix reads them, four chunks at a time
//
// Shared memory holds [columns][M][8 chunks], chunk c of token m at c ^ spread(m): eight lanes that read chunks together
// (two tokens, four chunks) meet all banks, and so do eight rows of ldmatrix (eight tokens, one chunk).
#pragma once

#include "norm.cuh"

// A GEMV `G` is a layer (epilogue.cuh) that also says: kK, T, where x is (kTiledX: tiled T, else f32 [M,K]), kNorm,
// kNormBias, kEpsilon, kDeferred (whether the norm is left to the sums), kWarps, kSharedX, kKept (gemv_kept.cuh), and its
// Weight. Its tokens are taken 8 at a time.
template <class G>
struct GemvX {
    static constexpr int kColumns = ceil_div(G::kK, kTile), kTokenTiles = ceil_div(G::kM, 8);
    static constexpr int kBytes = G::kSharedX ? kColumns * G::kM * kRowBytes : 0;  // of shared memory
    static constexpr int kThreads = 32 * G::kWarps;
    static constexpr int kParts = G::kWarps > G::kM ? G::kWarps / G::kM : 1;  // of a row, when it is normalised
    static constexpr int kMomentsBytes = G::kNorm == Norm::none || G::kDeferred ? 0 : round_up(12 * kParts * G::kM, 16);

    // What a lane multiplies in one column, of a token in each 8: eight elements of each half.
    struct Column {
        uint4 chunks[kTokenTiles][2];
    };

    static __device__ int spread(int token) { return token / 2 % 4 | token % 2 * 4; }

    template <class Byte>
    static __device__ Byte *place(Byte *shared, int column, int token, int chunk) {
        return shared + (column * G::kM + token) * kRowBytes + ((chunk ^ spread(token)) << 4);
    }

    // A column of the x that `fill` brought.
    static __device__ void take_filled(Column &x, const unsigned char *shared, int column) {
        const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
        for (int i = 0; i < 2 * kTokenTiles; i++) {
            uint4 &eight = x.chunks[i / 2][i % 2];
            if constexpr (G::Weight::kByChunks) {
                const int token = i / 2 * 8 + g;
                eight = make_uint4(0, 0, 0, 0);
                if (is_token(token)) eight = load_16(place(shared, column, token, t + i % 2 * 4));
            } else {  // any row for a token that is not there: its sums are not stored
                const int token = min(i / 2 * 8 + lane_index() % 8, G::kM - 1);
                eight = load_matrices(place(shared, column, token, lane_index() / 8 + i % 2 * 4));
            }
        }
    }

    // Asks for a column of a tiled x, kSlotBytes of shared memory for a warp: each lane for the chunks that it multiplies,
    // or, in order, for the rows as they lie.
    // Rows in order are as many as there are tokens: of one token eight lanes bring 128 bytes.
    static constexpr int kColumnStep = round_up(G::kM, 8) * kRowBytes;  // bytes of a tiled x from a column to the next
    static constexpr int kSlotBytes = G::kSharedX || G::kKept ? 0
                                      : G::Weight::kByChunks  ? kTokenTiles * 1024
                                                              : G::kM * kRowBytes;

    static __device__ __forceinline__ void ask(unsigned char *slot, const unsigned char *slab) {
        const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
        for (int i = 0; i < 2 * kTokenTiles; i++) {
            if constexpr (G::Weight::kByChunks) {
                const int token = i / 2 * 8 + g;
                cp_async_16(slot + (32 * i + lane_index()) * 16, slab + chunk_offset(token, t + i % 2 * 4), is_token(token));
            } else {
                const int at = 32 * i + lane_index();
                if (is_token(at / 8)) cp_async_16(slot + at * 16, slab + at * 16);
            }
        }
    }

    static __device__ void take(Column &x, const unsigned char *slot) {
        if constexpr (!G::Weight::kByChunks) __syncwarp();  // rows came by other lanes
#pragma unroll
        for (int i = 0; i < 2 * kTokenTiles; i++) {
            uint4 &eight = x.chunks[i / 2][i % 2];
            if constexpr (G::Weight::kByChunks) {
                eight = load_16(slot + (32 * i + lane_index()) * 16);
            } else {
                const int row = min(i / 2 * 8 + lane_index() % 8, G::kM - 1);  // any for a token that is not there
                eight = load_matrices(slot + chunk_offset(row, lane_index() / 8 + i % 2 * 4));
            }
        }
    }

    static __device__ bool is_token(int token) { return G::kM % 8 == 0 || token < G::kM; }

    // Brings x to shared memory, normalised if it is to be; `partial` is room for kMomentsBytes.
    static __device__ void fill(unsigned char *shared, const void *x, const float *norm_weight, const float *norm_bias,
                                float *partial) {
        if constexpr (G::kTiledX) {
            copy_tiles(shared, static_cast<const unsigned char *>(x));
        } else if constexpr (G::kNorm == Norm::none) {
            const NormInput<G> rows = {static_cast<const float *>(x), nullptr, nullptr};
            for (int token = 0; token < G::kM; token++) put_row<kThreads>(shared, rows, token, threadIdx.x, {});
        } else {
            normalise(shared, {static_cast<const float *>(x), norm_weight, norm_bias}, partial);
        }
        __syncthreads();
    }

  private:
    // Of four matrices of eight tokens by eight elements, whose rows the lanes name.
    static __device__ uint4 load_matrices(const unsigned char *row) {
        uint32_t pairs[4];
        ldmatrix_x4(pairs, row);
        return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }

    static __device__ void copy_tiles(unsigned char *shared, const unsigned char *x) {
#pragma unroll 4
        for (int i = threadIdx.x; i < kColumns * G::kM * 8; i += kThreads) {
            const int column = i / (G::kM * 8), token = i / 8 % G::kM, chunk = i % 8 ^ (token & 7);
            const int64_t from = (int64_t(column) * round_up(G::kM, 8) + token) * kRowBytes + i % 8 * 16;
            *reinterpret_cast<uint4 *>(place(shared, column, token, chunk)) = load_16(x + from);
        }
    }

    // Chunks first, + kStride, … of a row, rounded to T.
    template <int kStride>
    static __device__ void put_row(unsigned char *shared, const NormInput<G> &rows, int token, int first,
                                   const typename NormInput<G>::RowMoments &all) {
        rows.template each<kStride, kColumns * 8>(token, first, all, [&](int chunk, const float(&v)[8]) {
            *reinterpret_cast<uint4 *>(place(shared, chunk / 8, token, chunk % 8)) = round_eight<typename G::T>(v);
        });
    }

    // Rows are cut into parts so that each warp has one, or each takes whole rows in turn; it comes back to the same
    // chunks for the second pass.
    static __device__ void normalise(unsigned char *shared, const NormInput<G> &rows, float *partial) {
        using RowMoments = typename NormInput<G>::RowMoments;
        constexpr int kStride = 32 * kParts;
        auto *moments = reinterpret_cast<RowMoments *>(partial);
        for (int i = warp_index(); i < G::kM * kParts; i += G::kWarps) {
            const RowMoments part = rows.template moments<kStride>(i / kParts, i % kParts * 32);
            if (lane_index() == 0) moments[i] = part;
        }
        __syncthreads();
        for (int i = warp_index(); i < G::kM * kParts; i += G::kWarps) {
            const int token = i / kParts;
            RowMoments all = moments[token * kParts];
            for (int part = 1; part < kParts; part++) all.merge(moments[token * kParts + part]);
            put_row<kStride>(shared, rows, token, i % kParts * 32 + lane_index(), all);
        }
    }
};
