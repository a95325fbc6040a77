// How the tokens of a unit come from pages to the shared memory of a block of attention_stream.cuh: each warp copies 16 of
// them at a time, K and V by turns, for itself.
#pragma once

#include "attention_codes.cuh"
#include "attention_unit.cuh"

// A lane's part of 16 tokens' codes of K or V, from a page's token `first` on to shared memory: that of `token`, every
// other chunk; zeros if not `valid`. Two chunks on a token lies 4 places away (chunk_place), four chunks on at the same
// place.
template <class Shape>
__device__ __forceinline__ void copy_codes(uint8_t *to, const uint8_t *page, int first, int token, bool valid) {
    constexpr int D = Shape::head_dim;
    const int upper = lane_index() / kTokens;
    const int to_place = chunk_place<kTokens>(token / 8 * 8, token % 8, upper);
    const int from_place = chunk_place<kPageTokens>(first + token / 8 * 8, token % 8, upper);
    uint8_t *const to_by_parity[2] = {to + to_place, to + (to_place ^ 4 * 16)};
    const uint8_t *const from_by_parity[2] = {page + from_place, page + (from_place ^ 4 * 16)};
#pragma unroll
    for (int i = 0; i < (D + 16) / 32; i++)
        if (D % 32 == 0 || 2 * i + upper < D / 16)
            cp_async_16(to_by_parity[i % 2] + 2 * i * kTokens * 16, from_by_parity[i % 2] + 2 * i * kPageTokens * 16,
                        valid);
    if (!upper)
        cp_async_4(scales_of<Shape, kTokens>(to) + token, scales_of<Shape, kPageTokens>(page) + first + token, valid);
}

// Chunks that this warp takes.
template <class Shape>
__device__ __forceinline__ int chunks_of(const Part &part) {
    return (part.n_chunks + Stream<Shape>::team - 1 - team_warp<Shape>()) / Stream<Shape>::team;
}

// Of a warp's i-th chunk, its first token.
template <class Shape>
__device__ __forceinline__ int chunk_first(const Part &part, int i) {
    return part.begin * kPageTokens + kTokens * (team_warp<Shape>() + Stream<Shape>::team * i);
}

// The copies of one warp's tokens: of each chunk K and then V, of chunks that are taken together K of all and then V.
template <class Shape>
struct Copies {
    using Kv = typename Shape::Kv;
    Kv *slots;
    const Kv *kv;
    const int *pages;
    int next, n, slot;  // the entry to ask for, how many there are, where it goes
    int n_chunks;

    static constexpr int kChunks = kTogether<Shape>;
    static __device__ __forceinline__ int chunk_at(int entry) { return entry / (2 * kChunks) * kChunks + entry % kChunks; }

    // Whether the warp has an i-th chunk: of those taken together the last may be missing.
    __device__ __forceinline__ bool is_there(int i) const { return kChunks == 1 || i < n_chunks; }

    // The page that holds an entry, whose first token is `first`.
    __device__ __forceinline__ const Kv *page_of(const Part &part, int entry, int first) const {
        return page_head<Shape>(const_cast<Kv *>(kv), pages[first / kPageTokens], part.kv_head) +
               entry / kChunks % 2 * kHeadElements<Shape>;
    }

    __device__ __forceinline__ void ask(const Part &part, const Fresh<Shape> &fresh) {
        if (next < n) {
            const bool there = is_there(chunk_at(next));  // else nothing is read, of a page that is
            const int first = there ? chunk_first<Shape>(part, chunk_at(next)) : part.begin * kPageTokens;
            const int token = lane_index() % kTokens;
            const bool valid = there && cached_tokens<Shape>(fresh, part.last, first) >> token & 1;
            const Kv *from = page_of(part, next, first);
            Kv *to = slots + slot * Stream<Shape>::block;
            if constexpr (kCoded<Shape>) {
                copy_codes<Shape>(to, from, first % kPageTokens, token, valid);
            } else {
                from += 8 * (first % kPageTokens + token), to += 8 * token;
#pragma unroll
                for (int i = 0; i < Shape::head_dim / 16; i++) {
                    const int chunk = 2 * i + lane_index() / kTokens;
                    cp_async_16(to + chunk * kTokens * 8, from + chunk * kPageTokens * 8, valid);
                }
            }
            next++;
            slot = slot + 1 == Shape::slots ? 0 : slot + 1;
        }
        cp_async_commit();
    }

    // Brings the i-th entry behind those that were asked for to L2.
    __device__ __forceinline__ void prefetch(const Part &part, int i) const {
        constexpr int run = 16 * kTokens, sectors = Shape::head_dim * int(sizeof(Kv)) / 16 * (run / 32);
        const int entry = next + i;
        if (entry >= n || !is_there(chunk_at(entry))) return;
        const int first = chunk_first<Shape>(part, chunk_at(entry));
        const auto *from = reinterpret_cast<const unsigned char *>(page_of(part, entry, first)) + 16 * (first % kPageTokens);
        for (int at = lane_index(); at < sectors; at += 32)
            prefetch_l2(from + at / (run / 32) * 16 * kPageTokens + at % (run / 32) * 32);
    }
};

// The first copies of this warp's tokens: as many as find room, and those that are asked for ahead of them.
template <class Shape>
__device__ __forceinline__ Copies<Shape> begin_copies(typename Shape::Kv *ring, const typename Shape::Kv *kv,
                                                      const int *page_table, const Part &part,
                                                      const Fresh<Shape> &fresh) {
    constexpr int together = kTogether<Shape>;
    const int n_chunks = chunks_of<Shape>(part), n = (n_chunks + together - 1) / together * together;
    Copies<Shape> copies = {ring + team_warp<Shape>() * Shape::slots * Stream<Shape>::block, kv,
                            page_table + (part.row + part.count - 1) * Shape::pages, 0, 2 * n, 0, n_chunks};
#pragma unroll 1
    for (int i = 0; i < Shape::slots; i++) copies.ask(part, fresh);
    for (int i = 0; i < kAhead<Shape>; i++) copies.prefetch(part, i);
    return copies;
}
