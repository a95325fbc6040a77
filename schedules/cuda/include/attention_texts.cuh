// Texts that are read whole (encoders): a row sees what is behind it in its text too, and `window` is to either side.
//
// A text's rows are one behind the other in a step, at positions from 0 on. So "the i-th row behind this one is i
// positions further" holds up to the end of its text, and of no row behind that: 32 lanes find the end in one to three
// rounds. Positions come with the step: this may be before the wait.
//
// Where rows do, Shape has beside what attention.cuh lists:
//     both_ways    true
// else a row sees what is before it, and there is not an instruction more.
#pragma once

#include "attention.cuh"

template <class Shape, class = void>
constexpr bool kBothWays = false;
template <class Shape>
constexpr bool kBothWays<Shape, decltype(void(Shape::both_ways))> = true;

// How many rows of the step there are of the text of `row`, which is at position `at`, behind it; a whole warp calls.
template <class Shape>
__device__ __forceinline__ int rows_behind(const int *positions, int row, int at) {
    constexpr int most = Shape::rows < Shape::pages * kPageTokens ? Shape::rows : Shape::pages * kPageTokens;
    constexpr int first_stride = most > 1024 ? 1024 : most > 32 ? 32 : 1;
    static_assert(most <= 32 * 1024, "three rounds");
    int n = 0;
#pragma unroll
    for (int stride = first_stride; stride > 0; stride /= 32) {
        const int i = n + stride * (lane_index() + 1);
        const bool is_own = row + i < Shape::rows && positions[row + i] == at + i;
        n += stride * __popc(__ballot_sync(kAllLanes, is_own));
    }
    return n;
}

// The last position that a row at position `at` sees, of a text that ends at `end`.
template <class Shape>
__device__ __forceinline__ int last_in_sight(int at, int end) {
    if constexpr (!kBothWays<Shape>) return at;
    else return Shape::window ? min(end, at + Shape::window - 1) : end;
}

// The same of a row of the step; less than 0 where the row pads it. A whole warp calls.
template <class Shape>
__device__ __forceinline__ int last_in_sight_of(const int *positions, int row, int at) {
    if constexpr (kBothWays<Shape>) return at < 0 ? at : last_in_sight<Shape>(at, at + rows_behind<Shape>(positions, row, at));
    else return at;
}
