"""A block of query rows of one sequence through its pages of 64 tokens, in order.

    for page in the pages (from the first in sight):
        S [R, 64]  = q K^T            R = B G query rows; tiles of registers, summed over D in order
        m', a, P   = max(m, S), exp(m - m'), exp(S - m');   l = l a + sum P           (softmax.py)
        O [R, D]   = O a + P V        summed over the tokens in order

Every query row meets the same operations in the same order however it is blocked; a page that is wholly masked leaves
m, l and O as they are.

Bytes: each block reads K and V of its sequence once, 2 * 64 * D numbers a page.  Operations: 4 * 64 * D a page and
query row.  With B = 1 (decode) memory is the limit; with R = 32 or more, arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tvm.tirx.script import builder as T

from llmc.compiler.kernel import PAGE_TOKENS
from llmc.schedules.cpu.attention.append import ONE, page_start
from llmc.schedules.cpu.attention.latent_spread import spread
from llmc.schedules.cpu.attention.shape import SPLIT_PAGES, SPREAD_COLUMNS, Attention
from llmc.schedules.cpu.attention.softmax import Softmax, State
from llmc.schedules.cpu.linear.panel import SECOND_LEVEL


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

    softmax_kind = Softmax

    def __init__(
        self, a: Attention, n: int, q: Any, positions: Any, page_table: Any, kv: Any, scales: Any, out: Any, s: Any,
        sinks: Any, slopes: Any = None, sees: Any = None,
    ):  # fmt: skip
        self.a, self.n, self.rows = a, n, n * a.group
        self.softmax = self.softmax_kind(a, n, positions, s, sinks, slopes)
        self.v = self.softmax.v
        self.q, self.positions, self.page_table, self.kv, self.out, self.scratch = q, positions, page_table, kv, out, s
        self.scales = scales
        self.sees = self.softmax.sees = sees

    def is_one_sequence(self, row: Any) -> Any:
        """Whether rows row … row + n - 1 continue each other's positions through the same pages (rows that pad the
        step may follow)."""
        a, one = self.a, T.alloc_buffer((1,), "int32")
        position = T.bind(self.positions[T.min(row, a.m - self.n)])
        T.buffer_store(one, T.cast(T.And(row + self.n <= a.m, position >= 0), "int32"), [0])
        with T.serial(1, self.n) as i, T.If(one[0] == 1), T.Then():
            there = T.bind(self.positions[row + i])
            with T.If(there >= 0), T.Then():
                with T.If(there != position + i), T.Then():
                    T.buffer_store(one, 0, [0])
                with T.serial(T.truncdiv(there, PAGE_TOKENS) + 1) as page:
                    ours, theirs = (self.page_table[each * a.pages + page] for each in (row, row + i))
                    with T.If(ours != theirs), T.Then():
                        T.buffer_store(one, 0, [0])
        return one[0] == 1

    def last_position(self, row: Any) -> Any:
        """The largest position of the block's rows; -1 when they all pad the step."""
        if self.n == 1:
            return T.bind(self.positions[row])
        last = T.alloc_buffer((1,), "int32")
        T.buffer_store(last, self.positions[row], [0])
        with T.serial(1, self.n) as i:
            T.buffer_store(last, T.max(last[0], self.positions[row + i]), [0])
        return T.bind(last[0])

    def last_seen(self, row: Any) -> Any:
        """The last position that a row of the block sees."""
        return self.last_position(row)

    def first_page(self, row: Any) -> Any:
        """The first page in the window, or the chunk, of the block's first row."""
        if not self.a.window:
            return 0
        if self.a.chunk:
            first = T.max(self.positions[row], 0)
            return T.bind(T.truncdiv(first - T.truncmod(first, self.a.chunk), PAGE_TOKENS))
        return T.bind(T.truncdiv(T.max(self.positions[row] - (self.a.window - 1), 0), PAGE_TOKENS))

    def first_split(self, row: Any) -> Any:
        return T.truncdiv(self.first_page(row), SPLIT_PAGES)

    def end_split(self, row: Any) -> Any:
        """The split after the last that the block sees; 0 when it sees none."""
        return T.truncdiv(self.last_seen(row) + SPLIT_PAGES * PAGE_TOKENS, SPLIT_PAGES * PAGE_TOKENS)

    def attend(self, row: Any, head: Any) -> None:
        """out = softmax(scale q K^T) V for the block that starts at `row`; zeros for a row at position -1."""
        row = T.bind(row)
        total, part = (self.softmax.state(start) for start in self.softmax.states)
        first, end = T.bind(self.first_split(row)), T.bind(self.end_split(row))
        with T.serial(T.max(end - first, 0)) as i:
            here = self.softmax.state(T.bind(T.Select(i == 0, total.start, part.start)))
            self.attend_split(row, head, first + i, here, True)
            with T.If(i > 0), T.Then():
                self.softmax.merge(total, part)
        self.softmax.finish(row, head, total, self.out)

    def attend_split(self, row: Any, head: Any, split: Any, state: State, goes_on: Any) -> None:
        """m, l and O of one split.  goes_on: whether the same thread will want the page behind it."""
        a = self.a
        last = self.last_position(row)
        last_page = T.bind(T.truncdiv(self.last_seen(row) if a.both_ways else last, PAGE_TOKENS))
        begin = ONE.keep(T.max(split * SPLIT_PAGES, self.first_page(row)), "int32")
        end = ONE.keep(T.min((split + 1) * SPLIT_PAGES, last_page + 1), "int32")
        wanted = ONE.keep(last_page if goes_on is True else T.Select(goes_on, last_page, end - 1), "int32")
        self.softmax.empty(state)
        with T.serial(T.max(end - begin, 0)) as i:
            page = ONE.keep(begin + i, "int32")
            base = page_start(a, self.page_table, row, page, head)
            following = page_start(a, self.page_table, row, T.min(page + 1, wanted), head)
            self.score(row, head, base)
            self.softmax.soften(row, head, page, lambda r, d: self.query(row, head, r, d), self.scales, base, state)
            self.gather(base, following, T.min(PAGE_TOKENS, last + 1 - page * PAGE_TOKENS), state)

    def query(self, row: Any, head: Any, r: Any, d: Any) -> Any:
        """Word d of query row r."""
        return self.q[((head * self.a.m + row) * self.a.group + r) * self.a.query_words + d]

    def score(self, row: Any, head: Any, base: Any) -> None:
        """S [R, 64] = q K^T, each sum over D in order."""
        a, v = self.a, self.v
        scores = self.softmax.scores
        if a.is_int8:
            line = 64 // a.word_bytes
            with T.serial((a.head_words - a.scales_at) // line) as i:
                self.ask_for(base + T.cast(a.scales_at + i * line, "int64"))

        def key(vector: Any, d: Any) -> Any:
            token = vector * v.n
            word = (T.truncdiv(token, 16) * (a.head_dim // a.per_word) + d) * 16 + T.truncmod(token, 16)
            if not a.spreads:
                self.ask_for(base + T.int64(a.key_words) + T.cast(word, "int64"))
            return v.load(self.kv, base + T.cast(word, "int64"))

        def begin(r: Any, vector: Any) -> Any:
            return v.all(0 if a.is_int8 else 0.0)

        def end(r: Any, vector: Any, value: Any) -> None:
            value = T.cast(value, v.f32) if a.is_int8 else value
            v.store(self.scratch, scores + r * PAGE_TOKENS + vector * v.n, value)

        def query(r: Any, d: Any) -> Any:
            return self.query(row, head, r, d)

        self.product(PAGE_TOKENS // v.n, a.head_dim // a.per_word, query, key, begin, end)

    def gather(self, base: Any, following: Any, n_tokens: Any, state: State) -> None:
        """O [R, D] = O a + P V, each sum over the page's n_tokens in order.  What lies behind them is never read as
        a number: a slot that was not written yet may hold anything.  (As an int8 it is one, and its weight is 0.)"""
        a, v, softmax = self.a, self.v, self.softmax
        per_row = PAGE_TOKENS // a.per_word * a.left_per_word
        n_tokens = T.bind(n_tokens)

        def value(vector: Any, t: Any) -> Any:
            if a.spreads:
                first, count = self.columns
                word = v.load(self.scratch, self.spread_at + t * count + (vector * v.n - first))
                return word if a.word_type == "float32" else v.keep(v.bits(word), "int32")
            word = t * a.padded_dim + vector * v.n
            self.ask_for(following + T.cast(word, "int64"))
            return v.load(self.kv, base + T.cast(a.key_words + word, "int64"))

        def weight(r: Any, t: Any) -> Any:
            word = self.scratch[softmax.weights + r * per_row + t]
            return word if self.a.query_type == "float32" else T.reinterpret(word, dtype="int32")

        def decayed(r: Any, vector: Any) -> Any:
            decay = v.load(self.scratch, softmax.decays + r * v.n)
            return v.load(state.buffer, state.sums(r) + vector * v.n) * decay

        def begin(r: Any, vector: Any) -> Any:
            return v.all(0) if a.is_int8 else decayed(r, vector)

        def end(r: Any, vector: Any, value: Any) -> None:
            if a.is_int8:
                step = v.load(self.scratch, softmax.steps + r * v.n)
                value = v.fma(T.cast(value, v.f32), step, decayed(r, vector))
            v.store(state.buffer, state.sums(r) + vector * v.n, value)

        odd = T.truncmod(n_tokens, 2) == 1 if a.per_word == 2 and not a.is_int8 else None
        steps = T.truncdiv(n_tokens + 1, 2) if a.is_int8 else T.truncdiv(n_tokens, a.per_word)

        def prepare(vector: Any, count: int) -> None:
            self.spread(base, following, (vector * v.n, count * v.n))

        self.product(a.padded_dim // v.n, steps, weight, value, begin, end, odd, prepare if a.spreads else None)

    def spread(self, base: Any, following: Any, columns: tuple[Any, int]) -> None:
        """Some columns of a page's values, which it has as keys alone, to scratch memory."""
        self.columns = columns
        next_page = following if self.n == 1 else None
        spread(self.a, self.kv, base, next_page, columns, self.scratch, self.spread_at)

    @property
    def spread_at(self) -> int:
        """Where values lie that are spread out."""
        return self.a.scratch_words(self.n) - PAGE_TOKENS // self.a.per_word * SPREAD_COLUMNS

    def ask_for(self, word: Any) -> None:
        """Brings what is read next, 16 KiB for which the first level has no room, to the second level cache while
        memory is the limit: the page's values while its keys are read, the next page's keys while its values are."""
        if self.n == 1:
            T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(self.kv[word]), 0, SECOND_LEVEL, 1))

    def product(
        self, n_vectors: int, steps: Any, left: Any, right: Any, begin: Any, end: Any, odd: Any = None,
        prepare: Callable[[Any, int], None] | None = None,
    ) -> None:  # fmt: skip
        """Rows of `left` times vectors of `right`, tile by tile.  odd: whether half a word follows the steps.
        prepare(first, count): what comes before any tile of so many vectors."""
        rows, width = tiles(self.rows, n_vectors, self.a.lanes)
        for first, n_spans, length in spans(n_vectors, width):
            with T.serial(n_spans) as span:
                vectors = [first + span * width + i for i in range(length)]
                if prepare is not None:
                    prepare(vectors[0], length)
                with T.serial(self.rows // rows) as tile:
                    self.tile(tile * rows, rows, vectors, steps, left, right, begin, end, odd)
                if self.rows % rows:
                    done = self.rows - self.rows % rows
                    self.tile(done, self.rows % rows, vectors, steps, left, right, begin, end, odd)

    def tile(
        self, row: Any, n: int, vectors: list[Any], steps: Any, left: Any, right: Any, begin: Any, end: Any, odd: Any
    ) -> None:
        v = self.v
        number = "int32" if self.a.is_int8 else "float32"
        sums = [T.alloc_buffer((len(vectors) * v.n,), number) for _ in range(n)]
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
                    v.store(row_sums, i * v.n, self.multiply_add(row_sums[v.at(i * v.n)], factor, word))

    def multiply_add(self, before: Any, factor: Any, word: Any) -> Any:
        if self.a.dot == "dpbf16":
            return T.call_extern(self.v.f32, "llmc_dpbf16", before, factor, word)
        if self.a.is_int8:
            return T.call_extern(self.v.i32, "llmc_madd16", before, factor, word)
        return self.v.fma(factor, word, before)
