// Where weights and activations lie. (tile_layout.py says the same to the compiler, and why.)
//
//     weight        [row tiles][ceil(K/64)][64 rows][8 chunks]        a chunk is 16 bytes, 8 elements along K
//     activation    [ceil(K/64)][M rounded up to 8][8 chunks]
//
// Chunk c of row r lies at c ^ (r % 8): the order in which shared memory's 128-byte swizzle keeps a tile. A column of
// tiles is 64 elements of K. A strip is 16 rows of a weight: what one matrix fragment covers. In a gated weight a strip
// is 8 gate rows and their 8 up rows, in others 16 outputs.
#pragma once

#include "device.cuh"

constexpr int kTile = 64;          // rows of a weight's tile, and elements along K of any tile
constexpr int kTileBytes = 8192;   // of a weight's tile
constexpr int kRowBytes = 128;     // of a row of a tile
constexpr int kStripRows = 16;
constexpr int kStripBytes = kStripRows * kRowBytes;  // of a strip in one tile

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int round_up(int a, int multiple) { return ceil_div(a, multiple) * multiple; }

// Rows of tiles that a weight of n outputs has.
__host__ __device__ constexpr int tile_rows(int n, bool gated) { return ceil_div(n, kTile) * (gated ? 2 : 1); }

// Strips that a product computes. A tiled result is written to the end of its last slab, where columns past N are zero.
__host__ __device__ constexpr int strips_of(int n, bool gated, bool tiled_result) {
    return ceil_div(tiled_result ? round_up(n, kTile) : n, gated ? 8 : 16);
}

// Bytes from a weight's start to a tile, and to a strip's first row in the tile of column `column`.
__device__ __forceinline__ int64_t tile_offset(int tile_row, int column, int columns) {
    return (int64_t(tile_row) * columns + column) * kTileBytes;
}

__device__ __forceinline__ int64_t strip_offset(int strip, int column, int columns) {
    return tile_offset(strip / 4, column, columns) + strip % 4 * kStripBytes;
}

// Bytes from a tile's start to chunk `chunk` of row `row`.
__device__ __forceinline__ int chunk_offset(int row, int chunk) { return row * kRowBytes + ((chunk ^ (row & 7)) << 4); }

// Where element k of row `row` of a tiled activation lies, in elements of 2 bytes.
__device__ __forceinline__ int64_t activation_index(int m_padded, int row, int k) {
    return int64_t(k / kTile) * m_padded * kTile + (chunk_offset(row, k % kTile / 8) / 2 + k % 8);
}
