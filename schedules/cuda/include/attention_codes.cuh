// A KV cache of int8: how its codes lie, and the two products on them.
//
// A page's part for one layer has for each key head K and then V, both
//
//     codes   [D/16 chunks][64 tokens][16 of code + 128]      D * 64 bytes
//     scales  [64] f32                                        what a code of token t counts: its largest element / 127
//
// Each chunk of 16 bytes is one token's; in chunk c token t lies at t ^ (2 (c % 4) + c % 2). No read below has a bank
// conflict, any copy is one of 16 bytes, and a token is written by itself.
//
// Products are in f16, whatever the model is in. A code becomes a number between shared memory and the product: a byte
// in the low bits of 1024 is an integer there, and taking 1152 away again is exact. Scales are f32 and stay out of it:
//
//     s[token] = (q codes) * key scale        o += round_to<f16>(p[token] * value scale / unit) codes
//
// q is rounded to f16 (clamped to what that holds), weights too, in multiples of 2^-15 of the largest value scale yet, so
// that neither small values nor small weights are lost: finer than in a cache of bf16. A row meets its own step's keys
// and values as codes too, as every later step will: results do not depend on how a prompt was cut, but for the order
// of sums and those roundings.
//
// Nothing turns bytes as ldmatrix turns 16-bit elements, so lanes read them as they are, and the products' k and n stand
// for whatever a lane has. With g = lane/4, t = lane%4:
//
//     K   a lane has token g: 16 codes of chunk 4j + t, which are its part of four k-steps; of D's last chunks beside
//         the fours, 4 codes, one k-step. The queries lie in that order too (put_query).
//     V   a lane has tokens 2t, 2t+1, 2t+8, 2t+9: of each, as many codes as make 8 lanes' a piece of D: 16 of 128, 8 of
//         64, 4 of 32 or 2 of 16, one for each of as many products. So o's columns are in another order (column).
//
// Operations beside the products, for two codes of a lane: 2 (K) and 2 1/2 (V). Memory brings 64 codes, what a warp
// takes with each, in 3.4 clocks of a multiprocessor of an H100, which starts 14 instructions in that time.
#pragma once

#include "attention_heads.cuh"

// ---- where they lie ------------------------------------------------------------------------------------------------

// Where a token lies in a chunk's row of 8, and which token lies there.
__device__ __forceinline__ int token_at(int token, int chunk) { return token ^ (chunk % 4 * 2 + chunk % 2); }

// Byte of chunk `chunk` of token `first` + `token` in [D/16][kPitch][16]; first a multiple of 8, token less.
template <int kPitch>
__device__ __forceinline__ int chunk_place(int first, int token, int chunk) {
    return 16 * (chunk * kPitch + first + token_at(token, chunk));
}

template <class Shape, int kPitch>
__device__ __forceinline__ const float *scales_of(const uint8_t *codes) {
    return reinterpret_cast<const float *>(codes + kPitch * Shape::head_dim);
}

template <class Shape, int kPitch>
__device__ __forceinline__ float *scales_of(uint8_t *codes) {
    return reinterpret_cast<float *>(codes + kPitch * Shape::head_dim);
}

// ---- making them ---------------------------------------------------------------------------------------------------

constexpr float kMostCode = 127.f;
constexpr float kLeastElement = 1e-30f;  // a largest element below this counts as zero: its reciprocal would overflow

// Eight elements of a vector as bytes of a page; the vector's scale.
struct Codes {
    uint2 at;
    float scale;
};

// By all lanes of a warp: kLanes of them have a vector, zeros where it has ended.
template <int kLanes>
__device__ __forceinline__ Codes quantise(const Eight &x) {
    float largest = 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++) largest = fmaxf(largest, fabsf(x.at[i]));
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, offset));
    const float per_unit = largest > kLeastElement ? kMostCode / largest : 0.f;
    uint32_t words[2];
#pragma unroll
    for (int w = 0; w < 2; w++) {
        words[w] = 0;
#pragma unroll
        for (int e = 0; e < 4; e++) words[w] |= uint32_t(__float2int_rn(x.at[4 * w + e] * per_unit) + 128) << 8 * e;
    }
    return {make_uint2(words[0], words[1]), largest * (1.f / kMostCode)};
}

// Elements 8 i … 8 i + 7 of a token to [D/16][kPitch][16], and its scale behind them.
template <class Shape, int kPitch>
__device__ __forceinline__ void put_codes(uint8_t *to, int token, int i, const Codes &codes) {
    *reinterpret_cast<uint2 *>(to + chunk_place<kPitch>(token / 8 * 8, token % 8, i / 2) + i % 2 * 8) = codes.at;
    if (i == 0) scales_of<Shape, kPitch>(to)[token] = codes.scale;
}

// Eight elements of a key or value as a cache keeps them, codes or numbers; by as many lanes of a warp as codes want.
template <class Shape>
__device__ __forceinline__ auto kept_eight(const Eight &x) {
    if constexpr (kCoded<Shape>)
        return quantise<kVectorLanes<Shape>>(x);
    else
        return pack_eight<typename Shape::T>(x);
}

// The same to token `token` of [D/8][kPitch][8], or of codes.
template <class Shape, int kPitch>
__device__ __forceinline__ void put_kept(uint8_t *to, int token, int chunk, const Codes &codes) {
    put_codes<Shape, kPitch>(to, token, chunk, codes);
}
template <class Shape, int kPitch>
__device__ __forceinline__ void put_kept(typename Shape::T *to, int token, int chunk, uint4 numbers) {
    store_16(to + 8 * (chunk * kPitch + token), numbers);
}

// ---- the products of a warp ----------------------------------------------------------------------------------------

// Bytes 0 and 1 of a word, or 2 and 3, as the codes they stand for.
template <bool kUpper>
__device__ __forceinline__ uint32_t two_codes(uint32_t word) {
    const uint32_t biased = __byte_perm(word, 0x64646464, kUpper ? 0x4342 : 0x4140), bias = 0x64806480;  // 1152
    const auto codes = __hsub2(*reinterpret_cast<const __half2 *>(&biased), *reinterpret_cast<const __half2 *>(&bias));
    return *reinterpret_cast<const uint32_t *>(&codes);
}

// A query's elements, as the products take them.
__device__ __forceinline__ uint4 pack_query(Eight x) {
    constexpr float most = 65504.f;
#pragma unroll
    for (int i = 0; i < 8; i++) x.at[i] = fminf(fmaxf(x.at[i], -most), most);
    return pack_eight<f16>(x);
}

// Where the lanes look for elements 8 chunk … 8 chunk + 7 of a query in [D/8][16][8]: two words each at `first` and
// `second`, the other one 64 words on.
struct QueryPlace {
    int first, second;
};
template <class Shape>
__device__ __forceinline__ QueryPlace query_place(int query, int chunk) {
    constexpr int fours = Shape::head_dim / 64 * 8;  // chunks that go by fours of 16
    const bool last = chunk >= fours;
    const int step = last ? chunk / 2 : chunk / 8 * 4 + chunk % 2 * 2, t = last ? chunk % 2 * 2 : chunk % 8 / 2;
    const int away = last ? 2 : 2 * 16 * 8;  // from the first four elements to the others: two lanes', or two k-steps'
    const int first = 4 * (2 * step * 16 + query) + t;
    return {first, first + away / 2};
}
template <class Shape>
__device__ __forceinline__ void put_query(typename Shape::T *q, int query, int chunk, uint4 x) {
    const QueryPlace place = query_place<Shape>(query, chunk);
    uint32_t *words = reinterpret_cast<uint32_t *>(q);
    words[place.first] = x.x, words[place.first + 16 * 4] = x.y;
    words[place.second] = x.z, words[place.second + 16 * 4] = x.w;
}
template <class Shape>
__device__ __forceinline__ uint4 get_query(const typename Shape::T *q, int query, int chunk) {
    const QueryPlace place = query_place<Shape>(query, chunk);
    const uint32_t *words = reinterpret_cast<const uint32_t *>(q);
    return make_uint4(words[place.first], words[place.first + 16 * 4], words[place.second],
                      words[place.second + 16 * 4]);
}

// Scores of codes, times the keys' scales: a lane's columns are tokens 8 n + 2 t and the next.
template <int kKeys>
__device__ __forceinline__ void scale_scores(float (&s)[kKeys / 8][4], const float *scales) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; n++) {
        const float2 scale = *reinterpret_cast<const float2 *>(scales + 8 * n + 2 * (lane_index() % 4));
        s[n][0] *= scale.x, s[n][1] *= scale.y, s[n][2] *= scale.x, s[n][3] *= scale.y;
    }
}

constexpr float kMostWeight = 32768.f;

template <class Shape>
__device__ __forceinline__ void clear_unit(Gathered<Shape> &state) {
    state.unit = kLeastElement, state.per_unit = kMostWeight / kLeastElement;
}

// What o counts, at the end.
template <class Shape>
__device__ __forceinline__ float value_unit(const Gathered<Shape> &state) {
    return kCoded<Shape> ? state.unit * (1.f / kMostWeight) : 1.f;
}

// Weights times the values' scales, in the unit that o is in: the largest scale yet.
template <class Shape, int kKeys>
__device__ __forceinline__ void scale_weights(Gathered<Shape> &state, float (&p)[kKeys / 8][4], const float *scales) {
    float2 scale[kKeys / 8];
    float largest = state.unit;
#pragma unroll
    for (int n = 0; n < kKeys / 8; n++) {
        scale[n] = *reinterpret_cast<const float2 *>(scales + 8 * n + 2 * (lane_index() % 4));
        largest = fmaxf(largest, fmaxf(scale[n].x, scale[n].y));
    }
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
    if (largest > state.unit) {  // in all lanes, or in none
        const float keep = state.unit / largest;
        state.unit = largest, state.per_unit = kMostWeight / largest;
#pragma unroll
        for (int j = 0; j < Shape::head_dim / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) state.o[j][i] *= keep;
    }
#pragma unroll
    for (int n = 0; n < kKeys / 8; n++) {
        const float x = scale[n].x * state.per_unit, y = scale[n].y * state.per_unit;
        p[n][0] *= x, p[n][1] *= y, p[n][2] *= x, p[n][3] *= y;
    }
}

// s[16, kKeys] = q k^T, of codes in shared memory.
template <class Shape, int kKeys, int kPitch, int kQueryPitch, bool kHeld>
__device__ __forceinline__ void score(float (&s)[kKeys / 8][4], const Queries<Shape, kQueryPitch, kHeld> &queries,
                                      const uint8_t *keys) {
    constexpr int fours = Shape::head_dim / 64, chunks = Shape::head_dim / 16;
    const int g = lane_index() / 4, t = lane_index() % 4;
    const auto multiply = [&](int step, int n, uint32_t word) {
        uint32_t q[4];
        queries.step(q, step);
        mma_16816<f16>(s[n], q, {two_codes<false>(word), two_codes<true>(word)});
    };
#pragma unroll
    for (int n = 0; n < kKeys / 8; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.f;
#pragma unroll
    for (int j = 0; j < fours; j++) {
        uint4 words[kKeys / 8];
#pragma unroll
        for (int n = 0; n < kKeys / 8; n++) words[n] = load_16(keys + chunk_place<kPitch>(8 * n, g, t) + 64 * kPitch * j);
#pragma unroll
        for (int n = 0; n < kKeys / 8; n++) {
            multiply(4 * j, n, words[n].x), multiply(4 * j + 1, n, words[n].y);
            multiply(4 * j + 2, n, words[n].z), multiply(4 * j + 3, n, words[n].w);
        }
    }
#pragma unroll
    for (int c = 4 * fours; c < chunks; c++)
#pragma unroll
        for (int n = 0; n < kKeys / 8; n++)
            multiply(c, n, *reinterpret_cast<const uint32_t *>(keys + chunk_place<kPitch>(8 * n, g, c) + 4 * t));
    scale_scores<kKeys>(s, scales_of<Shape, kPitch>(keys));
}

// Codes that a lane has of each token in the piece of D that begins `from` elements before its end.
__host__ __device__ constexpr int piece_codes(int left) { return left >= 128 ? 16 : left >= 64 ? 8 : left >= 32 ? 4 : 2; }

// kWords words of codes of one token.
template <int kWords>
__device__ __forceinline__ void take_words(uint32_t (&words)[kWords], const uint8_t *from) {
    if constexpr (kWords == 4) {
        const uint4 v = load_16(from);
        words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    } else if constexpr (kWords == 2) {
        const uint2 v = *reinterpret_cast<const uint2 *>(from);
        words[0] = v.x, words[1] = v.y;
    } else {
        words[0] = *reinterpret_cast<const uint32_t *>(from);
    }
}

// o's columns from kFrom on += weights times 16 tokens' codes.
template <class Shape, int kPitch, int kFrom>
__device__ __forceinline__ void add_piece(Gathered<Shape> &state, const uint32_t (&weights)[4], const uint8_t *values,
                                          int first) {
    if constexpr (kFrom < Shape::head_dim) {
        constexpr int codes = piece_codes(Shape::head_dim - kFrom), n_words = (codes + 3) / 4;
        const int g = lane_index() / 4, t = lane_index() % 4, d = kFrom + codes * g;
        uint32_t words[4][n_words];  // of tokens 2t, 2t+1, 2t+8, 2t+9
#pragma unroll
        for (int i = 0; i < 4; i++) {
            take_words(words[i],
                       values + chunk_place<kPitch>(first + i / 2 * 8, 2 * t + i % 2, d / 16) + d % 16 / 4 * 4);
            if constexpr (codes == 2) words[i][0] >>= g % 2 * 16;
        }
#pragma unroll
        for (int w = 0; w < n_words; w++)
#pragma unroll
            for (int pair = 0; pair < (codes + 1) / 2 && pair < 2; pair++) {
                const uint32_t order = pair ? 0x7362 : 0x5140;  // two elements, of two tokens each
                const uint32_t low = __byte_perm(words[0][w], words[1][w], order);
                const uint32_t high = __byte_perm(words[2][w], words[3][w], order);
                float(&even)[4] = state.o[kFrom / 8 + 4 * w + 2 * pair];
                float(&odd)[4] = state.o[kFrom / 8 + 4 * w + 2 * pair + 1];
                mma_16816<f16>(even, weights, {two_codes<false>(low), two_codes<false>(high)});
                mma_16816<f16>(odd, weights, {two_codes<true>(low), two_codes<true>(high)});
            }
        add_piece<Shape, kPitch, kFrom + 8 * codes>(state, weights, values, first);
    }
}

// o[16, D] += p[16, kKeys] v, of codes in shared memory; o's columns in the order of `column`.
template <class Shape, int kKeys, int kPitch>
__device__ __forceinline__ void add_values(Gathered<Shape> &state, const float (&p)[kKeys / 8][4],
                                           const uint8_t *values) {
    float scaled[kKeys / 8][4];
#pragma unroll
    for (int n = 0; n < kKeys / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) scaled[n][i] = p[n][i];
    scale_weights<Shape, kKeys>(state, scaled, scales_of<Shape, kPitch>(values));
#pragma unroll
    for (int n = 0; n < kKeys / 16; n++) {
        const uint32_t weights[4] = {pack2<f16>(scaled[2 * n][0], scaled[2 * n][1]),
                                     pack2<f16>(scaled[2 * n][2], scaled[2 * n][3]),
                                     pack2<f16>(scaled[2 * n + 1][0], scaled[2 * n + 1][1]),
                                     pack2<f16>(scaled[2 * n + 1][2], scaled[2 * n + 1][3])};
        add_piece<Shape, kPitch, 0>(state, weights, values, 16 * n);
    }
}

// Where o[j][0] of a lane belongs, in o's D columns; o[j][1] is `codes` further on.
struct Column {
    int at, codes;
};

template <class Shape>
__device__ __forceinline__ Column column(int j) {
    int from = 0, codes = piece_codes(Shape::head_dim);
    while (8 * j >= from + 8 * codes) from += 8 * codes, codes = piece_codes(Shape::head_dim - from);
    return {from + codes * (2 * (lane_index() % 4)) + j - from / 8, codes};
}
