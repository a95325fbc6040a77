"""The first kernel of paged attention: turn q and k by their positions, keep k and v in the pages, hand q on.

    for (row, kv head) in parallel:                          grid M * KH
        k' = rotate(k);  write k' and v into slot (page_table[row, pos / 64], pos % 64)     unless pos = -1
        for g in G:  q temp[kv head][row][g] = rotate(q), as float32, as pairs of bf16 or as pairs of int16

Where the call has a norm, rotate is of x / sqrt(mean(x²) + e) · weight, each head's x by itself.

An int8 cache keeps each key and each value as multiples of 1/127 of its largest element, and that step in float32;
queries meet it as multiples of 1/32767 of theirs.

Reads (H + 2 KH) D float32 and writes H D + 2 KH D numbers a row: a fraction of a matrix product's bytes.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from llmc.compiler.kernel import PAGE_TOKENS
from llmc.schedules.cpu.attention.shape import Attention
from llmc.schedules.cpu.lanes import Lanes, share, widest
from llmc.schedules.cpu.row_kernels import row_mean

ONE = Lanes(1)
MOST_INT8 = 127.0
LEAST = 1e-30
"""A largest element below this counts as zero: its reciprocal would overflow."""


def append_kernel(a: Attention) -> Any:
    """(qkv, [query_norm, key_norm,] [cos, sin,] positions, page_table, kv, [kv as scales,] q, scratch [D], task,
    n_tasks)."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("append")
        qkv = T.arg("qkv", T.buffer((a.m * a.columns,), "float32"))
        half = a.rotary_dim // 2
        norms = [None, None]
        if a.epsilon is not None:
            norms = [T.arg(name, T.buffer((a.head_dim,), "float32")) for name in ("query_norm", "key_norm")]
        turn = [T.arg(name, T.buffer((a.m * half,), "float32")) for name in ("cos", "sin") if half]
        positions, page_table, kv, scales, q, turned, task, n_tasks = step_operands(a, "kv", "q")
        with share(a.m * a.kv_heads, task, n_tasks) as unit:
            row, head = T.bind(T.truncdiv(unit, a.kv_heads)), T.bind(T.truncmod(unit, a.kv_heads))
            first = T.bind(row * a.columns)
            position = T.bind(positions[row])
            with T.If(position >= 0), T.Then():
                base = page_start(a, page_table, row, T.truncdiv(position, PAGE_TOKENS), head)
                slot = T.bind(T.truncmod(position, PAGE_TOKENS))
                key = Head(a, qkv, first + (a.heads + head) * a.head_dim, norms[1])
                rotate(a, key, turn, row, turned)
                keep_key(a, turned, kv, scales, base, slot)
                value = first + (a.heads + a.kv_heads) * a.head_dim + head * a.value_dim
                if a.norms_values:
                    normalise(a, qkv, value, turned)
                    keep_value(a, turned, 0, kv, scales, base, slot)
                else:
                    keep_value(a, qkv, value, kv, scales, base, slot)
            with T.serial(a.group) as g:
                rotate(a, Head(a, qkv, first + (head * a.group + g) * a.head_dim, norms[0]), turn, row, turned)
                hand_on(a, turned, q, ((head * a.m + row) * a.group + g) * a.query_words)
    return builder.get()


def turn_kernel(a: Attention) -> Any:
    """(queries, [query_norm,] [cos, sin,] q, scratch [D], task, n_tasks): of append_kernel what queries want."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("turn")
        queries = T.arg("queries", T.buffer((a.m * a.heads * a.head_dim,), "float32"))
        half = a.rotary_dim // 2
        norm = None if a.epsilon is None else T.arg("query_norm", T.buffer((a.head_dim,), "float32"))
        turn = [T.arg(name, T.buffer((a.m * half,), "float32")) for name in ("cos", "sin") if half]
        q = T.arg("q", T.buffer((a.m * a.heads * a.query_words,), a.query_type))
        turned = T.arg("scratch", T.buffer((a.head_dim,), "float32"))
        with share(a.m * a.kv_heads, T.arg("task", T.int32()), T.arg("n_tasks", T.int32())) as unit:
            row, head = T.bind(T.truncdiv(unit, a.kv_heads)), T.bind(T.truncmod(unit, a.kv_heads))
            with T.serial(a.group) as g:
                rotate(a, Head(a, queries, (unit * a.group + g) * a.head_dim, norm), turn, row, turned)
                hand_on(a, turned, q, ((head * a.m + row) * a.group + g) * a.query_words)
    return builder.get()


def step_operands(a: Attention, cache: str, queries: str) -> tuple[Any, ...]:
    """(positions, page_table, cache, [cache as scales,] queries, scratch [D], task, n_tasks) of a kernel that
    appends; None for scales that there are not.  cache, queries: what it calls those two."""
    positions = T.arg("positions", T.buffer((a.m,), "int32"))
    page_table = T.arg("page_table", T.buffer((a.m * a.pages,), "int32"))
    number = {4: "float32", 2: "uint16", 1: "int8"}[a.kv_bytes]
    kv = T.arg(cache, T.buffer((T.int64(1 << 42),), number))
    scales = T.arg("scales", T.buffer((T.int64(1 << 40),), "float32")) if a.is_int8 else None
    q = T.arg(queries, T.buffer((a.m * a.heads * a.query_words,), a.query_type))
    turned = T.arg("scratch", T.buffer((a.longest,), "float32"))
    return positions, page_table, kv, scales, q, turned, T.arg("task", T.int32()), T.arg("n_tasks", T.int32())


def page_start(a: Attention, page_table: Any, row: Any, index: Any, kv_head: Any) -> Any:
    """The first word of a head's part of the `index`-th page of a row, counted in 64 bits: pools exceed 4 GB."""
    number = T.cast(page_table[row * a.pages + index], "int64")
    return ONE.keep(number * T.int64(a.page_words) + T.cast(kv_head * a.head_words, "int64"), "int64")


def scale_start(a: Attention, base: Any) -> Any:
    """The first scale of a head's part of a page that starts at word `base`, counted in float32."""
    return T.truncdiv(base + T.int64(a.scales_at), T.int64(4 // a.word_bytes))


class Head:
    """A query's or a key's vector [D] at `start`, normalised where there is a weight."""

    def __init__(self, a: Attention, source: Any, start: Any, weight: Any) -> None:
        self.source, self.start, self.weight = source, start, weight
        if weight is not None:
            v = widest(a.head_dim, a.lanes)
            self.factor = T.alloc_buffer((v.n,), "float32")
            v.store(self.factor, 0, inverse_root(a, v, source, start, a.head_dim))

    def load(self, v: Lanes, d: Any) -> Any:
        """Elements d, d + 1 …"""
        x = v.load(self.source, self.start + d)
        return x if self.weight is None else v.keep(x * v.all(self.factor[0]) * v.load(self.weight, d))


def inverse_root(a: Attention, v: Lanes, source: Any, start: Any, n: int) -> Any:
    """1 / sqrt(mean(x²) + e) of n elements."""
    square = row_mean(v, source, start, n, lambda value, partial: v.fma(value, value, partial))
    return v.all(1.0) / T.sqrt(square + v.all(float(a.epsilon or 0)))


def normalise(a: Attention, source: Any, start: Any, y: Any) -> None:
    """y = a value, by RMSNorm without a weight."""
    v = widest(a.value_dim, a.lanes)
    factor = v.keep(inverse_root(a, v, source, start, a.value_dim))
    with T.serial(a.value_dim // v.n) as i:
        v.store(y, i * v.n, v.load(source, start + i * v.n) * factor)


def rotate(a: Attention, head: Head, turn: list[Any], row: Any, turned: Any) -> None:
    """turned = (x1 cos - x2 sin, x2 cos + x1 sin, the rest as it is).  Su et al. 2021, arXiv:2104.09864."""
    if a.rotary_dim:
        turn_pairs(a, head, turn, row, turned, 0)
    rest = a.head_dim - a.rotary_dim
    if rest:
        v = widest(rest, a.lanes)
        with T.serial(rest // v.n) as i:
            v.store(turned, a.rotary_dim + i * v.n, head.load(v, a.rotary_dim + i * v.n))


def turn_pairs(a: Attention, head: Head, turn: list[Any], row: Any, turned: Any, to: int) -> None:
    """The part that is turned, to turned[to:]."""
    half = a.rotary_dim // 2
    step, away = (2, 1) if a.interleaved else (1, half)
    v = ONE if a.interleaved else widest(half, a.lanes)
    with T.serial(half // v.n) as i:
        x1, x2 = head.load(v, i * v.n * step), head.load(v, i * v.n * step + away)
        cos, sin = (v.load(table, row * half + i * v.n) for table in turn)
        v.store(turned, to + i * v.n * step, v.fma(x1, cos, v.all(0.0) - x2 * sin))
        v.store(turned, to + i * v.n * step + away, v.fma(x2, cos, x1 * sin))


def stored(a: Attention, value: Any, per_unit: Any) -> Any:
    """One number as the cache keeps it."""
    if a.dot == "fma":
        return value
    if a.is_int8:
        return T.cast(T.nearbyint(value * per_unit), "int8")
    return T.cast(T.bitwise_and(T.shift_right(ONE.round_bf16(value), 16), 0xFFFF), "uint16")


def steps_of(a: Attention, source: Any, start: Any, n: int, most: float) -> tuple[Any, Any]:
    """(steps in a unit, size of a step) such that the largest of a head's n elements is `most` steps."""
    v = widest(n, a.lanes)
    peak = T.alloc_buffer((v.n,), "float32")
    v.store(peak, 0, v.all(0.0))
    with T.serial(n // v.n) as i:
        x = v.load(source, start + i * v.n)
        v.store(peak, 0, T.max(peak[v.at(0)], T.max(x, v.all(0.0) - x)))
    v.store(peak, 0, v.maximum(peak[v.at(0)]))
    largest = T.bind(peak[0])
    per_unit = T.alloc_buffer((1,), "float32")
    T.buffer_store(per_unit, T.Select(largest > T.float32(LEAST), T.float32(most) / largest, T.float32(0.0)), [0])
    return per_unit[0], T.bind(largest * T.float32(1.0 / most))


def keep_key(a: Attention, key: Any, kv: Any, scales: Any, base: Any, slot: Any) -> None:
    """K word (t/16, d/E, t%16), element d % E."""
    per_unit = None
    if a.is_int8:
        per_unit, step = steps_of(a, key, 0, a.head_dim, MOST_INT8)
        T.buffer_store(scales, step, [scale_start(a, base) + T.cast(slot, "int64")])
    column = T.bind(T.truncdiv(slot, 16) * (16 * a.head_dim) + T.truncmod(slot, 16) * a.per_word)
    with T.serial(a.head_dim // a.per_word) as word, T.serial(a.per_word) as element:
        to = base * a.per_word + T.cast(column + word * (16 * a.per_word) + element, "int64")
        T.buffer_store(kv, stored(a, key[word * a.per_word + element], per_unit), [to])


def keep_value(a: Attention, source: Any, start: Any, kv: Any, scales: Any, base: Any, slot: Any) -> None:
    """V word (t/E, d), element t % E."""
    per_unit = None
    if a.is_int8:
        per_unit, step = steps_of(a, source, start, a.value_dim, MOST_INT8)
        T.buffer_store(scales, step, [scale_start(a, base) + T.cast(slot + PAGE_TOKENS, "int64")])
    row = T.truncdiv(slot, a.per_word) * (a.padded_dim * a.per_word) + T.truncmod(slot, a.per_word)
    to = T.bind((base + T.int64(a.key_words)) * a.per_word + T.cast(row, "int64"))
    with T.serial(a.value_dim) as d:
        T.buffer_store(kv, stored(a, source[start + d], per_unit), [to + T.cast(d * a.per_word, "int64")])


def hand_on(a: Attention, turned: Any, q: Any, start: Any) -> None:
    """A query head, rounded as the cache's keys are, or to int16."""
    if a.query_type == "int32":
        hand_on_pairs(a, turned, q, start)
        return
    v = widest(a.head_dim, a.lanes)
    with T.serial(a.head_dim // v.n) as i:
        value = v.load(turned, i * v.n)
        v.store(q, start + i * v.n, value if a.dot == "fma" else v.float(v.round_bf16(value)))


def hand_on_pairs(a: Attention, turned: Any, q: Any, start: Any) -> None:
    """A query head as pairs: the even element in the low half of a word."""
    if a.is_int8:
        per_unit, step = steps_of(a, turned, 0, a.head_dim, a.most_query)
        T.buffer_store(q, ONE.bits(step), [start + a.head_dim // 2])

    def high(value: Any) -> Any:
        if a.is_int8:
            return T.shift_left(T.cast(T.nearbyint(value * per_unit), "int32"), 16)
        return ONE.round_bf16(value)

    with T.serial(a.head_dim // 2) as i:
        low = T.bitwise_and(T.shift_right(high(turned[2 * i]), 16), 0xFFFF)
        T.buffer_store(q, T.bitwise_or(low, high(turned[2 * i + 1])), [start + i])
