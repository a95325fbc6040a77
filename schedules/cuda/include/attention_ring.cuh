// The ring of pages in shared memory between the threads of attention_wgmma.cuh that fetch and those that multiply.
#pragma once

#include "attention_rows.cuh"

template <class Shape>
struct Warpgroups {
    static constexpr int fetching = kCoded<Shape> ? 128 : 32;  // threads
    static constexpr int threads = 128 * Shape::groups + fetching, rows = kTileRows * Shape::groups;
    static constexpr int blocks = (Shape::rows + rows - 1) / rows;  // for each head
    static constexpr int head = kPageTokens * Shape::head_dim;      // elements of K, or V, in shared memory
    static constexpr int head_bytes = head * int(sizeof(typename Shape::T));
    static constexpr int stage = 2 * head + (kCoded<Shape> ? 4 * kPageTokens : 0);
};

// For each page of the ring: its K, its V have come; all warps are done with it.
template <class Shape>
struct Ring {
    uint64_t keys[Shape::stages], values[Shape::stages], done[Shape::stages];
};

// Where a warp is in the ring.
template <class Shape>
struct Place {
    int stage = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void next() {
        stage++;
        if (stage == Shape::stages) stage = 0, parity ^= 1;
    }
};

// K and V of stage `stage`, and of codes their scales.
template <class Shape>
__device__ __forceinline__ typename Shape::T *stage_of(int stage) {
    return reinterpret_cast<typename Shape::T *>(dynamic_shared()) + stage * Warpgroups<Shape>::stage;
}

template <class Shape>
__device__ __forceinline__ float *stage_scales(int stage) {
    return reinterpret_cast<float *>(stage_of<Shape>(stage) + 2 * Warpgroups<Shape>::head);
}
