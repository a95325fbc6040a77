"""The kernels of heads_rule.py: those of linear layers (pack.py, panel.py), once for each head.

for (head, row tile, block of 512 columns) in parallel:    pack the head's columns of the tile's rows
for (head, group of panels) in parallel:                   the tiles of those panels, as panel.py has them
                                                           y[row][head][16 p …] = the sums
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from llmc.schedules.cpu.fp8_pairs import llvm_code
from llmc.schedules.cpu.lanes import ASK, AVX512_BF16, share
from llmc.schedules.cpu.linear import pack
from llmc.schedules.cpu.linear.heads_rule import Heads
from llmc.schedules.cpu.linear.panel import Product
from llmc.schedules.cpu.linear.panel_layout import PANEL
from llmc.schedules.cpu.linear.rule import PACKING_COLUMNS, Tiles, asks_in_turn


def packing_function(heads: Heads, rows: int) -> Any:
    """(x, packed, task, n_tasks); packed [H][row tiles][steps][words][rows]."""
    each = heads.each
    row_tiles, blocks = -(-each.m // rows), each.packing_blocks
    tile_words = each.steps * each.words * rows
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("pack")
        x = T.arg("x", T.buffer((each.m * heads.count * heads.stride,), "float32"))
        dtype = "int32" if each.dot == "dpbf16" else "float32"
        packed = T.arg("packed", T.buffer((heads.count * row_tiles * tile_words,), dtype))
        task, n_tasks = T.arg("task", T.int32()), T.arg("n_tasks", T.int32())
        llvm = AVX512_BF16 if each.dot == "dpbf16" else ""
        grid = heads.count * row_tiles * blocks
        with T.attr(0, "pragma_import_llvm", llvm), share(grid, task, n_tasks) as unit:
            place_at = T.bind(T.truncdiv(unit, blocks))
            head, tile = T.bind(T.truncdiv(place_at, row_tiles)), T.bind(T.truncmod(place_at, row_tiles))
            first = T.bind(T.truncmod(unit, blocks) * PACKING_COLUMNS)
            place = pack.Place(each, rows, packed, place_at * tile_words)
            with T.serial(T.min(rows, each.m - tile * rows)) as r:
                start = T.bind(((tile * rows + r) * heads.count + head) * heads.stride)
                place.row(first, r, x, start)
    return builder.get()


def product_function(heads: Heads, tiles: Tiles) -> Any:
    """(x, weight, y, scratch, task, n_tasks)."""
    llvm = llvm_code(False, heads.each.dot == "dpbf16") + (ASK if asks_in_turn(heads.each, tiles) else "")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("product")
        product = OfHeads(heads, tiles)
        task, n_tasks = T.arg("task", T.int32()), T.arg("n_tasks", T.int32())
        grid = heads.count * tiles.grid(heads.each)
        with T.attr(0, "pragma_import_llvm", llvm), share(grid, task, n_tasks) as unit:
            product.unit(unit)
    return builder.get()


class OfHeads(Product):
    """A linear layer's loops, with everything of one head."""

    def __init__(self, heads: Heads, tiles: Tiles) -> None:
        self.heads, self.linear, self.tiles = heads, heads.each, tiles
        linear = self.linear
        self.declare_x(heads.count * tiles.row_tiles(linear) * tiles.rows)
        word = "float32" if linear.weight == "f32" else "int32"
        self.weight = T.arg("weight", T.buffer((heads.count * linear.panels * linear.panel_words,), word))
        self.y = T.arg("y", T.buffer((linear.m * heads.count * linear.n,), "float32"))
        self.scratch = T.arg("scratch", T.buffer((tiles.scratch_words(linear),), "float32"))

    def unit(self, unit: Any) -> None:
        grid = self.tiles.grid(self.linear)
        self.head = T.bind(T.truncdiv(unit, grid))
        super().unit(T.bind(T.truncmod(unit, grid)))

    def accumulate(self, chunk: Any, chunks: int, row_tile: Any, panel: Any, place: Any) -> None:
        of_head = T.bind(self.head * self.tiles.row_tiles(self.linear) + row_tile)
        super().accumulate(chunk, chunks, of_head, T.bind(self.head * self.linear.panels + panel), place)

    def finish(self, row_tile: Any, panel: Any, place: Any) -> None:
        linear, tiles = self.linear, self.tiles
        with T.serial(T.min(tiles.rows, linear.m - row_tile * tiles.rows)) as r:
            start = T.bind(place + r * (tiles.panels * PANEL))
            row = T.bind(((row_tile * tiles.rows + r) * self.heads.count + self.head) * linear.n)
            for p in range(tiles.panels):
                column = T.bind((panel + p) * PANEL)
                self.store(row, column, T.bind(self.scratch[T.ramp(start + p * PANEL, 1, PANEL)]), start + p * PANEL)
