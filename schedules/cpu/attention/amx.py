"""A block of query rows on AMX: what tiles.py computes, its two products in tile registers.

    for page in the pages:
        S [R, 64]  = q K^T            16 query rows by 16 tokens by 32 of D in one tdpbf16ps
        m', a, P   = …                in vectors, P rounded to bf16                   (softmax.py)
        O [R, D]   = O a + P V        16 query rows by 16 of D by 32 tokens

The cache lies as on other levels: 16 pairs of d by 16 tokens of K, and 16 pairs of tokens by 16 d of V, are what the
instruction wants of its right operand.  Query rows and P are rows of pairs, its left.

Rows of a tile do not see each other, and each sum is over D, and over the page's tokens, 32 at a time: the same bits
however rows are blocked, and for a row by itself.  A token that a row does not see has the weight 0 and adds nothing.
(A sum that is subnormal becomes 0 at every product: it is 0 after the first, so pages out of sight do not change it.)

Operations: two products of 64 D a page and query row; a row's softmax takes about as long as both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tvm.tirx.script import builder as T

from llmc.compiler.kernel import PAGE_TOKENS
from llmc.schedules.cpu.amx import DECLARED, REGISTERS, ROW_BYTES, ROWS, TILE_BYTES, call, function, load, shapes, store
from llmc.schedules.cpu.attention.shape import Attention
from llmc.schedules.cpu.attention.softmax import State
from llmc.schedules.cpu.attention.tiles import Block, spans
from llmc.schedules.cpu.linear.panel import FIRST_LEVEL, SECOND_LEVEL

SUMS = range(4)
QUERY, KEYS, WEIGHTS, VALUES = range(len(SUMS), REGISTERS)
"""Registers: sums of 16 query rows by 64 tokens, or by up to 64 of D; a tile of each operand."""
TILE_TOKENS = 32
"""Tokens that one product with values adds up."""
TILE_WORDS = TILE_TOKENS // 2
NEAR_DIM = 128
"""With heads of up to so many elements K and V of a page are 32 KiB at most."""


class TiledBlock(Block):
    """The same statements, for tiles of query rows: as many in each, the last filled up with rows that nobody reads."""

    def attend_split(self, row: Any, head: Any, split: Any, state: State, goes_on: Any) -> None:
        """m, l and O of one split, gathered in scratch memory, where rows of O are as far apart for all of a block."""
        away = state.buffer is not self.scratch
        here = self.softmax.state(self.softmax.states[0]) if away else state
        call(f"tiles_open_{self.a.tile_rows(self.n)}")
        super().attend_split(row, head, split, here, goes_on)
        call("tiles_close")
        if away:
            self.copy(here, state)

    def copy(self, source: State, to: State) -> None:
        v = self.v
        with T.serial(self.rows) as r, T.serial(self.a.state_words // v.n) as i:
            v.store(to.buffer, to.maximum(r) + i * v.n, v.load(source.buffer, source.maximum(r) + i * v.n))

    def score(self, row: Any, head: Any, base: Any) -> None:
        """S [R, 64] = q K^T, tile by tile of query rows."""
        query = ((head * self.a.m + row) * self.a.group) * self.a.query_words
        keys, values = (T.address_of(self.kv[at]) for at in (base, base + T.int64(self.a.key_words)))
        with self.tile_starts() as first:
            q = T.address_of(self.q[query + first * self.a.query_words])
            scores = T.address_of(self.scratch[self.softmax.scores + first * PAGE_TOKENS])
            if self.n == 1 and not self.a.spreads:  # memory is the limit: values are asked for while keys are read
                call("scores_ask", q, keys, scores, values)
            else:
                call("scores", q, keys, scores)

    def gather(self, base: Any, following: Any, n_tokens: Any, state: State) -> None:
        """O [R, D] = O a + P V, tile by tile of query rows."""
        self.decay(state)
        n_tokens = T.bind(n_tokens)
        if self.a.spreads:
            self.gather_spread(base, following, n_tokens, state)
            return
        values = T.bind(base + T.int64(self.a.key_words))
        with T.If(n_tokens == PAGE_TOKENS):
            with T.Then(), self.tile_starts() as first:
                operands = self.weights(first, 0), T.address_of(self.kv[values]), self.sums(first, state)
                if self.n == 1:  # the next page's keys are asked for while these values are read
                    call("sums_ask", *operands, T.address_of(self.kv[following]))
                else:
                    call("sums", *operands)
            with T.Else():
                self.gather_some(values, n_tokens, state)

    def gather_spread(self, base: Any, following: Any, n_tokens: Any, state: State) -> None:
        """The same of values that are spread out of keys, as many columns at a time as there are registers."""
        for first, count, n in spans(self.a.padded_dim // 16, len(SUMS)):
            with T.serial(count) as i:
                column = (first + i * n) * 16
                self.spread(base, following, (column, 16 * n))
                self.forget_unwritten(n_tokens, 16 * n)
                with self.tile_starts() as row:
                    sums = T.address_of(state.buffer[state.start + row * state.words + 2 * state.lanes + column])
                    call(f"sums_{n}", self.weights(row, 0), T.address_of(self.scratch[self.spread_at]), sums)

    def forget_unwritten(self, n_tokens: Any, n_columns: int) -> None:
        """Zeros for tokens that were not written yet, whose slots may hold anything: 0 times a NaN is none."""
        v = self.v
        start = T.bind(T.truncdiv(n_tokens, 2))
        with T.serial(PAGE_TOKENS // 2 - start) as i:
            mask = T.bind(T.Select(n_tokens > (start + i) * 2, T.int32(0xFFFF), T.int32(0)))
            with T.serial(n_columns // v.n) as d:
                at = T.bind(self.spread_at + (start + i) * n_columns + d * v.n)
                words = v.bits(v.load(self.scratch, at))
                v.store(self.scratch, at, v.float(T.bitwise_and(words, v.all(mask))))

    def gather_some(self, values: Any, n_tokens: Any, state: State) -> None:
        """The same, of a page's first tokens.  The last of them, if they fill no tile, come from a copy."""
        whole = T.bind(T.truncdiv(n_tokens, TILE_TOKENS))
        with T.If(whole > 0), T.Then(), self.tile_starts() as first:
            call("sums_half", self.weights(first, 0), T.address_of(self.kv[values]), self.sums(first, state))
        with T.If(T.truncmod(n_tokens, TILE_TOKENS) > 0), T.Then():
            self.copy_written(values, n_tokens)
            with self.tile_starts() as first:
                copy = T.address_of(self.scratch[self.written])
                call("sums_half", self.weights(first, whole), copy, self.sums(first, state))

    @contextmanager
    def tile_starts(self) -> Iterator[Any]:
        """A loop over the first query row of each tile."""
        rows = self.a.tile_rows(self.n)
        with T.serial(self.a.room(self.n) // rows) as tile:
            yield tile * rows

    def weights(self, first: Any, half: Any) -> Any:
        """Where P begins for a tile of query rows and half of the page's tokens."""
        return T.address_of(self.scratch[self.softmax.weights + first * (PAGE_TOKENS // 2) + half * TILE_WORDS])

    def sums(self, first: Any, state: State) -> Any:
        """Where O begins for a tile of query rows."""
        return T.address_of(state.buffer[state.start + first * state.words + 2 * state.lanes])

    def decay(self, state: State) -> None:
        """O = O a, where a is not 1."""
        a, v = self.a, self.v
        with T.serial(self.rows) as r:
            decay = T.bind(self.scratch[self.softmax.decays + r * v.n])
            with T.If(decay != T.float32(1.0)), T.Then(), T.serial(a.padded_dim // v.n) as d:
                at = state.sums(r) + d * v.n
                v.store(state.buffer, at, v.load(state.buffer, at) * v.all(decay))

    @property
    def written(self) -> int:
        """Where the copy lies: [16][D'] pairs."""
        return self.a.scratch_words(self.n) - TILE_WORDS * self.a.padded_dim

    def copy_written(self, values: Any, n_tokens: Any) -> None:
        """Copies a page's last tokens that fill no tile, zeros behind them: a slot that was not written yet may hold
        anything, and 0 times a NaN is none."""
        a, v = self.a, self.v
        start = T.bind(T.truncdiv(n_tokens, TILE_TOKENS) * TILE_WORDS)
        with T.serial(TILE_WORDS) as pair:
            left = T.bind(n_tokens - (start + pair) * 2)
            mask = T.bind(T.Select(left >= 2, T.int32(-1), T.Select(left == 1, T.int32(0xFFFF), T.int32(0))))
            with T.serial(a.padded_dim // v.n) as d:
                at = T.bind(pair * a.padded_dim + d * v.n)
                words = v.load(self.kv, values + T.cast(start * a.padded_dim + at, "int64"))
                v.store(self.scratch, self.written + at, v.float(T.bitwise_and(words, v.all(mask))))


def tile_code(a: Attention, blocks: tuple[int, ...]) -> str:
    """The functions that are called above, for blocks of so many rows."""
    rows = sorted({a.tile_rows(block) for block in blocks})
    opening = [opened(a, n) for n in rows]
    closing = function("llmc_tiles_close", "", ["call void @llvm.x86.tilerelease()"])
    scores = [scores_code(a, asks) for asks in (False, True)]
    sums = [sums_code(a, "sums", 2, False), sums_code(a, "sums_ask", 2, True), sums_code(a, "sums_half", 1, False)]
    if a.spreads:
        sums = [spread_sums_code(a, n) for _, count, n in spans(a.padded_dim // 16, len(SUMS)) if count]
    return DECLARED + _PREFETCH + "".join([*opening, closing, *scores, *sums])


_PREFETCH = "declare void @llvm.prefetch.p0(ptr, i32, i32, i32)\n"


def opened(a: Attention, rows: int) -> str:
    """llmc_tiles_open_ROWS: the registers' shapes for tiles of so many query rows."""
    name, pairs = f"llmc_tiles_open_{rows}", a.tile_pairs
    of_rows = {KEYS: pairs, VALUES: ROWS}
    n_rows = [of_rows.get(register, rows) for register in range(REGISTERS)]
    widths = [4 * pairs if register == QUERY else ROW_BYTES for register in range(REGISTERS)]
    shape = f"{name}_shapes"
    return shapes(shape, n_rows, widths) + function(name, "", [f"call void @llvm.x86.ldtilecfg(ptr @{shape})"])


def scores_code(a: Attention, asks: bool) -> str:
    """llmc_scores[_ask](q, k, s[, next]): s [rows][64] = q [rows][D/2] k [4][D/2][16]."""
    row_bytes, tile_bytes, group_bytes = 2 * a.head_dim, a.tile_pairs * ROW_BYTES, a.head_dim // 2 * ROW_BYTES
    lines = [f"call void @llvm.x86.tilezero(i8 {group})" for group in SUMS]
    for d in range(a.head_dim // 2 // a.tile_pairs):
        lines += load(QUERY, "%q", str(d * 4 * a.tile_pairs), row_bytes, f"q{d}")
        for group in SUMS:
            at = group * group_bytes + d * tile_bytes
            lines += load(KEYS, "%k", str(at), ROW_BYTES, f"k{at}")
            lines += [product(group, QUERY, KEYS), *(ask_for(a, at, tile_bytes) if asks else [])]
    for group in SUMS:
        lines += store(group, "%s", str(group * ROW_BYTES), 4 * PAGE_TOKENS, f"s{group}")
    return function(f"llmc_scores{'_ask' * asks}", f"ptr %q, ptr %k, ptr %s{', ptr %next' * asks}", lines)


def sums_code(a: Attention, name: str, halves: int, asks: bool) -> str:
    """llmc_NAME(p, v, o[, next]): o [rows][D'] += p [rows][32] v [32][D'], or half of the tokens; rows of o are a
    state's."""
    row_bytes, state_bytes, columns = 4 * a.padded_dim, 4 * a.state_words, a.padded_dim // 16
    lines = []
    for first in range(0, columns, len(SUMS)):
        places = [(register, column * ROW_BYTES) for register, column in zip(SUMS, range(first, columns), strict=False)]
        lines += [line for register, at in places for line in load(register, "%o", str(at), state_bytes, f"o{at}")]
        for half in range(halves):
            lines += load(WEIGHTS, "%p", str(half * ROW_BYTES), 2 * PAGE_TOKENS, f"p{first}_{half}")
            for register, at in places:
                value = half * ROWS * row_bytes + at
                lines += [*load(VALUES, "%v", str(value), row_bytes, f"v{value}"), product(register, WEIGHTS, VALUES)]
                lines += ask_for(a, (at * halves + half * ROW_BYTES) * ROWS, TILE_BYTES) if asks else []
        lines += [line for register, at in places for line in store(register, "%o", str(at), state_bytes, f"t{at}")]
    return function(f"llmc_{name}", f"ptr %p, ptr %v, ptr %o{', ptr %next' * asks}", lines)


def spread_sums_code(a: Attention, n: int) -> str:
    """llmc_sums_N(p, v, o): 16 N columns of o [rows][D'] += p [rows][64] v [64][16 N]; rows of o are a state's."""
    row_bytes, state_bytes = n * ROW_BYTES, 4 * a.state_words
    places = [(register, register * ROW_BYTES) for register in range(n)]
    lines = [line for register, at in places for line in load(register, "%o", str(at), state_bytes, f"o{at}")]
    for half in range(2):
        lines += load(WEIGHTS, "%p", str(half * ROW_BYTES), 2 * PAGE_TOKENS, f"p{half}")
        for register, at in places:
            value = half * ROWS * row_bytes + at
            lines += [*load(VALUES, "%v", str(value), row_bytes, f"v{value}"), product(register, WEIGHTS, VALUES)]
    lines += [line for register, at in places for line in store(register, "%o", str(at), state_bytes, f"t{at}")]
    return function(f"llmc_sums_{n}", "ptr %p, ptr %v, ptr %o", lines)


def product(sums: int, left: int, right: int) -> str:
    return f"call void @llvm.x86.tdpbf16ps(i8 {sums}, i8 {left}, i8 {right})"


def ask_for(a: Attention, start: int, n_bytes: int) -> list[str]:
    """Brings what will be read next to the first level cache, where that has room for K and V of a page: loads of whole
    tiles wait for the second level longer than vectors do."""
    level = FIRST_LEVEL if a.head_dim <= NEAR_DIM else SECOND_LEVEL
    return [
        line
        for at in range(start, start + n_bytes, 64)
        for line in (
            f"%n{at} = getelementptr i8, ptr %next, i64 {at}",
            f"call void @llvm.prefetch.p0(ptr %n{at}, i32 0, i32 {level}, i32 1)",
        )
    ]
