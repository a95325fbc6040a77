// A product of each head of x with a matrix of its own: y_h = (the first K elements of x_h) W_hᵀ.
//
// A block has up to `tokens` rows of x of one head and 16 rows of its matrix a warp. The rows of x lie in shared memory
// as a whole, rounded; the matrix, in tiles (tiles.cuh) one head behind the other, goes by in columns of 64 elements of
// K, `stages` at most at a time. Those of the first stages are asked for before the kernel in front has ended.
//
//     for column of K:    y[tokens, 16] += x[tokens, 64] w[16, 64]ᵀ        a warp, by mma.sync
//
// Bytes: 2 H N K, and 4 M H (K + N). Operations: 2 M H N K.
//
// Shape says: X, T, Y (elements of x, of what is multiplied, of y); rows (M), heads, n, k, stride (from a head of x to the
// next), tokens (16, 32 or 64), warps (4 or 8), stages. X that is T, and Y that is not float, are tiled.
#pragma once

#include "attention.cuh"
#include "tiles.cuh"

template <class Shape>
struct Heads {
    static constexpr int columns = ceil_div(Shape::k, kTile), tile_rows = ceil_div(Shape::n, kTile);
    static constexpr int outputs = 16 * Shape::warps, output_tiles = ceil_div(Shape::n, outputs);
    static constexpr int threads = 32 * Shape::warps;
    static constexpr int slots = Shape::stages < columns ? Shape::stages : columns;
    static constexpr int m_padded = round_up(Shape::rows, 8);
    static constexpr bool tiled_x = sizeof(typename Shape::X) == 2, tiled_y = sizeof(typename Shape::Y) == 2;
    static constexpr int x_bytes = Shape::tokens * kRowBytes, w_bytes = outputs * kRowBytes;  // of a column
    static_assert(!tiled_x || (Shape::k % 8 == 0 && Shape::stride % 8 == 0), "chunks are whole");
};

// Eight elements of a row of a head of x from k on, zeros past K.
template <class Shape>
__device__ __forceinline__ Eight head_elements(const float *head, int k) {
    if constexpr (Shape::k % 8 == 0 && Shape::stride % 4 == 0) {
        return k < Shape::k ? load_eight(head + k) : Eight{};
    } else {
        Eight x = {};
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (k + i < Shape::k) x.at[i] = head[k + i];
        return x;
    }
}

// The block's rows of x to shared memory [columns][tokens][8 chunks], zeros past M and K.
template <class Shape>
__device__ __forceinline__ void bring_rows(const typename Shape::X *x, int head, int first, unsigned char *shared) {
    using S = Heads<Shape>;
    for (int i = threadIdx.x; i < S::columns * Shape::tokens * 8; i += S::threads) {
        const int chunk = i % (8 * S::columns), token = i / (8 * S::columns), row = first + token;
        unsigned char *to = shared + chunk / 8 * S::x_bytes + chunk_offset(token, chunk % 8);
        const bool is_there = row < Shape::rows && 8 * chunk < Shape::k;
        if constexpr (S::tiled_x) {
            const int64_t from = is_there ? activation_index(S::m_padded, row, head * Shape::stride + 8 * chunk) : 0;
            cp_async_16(to, x + from, is_there);
        } else {
            const float *from = x + (int64_t(row) * Shape::heads + head) * Shape::stride;
            store_16(to, pack_eight<typename Shape::T>(is_there ? head_elements<Shape>(from, 8 * chunk) : Eight{}));
        }
    }
}

// y of a row of the step, its column and the next one.
template <class Shape>
__device__ __forceinline__ void put_outputs(typename Shape::Y *y, int row, int head, int output, const float (&v)[2]) {
    using S = Heads<Shape>;
    const int column = head * Shape::n + output;
    if constexpr (S::tiled_y && Shape::n % 2 == 0) {
        *reinterpret_cast<uint32_t *>(y + activation_index(S::m_padded, row, column)) =
            pack2<typename Shape::Y>(v[0], v[1]);
    } else if constexpr (Shape::n % 2 == 0) {
        *reinterpret_cast<float2 *>(y + int64_t(row) * (Shape::heads * Shape::n) + column) = make_float2(v[0], v[1]);
    } else {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (output + i >= Shape::n) break;
            const int64_t at = S::tiled_y ? activation_index(S::m_padded, row, column + i)
                                          : int64_t(row) * (Shape::heads * Shape::n) + column + i;
            y[at] = round_to<typename Shape::Y>(v[i]);
        }
    }
}

// A block for each head, tile of outputs and tile of rows.
template <class Shape>
__device__ __forceinline__ void head_product(const typename Shape::X *x, const typename Shape::T *weight,
                                             typename Shape::Y *y) {
    using S = Heads<Shape>;
    using T = typename Shape::T;
    constexpr int groups = Shape::tokens / 16;
    const int head = blockIdx.x / S::output_tiles % Shape::heads, output_tile = blockIdx.x % S::output_tiles;
    const int first = blockIdx.x / S::output_tiles / Shape::heads * Shape::tokens;
    unsigned char *rows = dynamic_shared(), *slots = rows + S::columns * S::x_bytes;
    const auto *matrix_bytes = reinterpret_cast<const unsigned char *>(weight);
    const auto ask = [&](int column) {
        if (column < S::columns) {
#pragma unroll
            for (int i = threadIdx.x; i < S::outputs * 8; i += S::threads) {
                const int tile = output_tile * (S::outputs / kTile) + i / (8 * kTile);
                const bool is_there = tile < S::tile_rows;
                const int64_t from = tile_offset(head * S::tile_rows + (is_there ? tile : 0), column, S::columns);
                cp_async_16(slots + column % S::slots * S::w_bytes + 16 * i, matrix_bytes + from + 16 * (i % (8 * kTile)),
                            is_there);
            }
        }
        cp_async_commit();
    };
#pragma unroll
    for (int i = 0; i < Shape::stages - 1; i++) ask(i);
    wait_for_previous();
    let_next_start();
    bring_rows<Shape>(x, head, first, rows);
    if constexpr (S::tiled_x) {
        cp_async_commit();
        cp_async_wait<0>();
    }

    float sums[groups][2][4] = {};
    const int matrix = lane_index() / 8, line = lane_index() % 8, own = 16 * warp_index();
    for (int column = 0; column < S::columns; column++) {
        cp_async_wait<Shape::stages - 2>();
        __syncthreads();
        ask(column + Shape::stages - 1);
        const unsigned char *slot = slots + column % S::slots * S::w_bytes, *some = rows + column * S::x_bytes;
#pragma unroll
        for (int step = 0; step < 4; step++) {
            uint32_t w[4];
            ldmatrix_x4(w, slot + chunk_offset(own + matrix / 2 * 8 + line, 2 * step + matrix % 2));
#pragma unroll
            for (int g = 0; g < groups; g++) {
                uint32_t a[4];
                ldmatrix_x4(a, some + chunk_offset(16 * g + matrix % 2 * 8 + line, 2 * step + matrix / 2));
                mma_16816<T>(sums[g][0], a, {w[0], w[1]});
                mma_16816<T>(sums[g][1], a, {w[2], w[3]});
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4 * groups; i++) {
        const int row = first + 16 * (i / 4) + i % 2 * 8 + lane_index() / 4, half = i / 2 % 2;
        const int output = output_tile * S::outputs + own + 8 * half + 2 * (lane_index() % 4);
        const float v[2] = {sums[i / 4][half][2 * (i % 2)], sums[i / 4][half][2 * (i % 2) + 1]};
        if (row < Shape::rows && output < Shape::n) put_outputs<Shape>(y, row, head, output, v);
    }
    if constexpr (S::tiled_y) {
        constexpr int end = Shape::heads * Shape::n, more = round_up(end, kTile) - end;
        if (head == Shape::heads - 1 && output_tile == 0)
            for (int i = threadIdx.x; i < more * Shape::tokens; i += S::threads)
                if (first + i / more < Shape::rows)
                    y[activation_index(S::m_padded, first + i / more, end + i % more)] = round_to<typename Shape::Y>(0.f);
    }
}
