"""The second kernel of paged attention: an online softmax over the pages of 64 tokens, in order.

    for (kv head, block of B rows) in parallel:                       grid KH * ceil(M / B)
        a block of one sequence at consecutive positions goes through at once, any other row by row:
        for page in the sequence's pages (from the window's first):
            S [R, 64]  = q K^T            R = B G query rows; tiles of registers, summed over D in order
            m', a, P   = max(m, S), exp(m - m'), exp(S - m');   l = l a + sum P
            O [R, D]   = O a + P V        summed over the tokens in order
        out = O / l

Every query row meets the same operations in the same order however it is blocked, so its bits are the same alone, in
a batch, in any chunk of a prompt; a page that is wholly masked leaves m, l and O as they are.

Bytes: each block reads K and V of its sequence once, 2 * 64 * D numbers a page.  Operations: 4 * 64 * D a page and
query row.  With B = 1 (decode) memory is the limit; with R = 32 or more, arithmetic.
Milakov and Gimelshein 2018, arXiv:1805.02867;  Dao et al. 2022, arXiv:2205.14135.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from llmc.compiler.kernel import PAGE_TOKENS
from llmc.schedules.cpu.attention_append import page_start
from llmc.schedules.cpu.attention_shape import Attention
from llmc.schedules.cpu.lanes import AVX512_BF16, Lanes, share, widest

MASKED = -1e30
"""The score of a key that is out of sight, and the maximum before the first: finite, so that differences are."""
SECOND_LEVEL = 2
"""Where prefetched lines go, as LLVM counts: the first level has no room for 16 KiB of what comes next."""


def attend_kernel(a: Attention, block: int) -> Any:
    """(q, positions, page_table, kv, out, scratch, task, n_tasks)."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("attend")
        q = T.arg("q", T.buffer((a.m * a.heads * a.query_words,), a.query_type))
        positions = T.arg("positions", T.buffer((a.m,), "int32"))
        page_table = T.arg("page_table", T.buffer((a.m * a.pages,), "int32"))
        kv = T.arg("kv", T.buffer((T.int64(1 << 40),), "float32" if a.dot == "fma" else "int32"))
        out = T.arg("out", T.buffer((a.m * a.heads * a.head_dim,), "float32"))
        scratch = T.arg("scratch", T.buffer((a.scratch_words(block),), "float32"))
        task, n_tasks = T.arg("task", T.int32()), T.arg("n_tasks", T.int32())
        blocks = -(-a.m // block)
        one = Block(a, 1, q, positions, page_table, kv, out, scratch)
        many = Block(a, block, q, positions, page_table, kv, out, scratch)
        intrinsics = T.attr(0, "pragma_import_llvm", AVX512_BF16) if a.dot == "dpbf16" else nullcontext()
        with intrinsics, share(a.kv_heads * blocks, task, n_tasks) as unit:
            head, index = T.bind(T.truncdiv(unit, blocks)), T.bind(T.truncmod(unit, blocks))
            half = T.truncdiv(index, 2)  # early rows see little, late ones much: every task gets some of both
            row = T.bind(T.Select(T.truncmod(index, 2) == 0, half, blocks - 1 - half) * block)
            if block == 1:
                one.attend(row, head)
            else:
                with T.If(many.is_one_sequence(row)):
                    with T.Then():
                        many.attend(row, head)
                    with T.Else(), T.serial(T.min(block, a.m - row)) as i:
                        one.attend(row + i, head)
    return builder.get()


def tiles(n_rows: int, n_vectors: int, lanes: int) -> tuple[int, int]:
    """Rows and vectors of a register tile: up to 4 rows, at most 16 accumulators (8 where there are 16 registers)."""
    rows = -(-n_rows // -(-n_rows // 4))
    return rows, min(n_vectors, (16 if lanes == 16 else 8) // rows)


def spans(n: int, width: int) -> Iterator[tuple[int, int, int]]:
    """(start, count, length) of the runs of equal spans that cover range(n)."""
    whole = n // width
    yield 0, whole, width
    if n % width:
        yield whole * width, 1, n % width


class Block:
    """`n` rows of one sequence at consecutive positions: the statements that attend for all their query rows."""

    def __init__(self, a: Attention, n: int, q: Any, positions: Any, page_table: Any, kv: Any, out: Any, s: Any):
        self.a, self.n, self.rows, self.v = a, n, n * a.group, Lanes(a.lanes)
        self.q, self.positions, self.page_table, self.kv, self.out, self.scratch = q, positions, page_table, kv, out, s
        words = (PAGE_TOKENS, PAGE_TOKENS, a.padded_dim, a.lanes, a.lanes, a.lanes)
        starts = [self.rows * sum(words[:i]) for i in range(len(words))]
        self.scores, self.weights, self.sums, self.maxima, self.totals, self.decays = starts

    def is_one_sequence(self, row: Any) -> Any:
        """Whether rows row … row + n - 1 continue each other's positions through the same pages (rows that pad the
        step may follow)."""
        a, one = self.a, T.alloc_buffer((1,), "int32")
        position = T.bind(self.positions[T.min(row, a.m - self.n)])
        T.buffer_store(one, T.cast(T.And(row + self.n <= a.m, position >= 0), "int32"), [0])
        with T.If(one[0] == 1), T.Then(), T.serial(1, self.n) as i:
            there = T.bind(self.positions[row + i])
            with T.If(there >= 0), T.Then():
                with T.If(there != position + i), T.Then():
                    T.buffer_store(one, 0, [0])
                with T.serial(T.truncdiv(there, PAGE_TOKENS) + 1) as page:
                    ours, theirs = (self.page_table[each * a.pages + page] for each in (row, row + i))
                    with T.If(ours != theirs), T.Then():
                        T.buffer_store(one, 0, [0])
        return one[0] == 1

    def attend(self, row: Any, head: Any) -> None:
        """out = softmax(scale q K^T) V for the block that starts at `row`; zeros for a row at position -1."""
        a, v = self.a, self.v
        row = T.bind(row)
        first = T.bind(self.positions[row])
        last = T.alloc_buffer((1,), "int32")
        T.buffer_store(last, first, [0])
        with T.serial(1, self.n) as i:
            T.buffer_store(last, T.max(last[0], self.positions[row + i]), [0])
        with T.serial(self.rows) as r:
            v.store(self.scratch, self.maxima + r * v.n, v.all(MASKED))
            v.store(self.scratch, self.totals + r * v.n, v.all(0.0))
            with T.serial(a.padded_dim // v.n) as d:
                v.store(self.scratch, self.sums + r * a.padded_dim + d * v.n, v.all(0.0))
        begin = T.bind(T.truncdiv(T.max(first - (a.window - 1), 0), PAGE_TOKENS) if a.window else 0)
        n_pages = T.bind(T.Select(last[0] < 0, 0, T.truncdiv(last[0], PAGE_TOKENS) + 1))
        with T.serial(T.max(n_pages - begin, 0)) as page:
            index = T.bind(begin + page)
            base = page_start(a, self.page_table, row, index, head)
            following = page_start(a, self.page_table, row, T.min(index + 1, n_pages - 1), head)
            self.score(row, head, base)
            self.soften(row, index)
            self.gather(base, following, T.min(PAGE_TOKENS, last[0] + 1 - index * PAGE_TOKENS))
        self.finish(row, head)

    def score(self, row: Any, head: Any, base: Any) -> None:
        """S [R, 64] = q K^T, each sum over D in order."""
        a, v = self.a, self.v
        q = T.bind((head * a.m + row) * (a.group * a.query_words))

        def key(vector: Any, d: Any) -> Any:
            token = vector * v.n
            word = (T.truncdiv(token, 16) * (a.head_dim // a.per_word) + d) * 16 + T.truncmod(token, 16)
            self.ask_for(base + T.int64(a.key_words) + T.cast(word, "int64"))
            return v.load(self.kv, base + T.cast(word, "int64"))

        def query(r: Any, d: Any) -> Any:
            return self.q[q + r * a.query_words + d]

        def begin(r: Any, vector: Any) -> Any:
            return v.all(0.0)

        def end(r: Any, vector: Any, value: Any) -> None:
            v.store(self.scratch, self.scores + r * PAGE_TOKENS + vector * v.n, value)

        self.product(PAGE_TOKENS // v.n, a.head_dim // a.per_word, query, key, begin, end)

    def gather(self, base: Any, following: Any, n_tokens: Any) -> None:
        """O [R, D] = O a + P V, each sum over the page's n_tokens in order.  What lies behind them is never read as
        a number: a slot that was not written yet may hold anything."""
        a, v = self.a, self.v
        per_row = PAGE_TOKENS // a.per_word * a.left_per_word
        n_tokens = T.bind(n_tokens)

        def value(vector: Any, t: Any) -> Any:
            word = t * a.padded_dim + vector * v.n
            self.ask_for(following + T.cast(word, "int64"))
            return v.load(self.kv, base + T.cast(a.key_words + word, "int64"))

        def weight(r: Any, t: Any) -> Any:
            word = self.scratch[self.weights + r * per_row + t]
            return T.reinterpret(word, dtype="int32") if a.dot == "dpbf16" else word

        def begin(r: Any, vector: Any) -> Any:
            decay = v.load(self.scratch, self.decays + r * v.n)
            return v.load(self.scratch, self.sums + r * a.padded_dim + vector * v.n) * decay

        def end(r: Any, vector: Any, value: Any) -> None:
            v.store(self.scratch, self.sums + r * a.padded_dim + vector * v.n, value)

        odd = T.truncmod(n_tokens, 2) == 1 if a.per_word == 2 else None
        self.product(a.padded_dim // v.n, T.truncdiv(n_tokens, a.per_word), weight, value, begin, end, odd)

    def ask_for(self, word: Any) -> None:
        """Brings what is read next to the second level cache while memory is the limit: the page's values while its
        keys are read, the next page's keys while its values are."""
        if self.n == 1:
            T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(self.kv[word]), 0, SECOND_LEVEL, 1))

    def product(self, n_vectors: int, steps: Any, left: Any, right: Any, begin: Any, end: Any, odd: Any = None) -> None:
        """Rows of `left` times vectors of `right`, tile by tile.  odd: whether half a word follows the steps."""
        rows, width = tiles(self.rows, n_vectors, self.a.lanes)
        for first, n_spans, length in spans(n_vectors, width):
            with T.serial(n_spans) as span:
                vectors = [first + span * width + i for i in range(length)]
                with T.serial(self.rows // rows) as tile:
                    self.tile(tile * rows, rows, vectors, steps, left, right, begin, end, odd)
                if self.rows % rows:
                    done = self.rows - self.rows % rows
                    self.tile(done, self.rows % rows, vectors, steps, left, right, begin, end, odd)

    def tile(
        self, row: Any, n: int, vectors: list[Any], steps: Any, left: Any, right: Any, begin: Any, end: Any, odd: Any
    ) -> None:
        v = self.v
        sums = [T.alloc_buffer((len(vectors) * v.n,), "float32") for _ in range(n)]
        for r in range(n):
            for i, vector in enumerate(vectors):
                v.store(sums[r], i * v.n, begin(row + r, vector))
        with T.serial(steps) as step:
            words = [right(vector, step) for vector in vectors]
            self.multiply(sums, words, row, step, left, range(self.a.left_per_word))
        if odd is not None:
            with T.If(odd), T.Then():
                words = [v.keep(T.bitwise_and(right(vector, steps), v.all(0xFFFF)), "int32") for vector in vectors]
                self.multiply(sums, words, row, steps, left, range(1))
        for r in range(n):
            for i, vector in enumerate(vectors):
                end(row + r, vector, sums[r][v.at(i * v.n)])

    def multiply(self, sums: Any, words: list[Any], row: Any, step: Any, left: Any, parts: range) -> None:
        """sums += left * words: one word of the cache, each of its elements in order."""
        a, v = self.a, self.v
        for part in parts:
            if a.dot == "widen":
                halves = [v.keep(v.high_bf16(word) if part else v.low_bf16(word)) for word in words]
            else:
                halves = words
            for r, row_sums in enumerate(sums):
                factor = T.bind(v.all(left(row + r, step * a.left_per_word + part)))
                for i, word in enumerate(halves):
                    before = row_sums[v.at(i * v.n)]
                    if a.dot == "dpbf16":
                        after = T.call_extern(v.f32, "llmc_dpbf16", before, factor, word)
                    else:
                        after = v.fma(factor, word, before)
                    v.store(row_sums, i * v.n, after)

    def soften(self, row: Any, page: Any) -> None:
        """m, l, a and P of each query row from its scores in this page."""
        a, v = self.a, self.v
        vectors = range(PAGE_TOKENS // v.n)
        with T.serial(self.rows) as r:
            at = T.bind(self.scores + r * PAGE_TOKENS)
            position = self.positions[row + (T.truncdiv(r, a.group) if self.n > 1 else 0)]
            ahead = v.keep(v.all(page * PAGE_TOKENS - position), "int32")
            scores = [self.seen(v.load(self.scratch, at + i * v.n), ahead, i * v.n) for i in vectors]
            before = v.load(self.scratch, self.maxima + r * v.n)
            peak = scores[0]
            for score in scores[1:]:
                peak = v.keep(T.max(peak, score))
            maximum = v.keep(T.max(before, v.maximum(peak)))
            v.store(self.scratch, self.maxima + r * v.n, maximum)
            decay = v.exp(before - maximum)
            v.store(self.scratch, self.decays + r * v.n, decay)
            weights = [v.exp(score - maximum) for score in scores]
            self.keep_weights(r, weights)
            while len(weights) > 1:
                weights = [v.keep(x + y) for x, y in zip(weights[::2], weights[1::2], strict=True)]
            total = v.load(self.scratch, self.totals + r * v.n)
            v.store(self.scratch, self.totals + r * v.n, v.fma(total, decay, weights[0]))

    def seen(self, score: Any, ahead: Any, token: int) -> Any:
        """The scaled, capped score where the key is in sight: pos - window < key <= pos.  ahead: page's key - pos."""
        a, v = self.a, self.v
        score = v.keep(score * v.all(a.scale))
        if a.softcap:
            score = v.keep(v.tanh(score * v.all(1.0 / a.softcap)) * v.all(a.softcap))
        distance = v.keep(ahead + T.ramp(T.int32(token), 1, v.n), "int32")
        score = T.Select(distance <= v.all(0), score, v.all(MASKED))
        if a.window:
            score = T.Select(distance > v.all(-a.window), score, v.all(MASKED))
        return v.keep(score)

    def keep_weights(self, r: Any, weights: list[Any]) -> None:
        """P as the values' multiplier: float32, rounded to bf16 where the cache is, in pairs where pairs multiply."""
        a, v = self.a, self.v
        if a.dot == "dpbf16":
            half = v.n // 2
            for i, weight in enumerate(weights):
                pairs = T.reinterpret(T.call_extern(f"int32x{half}", "llmc_cvtbf16", weight), dtype=f"float32x{half}")
                T.buffer_store(self.scratch, pairs, [T.ramp(self.weights + r * (PAGE_TOKENS // 2) + i * half, 1, half)])
            return
        for i, weight in enumerate(weights):
            rounded = weight if a.dot == "fma" else v.float(v.round_bf16(weight))
            v.store(self.scratch, self.weights + r * PAGE_TOKENS + i * v.n, rounded)

    def finish(self, row: Any, head: Any) -> None:
        """out = O / l.  Adding 0 leaves one zero, not two."""
        a, v, part = self.a, self.v, widest(self.a.head_dim, self.a.lanes)
        with T.serial(self.rows) as r:
            here = T.bind(row + T.truncdiv(r, a.group))
            to = T.bind((here * a.heads + head * a.group + T.truncmod(r, a.group)) * a.head_dim)
            v.store(self.scratch, self.totals + r * v.n, v.sum(v.load(self.scratch, self.totals + r * v.n)))
            scale = T.bind(part.all(T.float32(1.0) / self.scratch[self.totals + r * v.n]))
            with T.If(self.positions[here] >= 0):
                with T.Then(), T.serial(a.head_dim // part.n) as d:
                    total = part.load(self.scratch, self.sums + r * a.padded_dim + d * part.n)
                    part.store(self.out, to + d * part.n, part.fma(total, scale, part.all(0.0)))
                with T.Else(), T.serial(a.head_dim // part.n) as d:
                    part.store(self.out, to + d * part.n, part.all(0.0))
