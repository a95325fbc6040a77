"""The two kernels of llmc.LowRank…: see low_rank.py.

An output of A is SUMS sums over a chunk of k, element i in sum i % SUMS, added up in order, and then over the chunks in
order; one of B is SUMS sums over the rank.  So it is for one row and for four, which only take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from llmc.schedules.cpu.activations import ACTIVATIONS
from llmc.schedules.cpu.lanes import Lanes, share, widest
from llmc.schedules.cpu.low_rank import CHUNK, GROUP, LowRank

SUMS = 2


def down_kernel(low: LowRank) -> Any:
    """(x, adapters, a, thin, task, n_tasks): thin [chunks][m][ranks]."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("low_rank_down")
        v = Lanes(low.rank_block)
        x, adapters = flat("x", low.m * low.k), flat("adapters", low.m, "int32")
        a = matrix("a", low, low.ranks * low.k)
        thin = flat("thin", low.chunks * low.m * low.ranks)
        task, n_tasks = T.arg("task", T.int32()), T.arg("n_tasks", T.int32())
        blocks = low.ranks // v.n
        with share(low.row_blocks * blocks * low.chunks, task, n_tasks) as unit:
            chunk, block = (
                T.bind(T.truncmod(unit, low.chunks)),
                T.bind(T.truncmod(T.truncdiv(unit, low.chunks), blocks)),
            )
            first = T.bind(T.truncdiv(unit, low.chunks * blocks) * low.rows)
            start = T.bind(chunk * CHUNK)
            size = T.bind(T.min(T.int32(CHUNK), low.k - start))

            def take(rows: Sequence[Any], adapter: Any) -> None:
                base = place(adapter, low.ranks * low.k) + T.cast((block * low.k + start) * v.n, "int64")
                factors = [(x, T.bind(row * low.k + start)) for row in rows]
                found = products(v, (a, base), factors, size, is_even=low.k % SUMS == 0)
                for row, value in zip(rows, found, strict=True):
                    v.store(thin, (chunk * low.m + row) * low.ranks + block * v.n, value)

            by_adapter(low, adapters, first, take)
    return builder.get()


def up_kernel(low: LowRank) -> Any:
    """(thin, adapters, b, y[, result], sums, task, n_tasks); y in place where there is no gate."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("low_rank_up")
        thin, adapters = flat("thin", low.chunks * low.m * low.ranks), flat("adapters", low.m, "int32")
        b, y = matrix("b", low, low.n * low.rank), flat("y", low.m * low.n)
        result = flat("result", low.m * low.results) if low.activation else y
        sums = flat("sums", low.rows * low.ranks)
        task, n_tasks = T.arg("task", T.int32()), T.arg("n_tasks", T.int32())
        up = Up(low, thin, b, y, result, sums)
        with share(low.row_blocks * low.column_groups, task, n_tasks) as unit:
            first = T.bind(T.truncdiv(unit, low.column_groups) * low.rows)
            up.group = T.bind(T.truncmod(unit, low.column_groups) * GROUP)
            by_adapter(low, adapters, first, up.add, up.leave if low.activation else None)
    return builder.get()


class Up:
    """A group of columns of some rows."""

    def __init__(self, low: LowRank, thin: Any, b: Any, y: Any, result: Any, sums: Any) -> None:
        self.low, self.thin, self.b, self.y, self.result, self.sums = low, thin, b, y, result, sums
        self.v = Lanes(low.column_block)
        self.group: Any = None

    def blocks(self) -> Any:
        """A loop over the group's blocks of columns."""
        n_blocks = self.low.results // self.v.n
        return T.serial(self.group, T.min(self.group + GROUP, T.int32(n_blocks)))

    def add(self, rows: Sequence[Any], adapter: Any) -> None:
        """To rows that have the same adapter."""
        low, v = self.low, self.v
        base = T.bind(place(adapter, low.n * low.rank))
        self.add_chunks(rows)
        with self.blocks() as block:
            halves = [self.added(rows, base, block)]
            if low.activation:
                halves.append(self.added(rows, base, block + low.results // v.n))
            for i, row in enumerate(rows):
                self.finish(row, block, [half[i] for half in halves])

    def leave(self, row: Any) -> None:
        """A row without an adapter."""
        with self.blocks() as block:
            self.finish(row, block, [None, None])

    def add_chunks(self, rows: Sequence[Any]) -> None:
        """What A made of all of k, to scratch: [rows][ranks]."""
        low, v = self.low, widest(self.low.ranks, 16)
        with T.serial(low.ranks // v.n) as i:
            for r, row in enumerate(rows):
                total = v.load(self.thin, row * low.ranks + i * v.n)
                for chunk in range(1, low.chunks):
                    total = v.keep(total + v.load(self.thin, (chunk * low.m + row) * low.ranks + i * v.n))
                v.store(self.sums, r * low.ranks + i * v.n, total)

    def added(self, rows: Sequence[Any], base: Any, block: Any) -> list[Any]:
        """B times that, of a block of columns."""
        low, v = self.low, self.v
        ends = [sum(low.sizes[: part + 1]) for part in range(len(low.sizes) - 1)]
        part: Any = T.int32(0)
        for end in ends:
            part = part + T.cast(block * v.n >= end, "int32")
        first = T.bind(part * low.rank)
        start = T.bind(base + T.cast(block * (low.rank * v.n), "int64"))
        factors = [(self.sums, T.bind(first + r * low.ranks)) for r in range(len(rows))]
        return products(v, (self.b, start), factors, low.rank, is_even=low.rank % SUMS == 0)

    def finish(self, row: Any, block: Any, added: Sequence[Any]) -> None:
        """A block of a row's columns: the product's sums, and what is added to each half of them."""
        low, v = self.low, self.v

        def total(column: Any, more: Any) -> Any:
            value = v.load(self.y, row * low.n + column)
            return v.keep(value if more is None else value + more)

        if not low.activation:
            v.store(self.y, row * low.n + block * v.n, total(block * v.n, added[0]))
            return
        gate, up = (total(half * low.results + block * v.n, added[half]) for half in range(2))
        value = ACTIVATIONS[low.activation](v, gate) * up
        v.store(self.result, row * low.results + block * v.n, value)


def by_adapter(
    low: LowRank, adapters: Any, first: Any, take: Callable[[Sequence[Any], Any], None], leave: Any = None
) -> None:
    """Take the block of rows from `first` on: together where they have the same adapter, or else one by one.
    take(rows, adapter); leave(row): of one that has none."""

    def one(row: Any) -> None:
        adapter = T.bind(adapters[row])
        with T.If(adapter >= 0):
            with T.Then():
                take([row], adapter)
            if leave is not None:
                with T.Else():
                    leave(row)

    if low.rows == 1:
        one(first)
        return
    own = T.bind(adapters[first])
    is_same = T.And(own >= 0, first + low.rows <= low.m)
    for r in range(1, low.rows):
        is_same = T.And(is_same, adapters[T.min(first + r, low.m - 1)] == own)
    with T.If(is_same):
        with T.Then():
            take([first + r for r in range(low.rows)], own)
        with T.Else(), T.serial(first, T.min(first + low.rows, T.int32(low.m))) as row:
            one(row)


def products(
    v: Lanes, matrix: tuple[Any, Any], factors: Sequence[tuple[Any, Any]], size: Any, *, is_even: bool
) -> list[Any]:
    """For each factor its products with vectors of a matrix, `size` of them, added up.  matrix, factors: a buffer, and
    where in it they begin.  is_even: whether there are as many for each of SUMS sums."""
    n_sums = SUMS if is_even else 1
    weights, start = matrix
    sums = [[T.alloc_buffer((v.n,), "float32") for _ in range(n_sums)] for _ in factors]
    for each in sums:
        for partial in each:
            v.store(partial, 0, v.all(0.0))
    with T.serial(T.truncdiv(size, n_sums) if n_sums > 1 else size) as i:
        for j in range(n_sums):
            k = i * n_sums + j
            weight = widened(v, weights, start + T.cast(k * v.n, "int64"))
            for each, (factor, first) in zip(sums, factors, strict=True):
                v.store(each[j], 0, v.fma(weight, v.all(factor[first + k]), each[j][v.at(0)]))
    totals = []
    for each in sums:
        total = each[0][v.at(0)]
        for partial in each[1:]:
            total = v.keep(total + partial[v.at(0)])
        totals.append(total)
    return totals


def place(adapter: Any, size: int) -> Any:
    """Where the matrix of an adapter begins."""
    return T.cast(adapter, "int64") * T.int64(size)


def widened(v: Lanes, matrix: Any, at: Any) -> Any:
    """A vector of a matrix in float32."""
    value = v.load(matrix, at)
    return value if str(matrix.dtype) == "float32" else v.keep(v.low_bf16(T.cast(value, v.i32)))


def flat(name: str, size: int, dtype: str = "float32") -> Any:
    return T.arg(name, T.buffer((size,), dtype))


def matrix(name: str, low: LowRank, size: int) -> Any:
    """Of all adapters."""
    return T.arg(name, T.buffer((T.int64(low.adapters * size),), "float32" if low.dtype == "f32" else "uint16"))
