/* sha256.c - SHA-256 (FIPS 180-4), with the processor's own instructions where it has them. */
#include <string.h>

#include "runtime.h"

static const uint32_t K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

typedef void compress_function(uint32_t state[8], const uint8_t *blocks, uint64_t n_blocks);

static uint32_t rotate(uint32_t x, int n)
{
    return x >> n | x << (32 - n);
}

static uint32_t big_endian(const uint8_t *bytes)
{
    return (uint32_t)bytes[0] << 24 | (uint32_t)bytes[1] << 16 | (uint32_t)bytes[2] << 8 | bytes[3];
}

/* A round, but that the eight words are not moved: the caller names them one further each time. */
static inline void round_of(uint32_t a, uint32_t b, uint32_t c, uint32_t *d, uint32_t e, uint32_t f, uint32_t g,
                            uint32_t *h, uint32_t word)
{
    uint32_t t = *h + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + (g ^ (e & (f ^ g))) + word;
    *d += t;
    *h = t + (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & b) | (c & (a | b)));
}

static void compress_portable(uint32_t state[8], const uint8_t *blocks, uint64_t n_blocks)
{
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
    uint32_t e = state[4], f = state[5], g = state[6], h = state[7], w[64];
    for (; n_blocks; n_blocks--, blocks += 64) {
        for (int i = 0; i < 16; i++) w[i] = big_endian(blocks + 4 * i);
        for (int i = 16; i < 64; i++) {
            uint32_t x = w[i - 15], y = w[i - 2];
            uint32_t s0 = rotate(x, 7) ^ rotate(x, 18) ^ x >> 3, s1 = rotate(y, 17) ^ rotate(y, 19) ^ y >> 10;
            w[i] = w[i - 16] + s0 + w[i - 7] + s1;
        }
        for (int i = 0; i < 64; i += 8) {
            round_of(a, b, c, &d, e, f, g, &h, K[i] + w[i]);
            round_of(h, a, b, &c, d, e, f, &g, K[i + 1] + w[i + 1]);
            round_of(g, h, a, &b, c, d, e, &f, K[i + 2] + w[i + 2]);
            round_of(f, g, h, &a, b, c, d, &e, K[i + 3] + w[i + 3]);
            round_of(e, f, g, &h, a, b, c, &d, K[i + 4] + w[i + 4]);
            round_of(d, e, f, &g, h, a, b, &c, K[i + 5] + w[i + 5]);
            round_of(c, d, e, &f, g, h, a, &b, K[i + 6] + w[i + 6]);
            round_of(b, c, d, &e, f, g, h, &a, K[i + 7] + w[i + 7]);
        }
        state[0] = a += state[0], state[1] = b += state[1], state[2] = c += state[2], state[3] = d += state[3];
        state[4] = e += state[4], state[5] = f += state[5], state[6] = g += state[6], state[7] = h += state[7];
    }
}

#ifdef __x86_64__
#include <cpuid.h>
#include <immintrin.h>

/* The instructions keep the state as (a, b, e, f) and (c, d, g, h), the first word on top. */
__attribute__((target("sha,sse4.1,ssse3")))
static void compress_sha_ni(uint32_t state[8], const uint8_t *blocks, uint64_t n_blocks)
{
    const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);
    __m128i dcba = _mm_loadu_si128((const __m128i *)state);
    __m128i hgfe = _mm_loadu_si128((const __m128i *)(state + 4));
    __m128i cdab = _mm_shuffle_epi32(dcba, 0xb1), efgh = _mm_shuffle_epi32(hgfe, 0x1b);
    __m128i abef = _mm_alignr_epi8(cdab, efgh, 8), cdgh = _mm_blend_epi16(efgh, cdab, 0xf0);

    for (; n_blocks; n_blocks--, blocks += 64) {
        __m128i w[4], abef_before = abef, cdgh_before = cdgh;
        for (int i = 0; i < 4; i++) w[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)blocks + i), swap);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) { /* four rounds at a time; w[i % 4] holds their words */
            __m128i words = _mm_add_epi32(w[i % 4], _mm_loadu_si128((const __m128i *)K + i));
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, words);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(words, 0x0e));
            if (i < 12) { /* the words of rounds 4i + 16 … 4i + 19 take the place of these */
                __m128i w1 = w[(i + 1) % 4], w2 = w[(i + 2) % 4], w3 = w[(i + 3) % 4];
                __m128i sum = _mm_add_epi32(_mm_sha256msg1_epu32(w[i % 4], w1), _mm_alignr_epi8(w3, w2, 4));
                w[i % 4] = _mm_sha256msg2_epu32(sum, w3);
            }
        }
        abef = _mm_add_epi32(abef, abef_before);
        cdgh = _mm_add_epi32(cdgh, cdgh_before);
    }
    __m128i feba = _mm_shuffle_epi32(abef, 0x1b), dchg = _mm_shuffle_epi32(cdgh, 0xb1);
    _mm_storeu_si128((__m128i *)state, _mm_blend_epi16(feba, dchg, 0xf0));
    _mm_storeu_si128((__m128i *)(state + 4), _mm_alignr_epi8(dchg, feba, 8));
}

static compress_function *fastest(void)
{
    unsigned a, b, c, d;
    int sha = __get_cpuid_count(7, 0, &a, &b, &c, &d) && b & 1u << 29;
    int sse = __get_cpuid(1, &a, &b, &c, &d) && c & bit_SSE4_1 && c & bit_SSSE3;
    return sha && sse ? compress_sha_ni : compress_portable;
}
#elif defined __aarch64__ && defined __ARM_NEON
#include <arm_neon.h>
#include <sys/auxv.h>

enum { HAS_SHA2 = 1 << 6 }; /* of AT_HWCAP */

/* The instructions keep the state as (a, b, c, d) and (e, f, g, h). */
__attribute__((target("+crypto")))
static void compress_sha2(uint32_t state[8], const uint8_t *blocks, uint64_t n_blocks)
{
    uint32x4_t abcd = vld1q_u32(state), efgh = vld1q_u32(state + 4);
    for (; n_blocks; n_blocks--, blocks += 64) {
        uint32x4_t w[4], abcd_before = abcd, efgh_before = efgh;
        for (int i = 0; i < 4; i++) w[i] = vreinterpretq_u32_u8(vrev32q_u8(vld1q_u8(blocks + 16 * i)));
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) { /* four rounds at a time; w[i % 4] holds their words */
            uint32x4_t words = vaddq_u32(w[i % 4], vld1q_u32(K + 4 * i)), above = abcd;
            abcd = vsha256hq_u32(abcd, efgh, words);
            efgh = vsha256h2q_u32(efgh, above, words);
            if (i < 12) /* the words of rounds 4i + 16 … 4i + 19 take the place of these */
                w[i % 4] = vsha256su1q_u32(vsha256su0q_u32(w[i % 4], w[(i + 1) % 4]), w[(i + 2) % 4], w[(i + 3) % 4]);
        }
        abcd = vaddq_u32(abcd, abcd_before);
        efgh = vaddq_u32(efgh, efgh_before);
    }
    vst1q_u32(state, abcd);
    vst1q_u32(state + 4, efgh);
}

static compress_function *fastest(void)
{
    return getauxval(AT_HWCAP) & HAS_SHA2 ? compress_sha2 : compress_portable;
}
#else
static compress_function *fastest(void)
{
    return compress_portable;
}
#endif

static const sha256_state START = {
    .words = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19},
};

static void add_with(compress_function *compress, sha256_state *state, const uint8_t *bytes, uint64_t n_bytes)
{
    uint64_t n_kept = state->n_bytes % 64;
    state->n_bytes += n_bytes;
    if (n_kept) { /* a block that was begun comes first */
        uint64_t n = n_bytes < 64 - n_kept ? n_bytes : 64 - n_kept;
        if (n) memcpy(state->block + n_kept, bytes, n);
        if (n_kept + n < 64) return;
        compress(state->words, state->block, 1);
        bytes += n;
        n_bytes -= n;
    }
    compress(state->words, bytes, n_bytes / 64);
    if (n_bytes % 64) memcpy(state->block, bytes + n_bytes / 64 * 64, n_bytes % 64);
}

static void end_with(compress_function *compress, const sha256_state *state, uint8_t digest[32])
{
    uint32_t words[8];
    uint8_t last[128] = {0}; /* what is left, a 1 bit, zeros, and the length in bits */
    uint64_t n_left = state->n_bytes % 64, n_last = n_left < 56 ? 64 : 128;
    memcpy(words, state->words, sizeof words);
    memcpy(last, state->block, n_left);
    last[n_left] = 0x80;
    for (int i = 0; i < 8; i++) last[n_last - 1 - (uint64_t)i] = (uint8_t)(state->n_bytes * 8 >> 8 * i);
    compress(words, last, n_last / 64);
    for (int i = 0; i < 32; i++) digest[i] = (uint8_t)(words[i / 4] >> (24 - 8 * (i % 4)));
}

void sha256_begin(sha256_state *state)
{
    *state = START;
}

void sha256_add(sha256_state *state, const void *bytes, uint64_t n_bytes)
{
    add_with(fastest(), state, bytes, n_bytes);
}

void sha256_end(const sha256_state *state, uint8_t digest[32])
{
    end_with(fastest(), state, digest);
}

static void digest_with(compress_function *compress, const uint8_t *bytes, uint64_t n_bytes, uint8_t digest[32])
{
    sha256_state state = START;
    add_with(compress, &state, bytes, n_bytes);
    end_with(compress, &state, digest);
}

void sha256(const uint8_t *bytes, uint64_t n_bytes, uint8_t digest[32])
{
    digest_with(fastest(), bytes, n_bytes, digest);
}

void sha256_portable(const uint8_t *bytes, uint64_t n_bytes, uint8_t digest[32])
{
    digest_with(compress_portable, bytes, n_bytes, digest);
}
