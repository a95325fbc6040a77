// What the kernels of paged attention share: where numbers lie, and the online softmax of a warp.
//
// M rows of `heads` query heads; `kv_heads` key heads of D = head_dim elements, each shared by `group` query heads.
// A page holds 64 tokens of all layers; one layer's part of it has for each key head K and then V, both as
//
//     [D/8 chunks][64 tokens][8 elements of T]             D * 128 bytes
//
// Eight tokens of a chunk are 128 bytes in a row: one 8x8 matrix as ldmatrix wants it, and a core matrix of wgmma's
// layout without a swizzle, for K (k contiguous) and for V (n contiguous) alike. Nothing is padded, any 16 tokens or
// any run of chunks can be copied alone, and no access has a bank conflict. (int8: attention_codes.cuh.)
//
// Shape, a struct of constants, comes with each kernel (schedules/cuda/attention/shape.py writes it):
//     T, Kv, Out             element of the operands of products; of the cache, T or uint8_t; of the result
//     rows, pages            rows of the step (M); pages of the longest sequence
//     heads, kv_heads, head_dim, rotary_dim, interleaved, scale, softcap, window          as the operator's
//     page_elements          elements of Kv from one page to the next
//     tiled                  whether the result is tiled (tiles.cuh) or row-major
//     has_sinks, has_slopes  where each head has a sink, or a slope: `sinks` or `slopes` [heads] are not null
//                            (attention_sinks.cuh, attention_slopes.cuh)
#pragma once

#include "attention_slopes.cuh"

constexpr int kPageTokens = 64;
constexpr float kLog2E = 1.44269504088896f;
constexpr uint32_t kAllLanes = 0xffffffffu;

template <class Shape>
constexpr int kGroup = Shape::heads / Shape::kv_heads;

template <class Shape>
constexpr int kRowColumns = (Shape::heads + 2 * Shape::kv_heads) * Shape::head_dim;  // of qkv

// How many keys a row at position `at` sees, itself included, if there are so many: its window's, or those of its chunk
// of -window tokens. 0: all.
template <class Shape>
__device__ __forceinline__ int sight(int at) {
    if constexpr (Shape::window >= 0) return Shape::window;
    else return at % -Shape::window + 1;
}

// Whether the cache holds codes, each token's with a scale.
template <class Shape>
constexpr bool kCoded = sizeof(typename Shape::Kv) == 1;

template <class Shape>
constexpr int kTokenElements = Shape::head_dim + (kCoded<Shape> ? 4 : 0);  // of Kv: K, or V, of one token and head

template <class Shape>
constexpr int kHeadElements = kPageTokens *kTokenElements<Shape>;  // of one page

// K of one page and key head; V follows.
template <class Shape>
__device__ __forceinline__ typename Shape::Kv *page_head(typename Shape::Kv *kv, int page, int kv_head) {
    return kv + int64_t(page) * Shape::page_elements + kv_head * 2 * kHeadElements<Shape>;
}

// ---- rows of a step ------------------------------------------------------------------------------------------------

// Whether both rows are of one sequence. The page that holds position `at`, which one of them writes now, is that
// sequence's alone.
template <class Shape>
__device__ __forceinline__ bool same_sequence(const int *page_table, int a, int b, int at) {
    const int page = at / kPageTokens;
    return page_table[a * Shape::pages + page] == page_table[b * Shape::pages + page];
}

// Bit i: row first + i is the token after the row before it. For n <= 64 rows; in every lane of a warp.
template <class Shape>
__device__ __forceinline__ uint64_t continued(const int *positions, const int *page_table, int first, int n) {
    uint64_t bits = 0;
    for (int base = 0; base < n; base += 32) {
        const int i = base + lane_index(), row = first + i;
        bool joined = false;
        if (row > 0 && i < n) {
            const int before = positions[row - 1];
            joined = before >= 0 && positions[row] == before + 1 &&
                     same_sequence<Shape>(page_table, row, row - 1, before);
        }
        bits |= uint64_t(__ballot_sync(kAllLanes, joined)) << base;
    }
    return bits;
}

// How many set bits end at bit i, going down; and how many start at bit i, going up.
__device__ __forceinline__ int ones_down(uint64_t bits, int i) { return __clzll(~(bits << (63 - i))); }
__device__ __forceinline__ int ones_up(uint64_t bits, int i) {
    const uint64_t others = i > 63 ? 1 : ~(bits >> i);
    return others ? __ffsll(others) - 1 : 64;
}

// ---- eight elements ------------------------------------------------------------------------------------------------

struct Eight {
    float at[8];
};

__device__ __forceinline__ Eight load_eight(const float *from) {
    Eight x;
    *reinterpret_cast<uint4 *>(x.at) = load_16(from);
    *reinterpret_cast<uint4 *>(x.at + 4) = load_16(from + 4);
    return x;
}

template <class T>
__device__ __forceinline__ uint4 pack_eight(const Eight &x) {
    return make_uint4(pack2<T>(x.at[0], x.at[1]), pack2<T>(x.at[2], x.at[3]), pack2<T>(x.at[4], x.at[5]),
                      pack2<T>(x.at[6], x.at[7]));
}

// Elements 2 i and 2 i + 1 of what pack_eight() made; and all of them.
template <class T>
__device__ __forceinline__ float2 unpack_pair(uint4 packed, int i) {
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
    return unpack2<T>(words[i]);
}
template <class T>
__device__ __forceinline__ Eight unpack_eight(uint4 packed) {
    Eight x;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 pair = unpack_pair<T>(packed, i);
        x.at[2 * i] = pair.x, x.at[2 * i + 1] = pair.y;
    }
    return x;
}

// To shared memory.
template <class T>
__device__ __forceinline__ void put_chunk(T *shared, uint4 chunk) {
    *reinterpret_cast<uint4 *>(shared) = chunk;
}

// ---- results -------------------------------------------------------------------------------------------------------

// Where column c of a row of a tiled result lies.
template <class Shape>
__device__ __forceinline__ typename Shape::Out *tiled_place(typename Shape::Out *out, int row, int c) {
    constexpr int padded_rows = (Shape::rows + 7) / 8 * 8;
    const int chunk = (c % 64 / 8) ^ (row % 8);
    return out + (int64_t(c / 64) * padded_rows + row) * 64 + 8 * chunk + c % 8;
}

// Columns c, c+1 … c+kCount-1 of a row of the result [M, heads * D]: kCount 2 or 4, c a multiple of it.
template <class Shape, int kCount>
__device__ __forceinline__ void write_result(typename Shape::Out *out, int row, int c, const float (&x)[kCount]) {
    if constexpr (Shape::tiled) {
        uint32_t *pairs = reinterpret_cast<uint32_t *>(tiled_place<Shape>(out, row, c));
        if constexpr (kCount == 4) {
            *reinterpret_cast<uint2 *>(pairs) =
                make_uint2(pack2<typename Shape::Out>(x[0], x[1]), pack2<typename Shape::Out>(x[2], x[3]));
        } else {
            *pairs = pack2<typename Shape::Out>(x[0], x[1]);
        }
    } else {
        float *to = out + int64_t(row) * (Shape::heads * Shape::head_dim) + c;
        if constexpr (kCount == 4) {
            *reinterpret_cast<float4 *>(to) = make_float4(x[0], x[1], x[2], x[3]);
        } else {
            *reinterpret_cast<float2 *>(to) = make_float2(x[0], x[1]);
        }
    }
}

// Zeros in a row's columns [from, to), multiples of 4, by n threads of which this is `thread`.
template <class Shape>
__device__ __forceinline__ void write_zeros(typename Shape::Out *out, int row, int from, int to, int thread, int n) {
    const float zeros[4] = {0.f, 0.f, 0.f, 0.f};
    for (int c = from + 4 * thread; c < to; c += 4 * n) write_result<Shape>(out, row, c, zeros);
}

// Columns of a row of the result, with those that a tiled one is padded by.
template <class Shape>
constexpr int kColumns = Shape::heads *Shape::head_dim;
template <class Shape>
constexpr int kPaddedColumns = Shape::tiled ? (kColumns<Shape> + 63) / 64 * 64 : kColumns<Shape>;

// ---- 16 rows of queries in a warp ----------------------------------------------------------------------------------

// 16 rows of queries as the left operand of a product: in registers, or, for heads too long for that, and where blocks
// are many, in shared memory.
template <class Shape, int kPitch, bool kHeld = Shape::head_dim <= 128>
struct Queries {
    using T = typename Shape::T;
    static constexpr int steps = Shape::head_dim / 16;
    static constexpr bool in_registers = kHeld;
    uint32_t at[in_registers ? steps : 1][4];
    const T *shared;

    // From [D/8][kPitch][8] in shared memory, the first of the 16 rows.
    __device__ __forceinline__ void load(const T *rows) {
        shared = rows;
        if constexpr (in_registers)
#pragma unroll
            for (int i = 0; i < steps; i++) read(at[i], i);
    }

    // Registers of k-step i, as mma_16816's a.
    __device__ __forceinline__ void step(uint32_t (&q)[4], int i) const {
        if constexpr (in_registers) {
#pragma unroll
            for (int r = 0; r < 4; r++) q[r] = at[i][r];
        } else {
            read(q, i);
        }
    }

    __device__ __forceinline__ void read(uint32_t (&q)[4], int i) const {
        const int matrix = lane_index() / 8;
        ldmatrix_x4(q, shared + 8 * ((2 * i + matrix / 2) * kPitch + matrix % 2 * 8 + lane_index() % 8));
    }
};

// What 16 rows have gathered. A lane has of rows g = lane/4 and g + 8 (index 0, 1) the columns 8j + 2(lane%4) + {0, 1}:
// o[j][0, 1] and o[j][2, 3]; `most`, the largest score, is the row's, `sum` is this lane's part of it. Values that are
// codes have an order of columns and a `unit` of their own, see attention_codes.cuh.
template <class Shape>
struct Gathered : HeadSlopes<Shape>::OfRows {
    float o[Shape::head_dim / 8][4];
    float most[2], sum[2];
    float unit, per_unit;
};

template <class Shape>
__device__ __forceinline__ void clear(Gathered<Shape> &state) {
#pragma unroll
    for (int j = 0; j < Shape::head_dim / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) state.o[j][i] = 0.f;
    state.most[0] = state.most[1] = -INFINITY;
    state.sum[0] = state.sum[1] = 0.f;
}

// s[16, kKeys] = q k^T; keys [D/8][kPitch][8] in shared memory.
template <class Shape, int kKeys, int kPitch, int kQueryPitch, bool kHeld>
__device__ __forceinline__ void score(float (&s)[kKeys / 8][4], const Queries<Shape, kQueryPitch, kHeld> &queries,
                                      const typename Shape::T *keys) {
    const int matrix = lane_index() / 8;
#pragma unroll
    for (int n = 0; n < kKeys / 8; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.f;
#pragma unroll
    for (int i = 0; i < Shape::head_dim / 16; i++) {
        uint32_t q[4];
        queries.step(q, i);
#pragma unroll
        for (int n = 0; n < kKeys / 16; n++) {
            uint32_t k[4];
            ldmatrix_x4(k, keys + 8 * ((2 * i + matrix % 2) * kPitch + 16 * n + matrix / 2 * 8 + lane_index() % 8));
            mma_16816<typename Shape::T>(s[2 * n], q, {k[0], k[1]});
            mma_16816<typename Shape::T>(s[2 * n + 1], q, {k[2], k[3]});
        }
    }
}

// What turns a score into an exponent of two.
template <class Shape>
constexpr float kExponent = Shape::softcap > 0.f ? kLog2E : Shape::scale * kLog2E;

// Scores -> weights: s -> 2^(c (s - most)), and their sum. `keep`: what each row's o, of scores before, is worth now.
// sees(half, key) says whether the lane's row g + 8 half sees key 0..kKeys-1; it is asked only if `masked`. bias: what is
// added to scores (attention_slopes.cuh).
template <class Shape, int kKeys, class Sees, class Bias = NoBias>
__device__ __forceinline__ void weigh_scores(Gathered<Shape> &state, float (&s)[kKeys / 8][4], float (&keep)[2],
                                             bool masked, Sees sees, const Bias &bias = {}) {
    constexpr float c = kExponent<Shape>;
    if constexpr (Shape::softcap > 0.f) {
#pragma unroll
        for (int n = 0; n < kKeys / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) s[n][i] = Shape::softcap * tanhf(s[n][i] * (Shape::scale / Shape::softcap));
    }
    if constexpr (Bias::any) {
#pragma unroll
        for (int n = 0; n < kKeys / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) s[n][i] += bias(i / 2, n, i % 2);
    }
    if (masked) {
#pragma unroll
        for (int n = 0; n < kKeys / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (!sees(i / 2, 8 * n + 2 * (lane_index() % 4) + i % 2)) s[n][i] = -INFINITY;
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float most = state.most[half];
#pragma unroll
        for (int n = 0; n < kKeys / 8; n++) most = fmaxf(most, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
        const float base = most == -INFINITY ? 0.f : most * c;  // a row that has seen nothing yet weighs nothing
        keep[half] = exp2_approx(fmaf(state.most[half], c, -base));
        state.most[half] = most;
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < kKeys / 8; n++) {
            s[n][2 * half] = exp2_approx(fmaf(s[n][2 * half], c, -base));
            s[n][2 * half + 1] = exp2_approx(fmaf(s[n][2 * half + 1], c, -base));
            sum += s[n][2 * half] + s[n][2 * half + 1];
        }
        state.sum[half] = fmaf(state.sum[half], keep[half], sum);
    }
}

// o to the new largest scores.
template <class Shape>
__device__ __forceinline__ void keep_sums(Gathered<Shape> &state, const float (&keep)[2]) {
    if (!__any_sync(kAllLanes, keep[0] != 1.f || keep[1] != 1.f)) return;  // as a rule, once a few pages have gone by
#pragma unroll
    for (int j = 0; j < Shape::head_dim / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) state.o[j][i] *= keep[i / 2];
}

// Both.
template <class Shape, int kKeys, class Sees, class Bias>
__device__ __forceinline__ void weigh(Gathered<Shape> &state, float (&s)[kKeys / 8][4], bool masked, Sees sees,
                                      const Bias &bias) {
    float keep[2];
    weigh_scores<Shape, kKeys>(state, s, keep, masked, sees, bias);
    keep_sums(state, keep);
}

// o[16, D] += p[16, kKeys] v; values [D/8][kPitch][8] in shared memory.
template <class Shape, int kKeys, int kPitch>
__device__ __forceinline__ void add_values(Gathered<Shape> &state, const float (&p)[kKeys / 8][4],
                                           const typename Shape::T *values) {
    using T = typename Shape::T;
    const int matrix = lane_index() / 8;
#pragma unroll
    for (int n = 0; n < kKeys / 16; n++) {
        const uint32_t weights[4] = {pack2<T>(p[2 * n][0], p[2 * n][1]), pack2<T>(p[2 * n][2], p[2 * n][3]),
                                     pack2<T>(p[2 * n + 1][0], p[2 * n + 1][1]),
                                     pack2<T>(p[2 * n + 1][2], p[2 * n + 1][3])};
#pragma unroll
        for (int j = 0; j < Shape::head_dim / 16; j++) {
            uint32_t v[4];
            ldmatrix_x4_trans(
                v, values + 8 * ((2 * j + matrix / 2) * kPitch + 16 * n + matrix % 2 * 8 + lane_index() % 8));
            mma_16816<T>(state.o[2 * j], weights, {v[0], v[1]});
            mma_16816<T>(state.o[2 * j + 1], weights, {v[2], v[3]});
        }
    }
}

// The sum of a row's weights from its four lanes' parts.
__device__ __forceinline__ float row_sum(float part) {
    part += __shfl_xor_sync(kAllLanes, part, 1);
    return part + __shfl_xor_sync(kAllLanes, part, 2);
}
