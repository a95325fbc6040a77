// A product of sorted pairs (experts_table.cuh), each by the weight of its expert: y[rows, N] = act(x Wₑᵀ) · (x Uₑᵀ), or
// x Dₑᵀ, with the expert's biases where there are any. Both GEMMs (gemm_wgmma.cuh, gemm_mma.cuh) do it as any other
// product of kAllRows tokens,
//
//     tile     128 stored rows of an expert's weight by the kRows rows of one of its tiles of pairs
//     blocks   tile, + kBlocks, … of those that there are: their number is known when the kernel begins, and a block
//              that has none leaves; tiles of one row of pairs lie side by side, so that an expert's weight is in L2
//
// except that nothing of the weight can be asked for before the launches in front have ended: which experts there are is
// what they say. Weights of experts lie one behind the other.
//
// Bytes: each expert's weight that has pairs, once for each of its tiles, from L2 after the first; x and y.
#pragma once

#include "experts_table.cuh"
#include "gemm_tile.cuh"
#include "gemm_zeros.cuh"
#include "gemv_mxfp4.cuh"

template <class Layer, class Table, int kStages, int kBlocks, int64_t kExpertBytes>
struct ExpertsTiling : Tiling<Layer, Table::kRows, kStages, kBlocks, 0, 1> {
    using Base = Tiling<Layer, Table::kRows, kStages, kBlocks, 0, 1>;

    // What a block keeps of the table.
    struct Tiles {
        int n, experts[Table::kTiles];
    };
    static __device__ Tiles &tiles() {
        __shared__ Tiles shared;
        return shared;
    }

    // First of all, by the whole block.
    static __device__ void read(const int *table) {
        wait_for_previous();
        const int n = table[0];
        if (threadIdx.x == 0) tiles().n = n;
        for (int i = threadIdx.x; i < n; i += blockDim.x) tiles().experts[i] = table[Table::kExpertsAt + i];
        __syncthreads();
    }

    // Whole tiles, of those that there are.
    struct W : Base::W {
        int tile, end;

        __device__ explicit W(int block) : Base::W(block), tile(block), end(tiles().n * Base::n_row_tiles) {}

        __device__ bool next(Stretch &stretch) {
            if (tile >= end) return false;
            stretch = {tile, 0, Base::n_steps};
            tile += kBlocks;
            return true;
        }
    };

    // Bytes from the first expert's weight to that of a tile, and biases from its first to that of the tile's.
    static constexpr bool kOfExperts = true;
    static __device__ int expert_at(const Place &place) { return tiles().experts[place.token / Table::kRows]; }
    static __device__ int64_t expert_offset(const Place &place) { return expert_at(place) * kExpertBytes; }
    static __device__ int64_t bias_offset(const Place &place) {
        return int64_t(expert_at(place)) * (Layer::kGated ? 2 * Layer::kN : Layer::kN);
    }

    static __device__ const unsigned char *weight_at(const void *weight, const Place &place, int group, int step) {
        return Base::weight_at(weight, place, group, step) + expert_offset(place);
    }
};
