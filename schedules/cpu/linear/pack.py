"""Rounding x and laying it out for the tiles: row-major x [M, K] -> [row tiles][steps][words][rows].

    for (tile, block of 512 columns) in parallel:        grid ceil(M / rows) * ceil(K / 512)
        for 16 columns in the block, row in the tile:
            16 floats -> 8 pairs of bf16, or 16 floats -> 16 floats rounded to bf16, or as they are
            stored `rows` words apart

so that a step of a tile reads the `rows` words it broadcasts from one cache line.  Bytes: 4 M K read, 2 M K or 4 M K
written: nothing beside the product.  Rows past M are left as they are (they end in rows of y that are never stored);
what a step has past the last K is zero.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx import Shuffle
from tvm.tirx.script import builder as T

from llmc.schedules.cpu.lanes import AVX512_BF16, Lanes, share
from llmc.schedules.cpu.linear.rule import PACKING_COLUMNS, Linear

WIDTH = 16
VECTOR = Lanes(WIDTH)
SCALAR = Lanes(1)


def packing_function(linear: Linear, rows: int) -> Any:
    """(x, packed, task, n_tasks)."""
    row_tiles = -(-linear.m // rows)
    blocks = -(-linear.k // PACKING_COLUMNS)
    whole = linear.k // WIDTH * WIDTH
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("pack")
        x = T.arg("x", T.buffer((linear.m * linear.k,), "float32"))
        dtype = "int32" if linear.dot == "dpbf16" else "float32"
        packed = T.arg("packed", T.buffer((row_tiles * linear.steps * linear.words * rows,), dtype))
        task, n_tasks = T.arg("task", T.int32()), T.arg("n_tasks", T.int32())
        llvm = AVX512_BF16 if linear.dot == "dpbf16" else ""
        with T.attr(0, "pragma_import_llvm", llvm), share(row_tiles * blocks, task, n_tasks) as unit:
            tile = T.bind(T.truncdiv(unit, blocks))
            first = T.bind(T.truncmod(unit, blocks) * PACKING_COLUMNS)
            n_rows = T.min(rows, linear.m - tile * rows)
            place = Place(linear, rows, packed, tile * (linear.steps * linear.words * rows))
            with T.serial(T.truncdiv(T.min(PACKING_COLUMNS, whole - first), WIDTH)) as i, T.serial(n_rows) as r:
                column = first + i * WIDTH
                place.vector(column, r, x[VECTOR.at((tile * rows + r) * linear.k + column)])
            if whole < linear.k:
                with T.If(first + PACKING_COLUMNS > whole), T.Then(), T.serial(n_rows) as r:
                    place.tail(whole, r, x, (tile * rows + r) * linear.k)
    return builder.get()


class Place:
    """Where the elements of one tile's rows go.  rows: how many lie side by side; start: where the tile begins."""

    def __init__(self, linear: Linear, rows: Any, packed: Any, start: Any) -> None:
        self.linear, self.rows, self.packed, self.start = linear, rows, packed, start

    def row(self, first: Any, row: Any, x: Any, start: Any) -> None:
        """A row's columns of the block that begins with column `first`, the row of x that begins at `start`."""
        whole = self.linear.k // WIDTH * WIDTH
        with T.serial(T.truncdiv(T.max(T.min(PACKING_COLUMNS, whole - first), 0), WIDTH)) as i:
            column = first + i * WIDTH
            self.vector(column, row, x[VECTOR.at(start + column)])
        if whole < self.linear.k:
            with T.If(first + PACKING_COLUMNS > whole), T.Then():
                self.tail(whole, row, x, start)

    def vector(self, column: Any, row: Any, values: Any) -> None:
        """16 columns of a row."""
        if self.linear.dot == "dpbf16":
            words = T.bind(T.call_extern("int32x8", "llmc_cvtbf16", values))
            n_words = WIDTH // 2
        else:
            words = T.bind(VECTOR.float(VECTOR.round_bf16(values)) if self.linear.rounds_x else values)
            n_words = WIDTH
        first = self.word(column)
        if isinstance(self.rows, int) and self.rows == 1:
            T.buffer_store(self.packed, words, [Lanes(n_words).at(first)])
            return
        for i in range(n_words):
            T.buffer_store(self.packed, Shuffle([words], [i]), [first + i * self.rows + row])

    def tail(self, column: int, row: Any, x: Any, start: Any) -> None:
        """The columns of a row from `column` on, fewer than 16, and zeros up to a whole step."""
        linear = self.linear
        each = 2 if linear.rounds_x else 1
        for k in range(column, linear.steps * linear.step, each):
            values = [x[start + at] for at in range(k, min(k + each, linear.k))]
            if linear.rounds_x:
                bits = [SCALAR.round_bf16(value) for value in values]
                values = [SCALAR.float(b) for b in bits] + [T.float32(0)] * (each - len(bits))
                if linear.dot == "dpbf16":
                    low, high = (*bits, T.int32(0), T.int32(0))[:2]
                    values = [T.bitwise_or(T.bitwise_and(T.shift_right(low, 16), 0xFFFF), high)]
            for i, value in enumerate(values):
                T.buffer_store(self.packed, value, [self.word(k) + i * self.rows + row])

    def word(self, column: Any) -> Any:
        """The index of row 0 of the word that holds a column, which begins a step."""
        in_words = T.truncdiv(column, 2) if self.linear.dot == "dpbf16" else column
        return self.start + in_words * self.rows
