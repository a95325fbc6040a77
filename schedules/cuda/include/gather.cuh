// Rows of a table, by number: token embeddings, tables of positions, the hidden states whose logits are wanted.
//
//   y[row] = table[clamp(index[row])]      a thread moves CHUNK consecutive columns, a block 256 of those
//
// Of several tables a launch has the blocks of one behind those of the other.
//
// Reads sizeof(Table) bytes an element and writes sizeof(Result). A number out of range, such as the -1 of a row that
// pads the step, takes the nearest row there is.
#pragma once

#include "device.cuh"

constexpr int GATHER_THREADS = 256, GATHER_CHUNK = 8;

__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ float widened(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widened(f16 x) { return __half2float(x); }

template <class T> __device__ __forceinline__ T narrowed(float x);
template <> __device__ __forceinline__ float narrowed<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 narrowed<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ f16 narrowed<f16>(float x) { return __float2half_rn(x); }

// Rows, columns and entries of the table; whether the result lies as tiles (compiler/kernel.py: TILE_ROWS).
template <int ROWS_, int COLUMNS_, int ENTRIES_, bool TILED_> struct GatherShape {
    static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, ENTRIES = ENTRIES_;
    static constexpr bool TILED = TILED_;
    static constexpr int PADDED_COLUMNS = TILED ? (COLUMNS + 63) / 64 * 64 : COLUMNS;
    static constexpr int CHUNKS = (PADDED_COLUMNS + GATHER_CHUNK - 1) / GATHER_CHUNK; // of a row

    // Where the chunk's first element goes.
    __device__ static long offset(int row, int chunk) {
        if (!TILED) return long(row) * COLUMNS + chunk * GATHER_CHUNK;
        constexpr int PADDED_ROWS = (ROWS + 7) / 8 * 8;
        return (long(chunk / 8) * PADDED_ROWS + row) * 64 + ((chunk % 8) ^ (row % 8)) * GATHER_CHUNK;
    }
};

// A block's part.
template <class Shape, class Table, class Index, class Result>
__device__ __forceinline__ void gather_block(const Table *table, const Index *index, Result *y, int block) {
    const int at = block * GATHER_THREADS + threadIdx.x, row = at / Shape::CHUNKS, chunk = at % Shape::CHUNKS;
    if (row >= Shape::ROWS) return;
    Index entry = index[row];
    entry = entry < 0 ? 0 : entry >= Shape::ENTRIES ? Shape::ENTRIES - 1 : entry;
    const Table *from = table + long(entry) * Shape::COLUMNS;
    Result *to = y + Shape::offset(row, chunk);
#pragma unroll
    for (int i = 0; i < GATHER_CHUNK; i++) {
        const int column = chunk * GATHER_CHUNK + i;
        if (column < Shape::COLUMNS) to[i] = narrowed<Result>(widened(from[column]));
        else if (column < Shape::PADDED_COLUMNS) to[i] = narrowed<Result>(0.0f); // products read these
    }
}

template <class Shape, class Table, class Index, class Result>
__device__ void gather(const Table *table, const Index *index, Result *y) {
    wait_for_previous();
    let_next_start();
    gather_block<Shape>(table, index, y, blockIdx.x);
}
