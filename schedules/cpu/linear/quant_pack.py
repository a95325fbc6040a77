"""Quantising x to int8 and laying it out for the tiles, where a row of a block has a scale of its own:

    x [M, K]  ->  words [row tiles][K/4][rows] (four bytes each), scales and corrections [row tiles][blocks][rows]

    for (tile, a few blocks) in parallel:
        for block, row in the tile:
            largest = max |x|            as integers: NaN is above infinity is above every number
            q = x * (127 / largest), rounded to nearest even
            scale = largest / 127;  correction = -zero * sum(q)

A stored weight is its code plus `zero`, so a sum of products that begins with the correction ends with that of the
codes.  Where groups have zeros (z4) it is a float32, which it fits exactly.  For AMX words lie in tiles, [row
tiles][K/4/n][rows][n]; n, `tile_steps`, is 16, or 8 where a block has no more.

A block of zeros (below 1e-30) has scale and codes 0; one with NaN or infinity ends in NaN or infinity.
Bytes: 4 M K read, M K written: nothing beside the product.  Rows past M are left as they are, columns past K are 0.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx import Shuffle
from tvm.tirx.script import builder as T

from llmc.schedules.cpu.lanes import Lanes, share
from llmc.schedules.cpu.linear.quant_dot import largest, llvm_code, low_bytes, total
from llmc.schedules.cpu.linear.quant_layout import ZERO
from llmc.schedules.cpu.linear.quant_rule import QuantLinear, blocks_a_unit

WIDTH = 16
VECTOR = Lanes(WIDTH)
WORDS = Lanes(WIDTH // 4)
TINY = 0x0DA24260
"""1e-30 as an integer: in order with the others, and NaN above it."""


def packing_function(quant: QuantLinear, rows: int, tile_steps: int = 1) -> Any:
    """(x, words, scales, corrections, task, n_tasks)."""
    m, k = quant.linear.m, quant.linear.k
    row_tiles = -(-m // rows)
    each = blocks_a_unit(quant)
    units = -(-quant.blocks // each)
    whole = k // quant.block
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("quantise")
        place = Place(quant, rows, row_tiles, tile_steps)
        task, n_tasks = T.arg("task", T.int32()), T.arg("n_tasks", T.int32())
        with (
            T.attr(0, "pragma_import_llvm", llvm_code(quant.dot)),
            share(row_tiles * units, task, n_tasks) as unit,
        ):
            tile = T.bind(T.truncdiv(unit, units))
            first = T.bind(T.truncmod(unit, units) * each)
            last = T.bind(T.min(first + each, quant.blocks))
            n_rows = T.bind(T.min(rows, m - tile * rows))
            with T.serial(T.max(T.min(last, whole) - first, 0)) as i, T.serial(n_rows) as row:
                place.block(tile, first + i, row, full=True)
            if whole < quant.blocks:
                with T.serial(T.max(last - T.max(first, whole), 0)) as i, T.serial(n_rows) as row:
                    place.block(tile, T.max(first, whole) + i, row, full=False)
    return builder.get()


class Place:
    """The operands, and where the parts of a block go."""

    def __init__(self, quant: QuantLinear, rows: int, row_tiles: int, tile_steps: int) -> None:
        self.quant, self.rows, self.tile_steps = quant, rows, tile_steps
        n_scales = row_tiles * quant.blocks * rows
        self.x = T.arg("x", T.buffer((quant.linear.m * quant.linear.k,), "float32"))
        self.words = T.arg("words", T.buffer((row_tiles * quant.steps * rows,), "int32"))
        self.scales = T.arg("scales", T.buffer((n_scales,), "float32"))
        self.corrections = T.arg("corrections", T.buffer((n_scales,), "int32"))

    def block(self, tile: Any, block: Any, row: Any, *, full: bool) -> None:
        """One row of one block; `full`: it ends before K does."""
        quant = self.quant
        column = T.bind(block * quant.block)
        start = T.bind(self.row_of_x(tile, row) * quant.linear.k)
        vectors = [
            VECTOR.keep(self.x[VECTOR.at(start + column + i)]) if full else self.cut(start, column + i)
            for i in range(0, quant.block, WIDTH)
        ]
        sizes = [T.bitwise_and(VECTOR.bits(vector), VECTOR.all(0x7FFFFFFF)) for vector in vectors]
        most = sizes[0]
        for size in sizes[1:]:
            most = VECTOR.keep(T.max(most, size), "int32")
        bits = Lanes(1).keep(largest(most), "int32")
        most = Lanes(1).keep(T.reinterpret(bits, dtype="float32"))
        some = bits >= TINY
        inverse = Lanes(1).keep(T.Select(some, T.float32(127) / most, T.float32(0)))
        sums = VECTOR.all(0)
        first = T.bind(self.place(tile, T.truncdiv(column, 4), quant.steps) + row * self.tile_steps)
        for i, vector in enumerate(vectors):
            rounded = T.nearbyint(vector * VECTOR.all(inverse))
            codes = VECTOR.keep(T.cast(rounded, VECTOR.i32), "int32")
            sums = VECTOR.keep(sums + codes, "int32")
            step = i * WORDS.n
            in_tile = step % self.tile_steps
            self.store(WORDS.keep(low_bytes(codes), "int32"), first + (step - in_tile) * self.rows + in_tile)
        at = T.bind(self.place(tile, block, quant.blocks) + row)
        scale = T.Select(some, most / T.float32(127), T.float32(0))
        T.buffer_store(self.scales, scale, [at])
        correction = total(sums) * -ZERO[quant.weight]
        if quant.weight == "z4":  # which a zero multiplies
            correction = T.reinterpret(T.cast(correction, "float32"), dtype="int32")
        T.buffer_store(self.corrections, correction, [at])

    def row_of_x(self, tile: Any, row: Any) -> Any:
        """Which row of x is this one of the tile."""
        return tile * self.rows + row

    def place(self, tile: Any, word: Any, n_words: int) -> Any:
        """Where a word of a tile's first row lies, the rows side by side, of `n_words` words a row."""
        return (tile * n_words + word) * self.rows

    def cut(self, start: Any, column: Any) -> Any:
        """16 columns of a row, 0 where there are none."""
        vector = T.alloc_buffer((WIDTH,), "float32")
        VECTOR.store(vector, 0, VECTOR.all(0.0))
        with T.serial(T.max(T.min(self.quant.linear.k - column, WIDTH), 0)) as i:
            T.buffer_store(vector, self.x[start + column + i], [i])
        return vector[VECTOR.at(0)]

    def store(self, words: Any, at: Any) -> None:
        """Four words of a row, which lie `rows` apart unless they are of one tile."""
        if (isinstance(self.rows, int) and self.rows == 1) or self.tile_steps > 1:
            WORDS.store(self.words, at, words)
            return
        for i in range(WORDS.n):
            T.buffer_store(self.words, Shuffle([words], [i]), [at + i * self.rows])
