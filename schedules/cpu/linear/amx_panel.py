"""The product of a linear layer on AMX, block by block.

    for unit in parallel:                                     grid = panels of W / (panels a block * group)
        for chunk of k:                                       one when x and W's panels fit the cache
            for block of rows of x, for block of panels in the group:
                sums [rows][panels][16] = 0, or from scratch  in tile registers
                for 32 k in the chunk:
                    sums += x[block][32 k] * W[panels][32 k]  rows / 16 * panels tdpbf16ps
                sums to scratch; after the last chunk finished as panel.py does

Where K is no multiple of 32 the last steps of a panel are copied to scratch memory, with zeros behind them.  fp8 is
widened to bf16 there: before the first block of rows a chunk of the group's panels, or for a single block a few tiles.

Bytes: W once from memory, while all blocks of rows pass; x once for every unit.  Operations: 2 M N K.  The limit is
memory for M up to several hundred.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from llmc.schedules.cpu.amx import ROW_BYTES, ROWS, TILE_BYTES, call
from llmc.schedules.cpu.fp8_pairs import llvm_code, pairs
from llmc.schedules.cpu.lanes import share
from llmc.schedules.cpu.linear.amx_rule import (
    TILE_WORDS,
    WIDENED,
    scratch_words,
    tile_block,
    tile_steps,
    tiles_of_k,
    wide_tiles,
)
from llmc.schedules.cpu.linear.panel import FIRST_LEVEL, SECOND_LEVEL, VECTOR, Product, if_last, prefetch
from llmc.schedules.cpu.linear.panel_layout import PANEL
from llmc.schedules.cpu.linear.rule import Linear, Tiles


def product_function(linear: Linear, tiles: Tiles) -> Any:
    """(x, weight[, bias][, residual], y, scratch, task, n_tasks); x as amx_pack.py lays it out."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("product")
        product = (WidenedProduct if linear.weight == "f8" else AmxProduct)(linear, tiles)
        task, n_tasks = T.arg("task", T.int32()), T.arg("n_tasks", T.int32())
        llvm = product.block.llvm_code() + llvm_code(linear.weight == "f8", dpbf16=False)
        with T.attr(0, "pragma_import_llvm", llvm):
            call("tiles_open")
            with share(tiles.grid(linear), task, n_tasks) as unit:
                product.unit(unit)
            call("tiles_close")
    return builder.get()


class AmxProduct(Product):
    """The loop nest of panel.py, with a chunk of k summed up in tile registers."""

    def __init__(self, linear: Linear, tiles: Tiles) -> None:
        self.linear, self.tiles, self.block = linear, tiles, tile_block(tiles)
        x_words = tiles.row_tiles(linear) * tiles.rows * tiles_of_k(linear) * TILE_WORDS
        self.x = T.arg("x", T.buffer((x_words,), "int32"))
        self.declare((linear.panels * linear.panel_words, "int32"), scratch_words(linear, tiles))

    def accumulate(self, chunk: Any, chunks: int, row_tile: Any, panel: Any, place: Any) -> None:
        tiles = self.tiles
        at, stride = T.address_of(self.scratch[place]), tiles.panels * ROW_BYTES
        if chunks == 1:
            call("sums_zero")
        else:
            with T.If(chunk == 0):
                with T.Then():
                    call("sums_zero")
                with T.Else():
                    call("sums_load", at, stride)
        self.sum_up(chunk, chunks, row_tile, panel)
        call("sums_store", at, stride)

    def sum_up(self, chunk: Any, chunks: int, row_tile: Any, panel: Any) -> None:
        """Adds the products of a chunk of k to the sums in registers."""
        a_chunk, whole = self.tiles.steps // ROWS, self.linear.steps // ROWS
        first = chunk * a_chunk
        with T.serial(first, T.min(first + a_chunk, whole)) as k_tile:
            self.prefetch(chunk, chunks, row_tile, panel, k_tile)
            self.add(row_tile, panel, k_tile)
        if self.linear.steps % ROWS:
            with if_last(chunk, chunks):
                self.add_rest(row_tile, panel, whole)

    def prefetch(self, chunk: Any, chunks: int, row_tile: Any, panel: Any, k_tile: Any) -> None:
        """Asks for what of the weight comes next: of a block alone, some steps ahead; of several, each its share of the
        next chunk, or of the next unit's first."""
        linear, tiles = self.linear, self.tiles
        row_tiles, lines = tiles.row_tiles(linear), tile_steps(linear)
        if row_tiles == 1:
            asked = [(tiles.near, FIRST_LEVEL), (tiles.far, SECOND_LEVEL)]
            wanted = [(ahead * PANEL, level, range(lines)) for ahead, level in asked if ahead]
        else:
            each = -(-lines // row_tiles)
            to_next = tiles.steps * PANEL
            to_unit = tiles.group * tiles.panels * linear.panel_words - (chunks - 1) * to_next
            ahead = T.Select(chunk == chunks - 1, T.int32(to_unit), T.int32(to_next)) if chunks > 1 else to_unit
            wanted = [(ahead + row_tile * each * PANEL, SECOND_LEVEL, range(each))] if tiles.far else []
        for ahead, level, asked_lines in wanted:
            for p in range(tiles.panels):
                first = T.bind((panel + p) * linear.panel_words + k_tile * lines * PANEL + ahead)
                for line in asked_lines:
                    prefetch(self.weight, first + line * PANEL, level)

    def add(self, row_tile: Any, panel: Any, k_tile: Any) -> None:
        """Adds the products of 32 k."""
        weight = self.weight[panel * self.linear.panel_words + k_tile * TILE_WORDS * PANEL]
        call("sums_add", self.x_tiles(row_tile, k_tile), T.address_of(weight), self.linear.panel_words * 4)

    def add_rest(self, row_tile: Any, panel: Any, k_tile: int) -> None:
        """Adds the products of the last k, of each panel from a copy that zeros fill up."""
        linear, tiles = self.linear, self.tiles
        rest = tiles.scratch_words(linear)
        n_steps = linear.steps % ROWS
        for p in range(tiles.panels):
            first = (panel + p) * linear.panel_words + k_tile * TILE_WORDS * PANEL
            for step in range(ROWS):
                words = self.weight[VECTOR.at(first + step * PANEL)] if step < n_steps else VECTOR.all(0)
                VECTOR.store(self.scratch, rest + step * PANEL, VECTOR.float(words))
            call(f"sums_add_{p}", self.x_tiles(row_tile, k_tile), T.address_of(self.scratch[rest]))

    def x_tiles(self, row_tile: Any, k_tile: Any) -> Any:
        """Where the tiles of x for a block's rows and 32 k begin."""
        at = (row_tile * tiles_of_k(self.linear) + k_tile) * self.tiles.rows * TILE_WORDS
        return T.address_of(self.x[at])


class WidenedProduct(AmxProduct):
    """fp8: tiles of the weight are made in scratch memory, behind the sums: [panels][k_tiles][16][16] pairs of bf16."""

    def sum_up(self, chunk: Any, chunks: int, row_tile: Any, panel: Any) -> None:
        tiles, n_tiles = self.tiles, tiles_of_k(self.linear)
        n_panels, a_chunk = wide_tiles(self.linear, tiles)
        if tiles.row_tiles(self.linear) == 1:
            with T.serial(-(-n_tiles // WIDENED)) as some:
                first = T.bind(some * WIDENED)
                last = T.bind(T.min(first + WIDENED, n_tiles))
                self.widen(panel, first, last, 0)
                with T.serial(first, last) as k_tile:
                    self.prefetch(chunk, chunks, row_tile, panel, k_tile)
                    self.add_widened(row_tile, k_tile, first, 0)
            return
        first = T.bind(chunk * a_chunk)
        last = T.bind(T.min(first + a_chunk, n_tiles))
        place = T.bind(T.truncmod(panel, n_panels))
        with T.If(row_tile == 0), T.Then():
            self.widen(panel, first, last, place)
        with T.serial(first, last) as k_tile:
            self.prefetch(chunk, chunks, row_tile, panel, k_tile)
            self.add_widened(row_tile, k_tile, first, place)

    def widen(self, panel: Any, first: Any, last: Any, place: Any) -> None:
        """Tiles first … last - 1 of the panels of a block, from the weight to scratch memory."""
        linear, a_tile = self.linear, tile_steps(self.linear)
        with T.serial(self.tiles.panels) as p, T.serial(first, last) as k_tile:
            to = T.bind(self.wide(place + p, k_tile - first))
            words = T.bind((panel + p) * linear.panel_words + k_tile * a_tile * PANEL)
            n_steps = T.min(a_tile, linear.steps - k_tile * a_tile) if linear.steps % a_tile else a_tile
            with T.serial(n_steps) as step:
                codes = VECTOR.keep(self.weight[VECTOR.at(words + step * PANEL)], "int32")
                VECTOR.store(self.scratch, to + step * 2 * PANEL, VECTOR.float(pairs(codes, "first")))
                VECTOR.store(self.scratch, to + (step * 2 + 1) * PANEL, VECTOR.float(pairs(codes, "second")))
            if linear.steps % a_tile:
                with T.serial(n_steps * 2, ROWS) as row:
                    VECTOR.store(self.scratch, to + row * PANEL, VECTOR.all(0.0))

    def add_widened(self, row_tile: Any, k_tile: Any, first: Any, place: Any) -> None:
        a_chunk = wide_tiles(self.linear, self.tiles)[1]
        tile = T.address_of(self.scratch[self.wide(place, k_tile - first)])
        call("sums_add", self.x_tiles(row_tile, k_tile), tile, a_chunk * TILE_BYTES)

    def wide(self, place: Any, k_tile: Any) -> Any:
        """Where a widened tile begins in scratch memory."""
        words = self.tiles.scratch_words(self.linear)
        return words + (place * wide_tiles(self.linear, self.tiles)[1] + k_tile) * (TILE_BYTES // 4)
