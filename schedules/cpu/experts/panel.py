"""A product of a mixture of experts: the tiles of linear layers, over pairs sorted by expert.

    for unit in parallel:                                units: (4 panels of an expert's weight) * experts with pairs
        for chunk of k, for tile of the expert:          one chunk unless the panels are too large for the cache
            the kind of tile that has room for its pairs, as in linear/panel.py and linear/quant_panel.py
            after the last chunk, pair by pair:          y[pair][16 p …] = the sums + bias, act(gate) · up where gated

Experts follow one another within a block of panels, so that each task has a share of every expert's work: however
tokens are spread over experts, tasks are about as long.

Bytes: the weights of experts that have pairs, once.  Operations: 2 M k N K; a tile's missing rows are multiplied too.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from llmc.schedules.cpu import fp8_pairs
from llmc.schedules.cpu.experts.pack import ONE, units
from llmc.schedules.cpu.experts.rule import Stage
from llmc.schedules.cpu.linear import quant_dot
from llmc.schedules.cpu.linear.panel import VECTOR, Product, if_last, loop
from llmc.schedules.cpu.linear.panel_layout import PANEL, PANELS_MULTIPLE
from llmc.schedules.cpu.linear.quant_panel import Int4Product, Int4ZerosProduct, Int8Product, Mxfp4Product, QuantProduct
from llmc.schedules.cpu.linear.quant_rule import QuantLinear
from llmc.schedules.cpu.linear.rule import Linear, Tiles


def product_function(stage: Stage) -> Any:
    """(x…, table, weight, [bias,] y, scratch, task, n_tasks); x as pack.py lays it out."""
    layer = stage.layer
    if isinstance(layer, Linear):
        kind: type[Routed] = RoutedProduct
        llvm = fp8_pairs.llvm_code(layer.weight == "f8", layer.dot == "dpbf16")
    else:
        kind = ROUTED[layer.weight]
        llvm = quant_dot.llvm_code(layer.dot) + (quant_dot.e2m1_code(layer.dot) if layer.weight == "m4" else "")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("product")
        product = kind(stage)
        task, n_tasks = T.arg("task", T.int32()), T.arg("n_tasks", T.int32())
        with T.attr(0, "pragma_import_llvm", llvm):
            active = ONE.keep(product.table[0], "int32")
            with units(product.table, 0, stage.blocks, task, n_tasks) as unit:
                product.unit_of(T.bind(T.truncdiv(unit, active)), T.bind(T.truncmod(unit, active)))
    return builder.get()


class Routed(Product):
    """The loops around a tile.  What multiplies it is for the subclasses to say."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.linear = stage, stage.linear
        self.declare_x(stage.table.tiles * stage.table.rows)
        self.table = T.arg("table", T.buffer((stage.table.words,), "int32"))
        weight_words = stage.table.experts * stage.layer.weight_bytes // 4
        word = "float32" if isinstance(stage.layer, Linear) and stage.layer.weight == "f32" else "int32"
        self.declare((weight_words, word), stage.scratch_words)

    @property
    def bias_panels(self) -> int:
        return self.stage.table.experts * self.linear.panels

    def activated(self, sums: list[Any]) -> Any:
        clamp = self.stage.clamp
        if clamp is None:
            return super().activated(sums)
        v, most = VECTOR, VECTOR.all(clamp.limit)
        gate = v.keep(T.min(sums[0], most))
        up = v.keep(T.max(T.min(sums[1], most), v.all(-clamp.limit)))
        swish = gate / (v.all(1.0) + v.exp(v.all(-clamp.alpha) * gate))
        return T.bind(swish * (up + v.all(clamp.offset)))

    def of(self, tiles: Tiles) -> Any:
        """The same operands, for one kind of tiles."""
        other = copy.copy(self)
        other.tiles = tiles
        return other

    def unit_of(self, block: Any, number: Any) -> None:
        """Four panels of the weight of the expert that is the `number`-th of those with pairs."""
        stage, table = self.stage, self.stage.table
        expert, first, last = (
            ONE.keep(self.table[at + number], "int32") for at in (table.experts_at, table.first_at, table.first_at + 1)
        )
        self.panel = T.bind(block * PANELS_MULTIPLE)
        self.weight_panel = T.bind(expert * stage.linear.panels + self.panel)
        chunks = -(-stage.layer.steps // stage.steps)
        with loop(chunks) as chunk, T.serial(first, last) as tile:
            count = ONE.keep(self.table[table.counts_at + tile], "int32")
            waiting = (tile - first) * (table.rows * PANELS_MULTIPLE * PANEL) if chunks > 1 else 0
            self.choose(list(stage.tiles), count, chunk, tile, waiting)

    def choose(self, kinds: list[Tiles], count: Any, chunk: Any, tile: Any, waiting: Any) -> None:
        """The first kind of tiles that has room for so many pairs."""
        kind, *rest = kinds
        if not rest:
            self.of(kind).some_panels(count, chunk, tile, waiting)
            return
        with T.If(count <= kind.rows):
            with T.Then():
                self.of(kind).some_panels(count, chunk, tile, waiting)
            with T.Else():
                self.choose(rest, count, chunk, tile, waiting)

    def some_panels(self, count: Any, chunk: Any, tile: Any, waiting: Any) -> None:
        with loop(PANELS_MULTIPLE // self.tiles.panels) as member:
            panel = T.bind(member * self.tiles.panels)
            place = T.bind(waiting + member * (self.tiles.rows * self.tiles.panels * PANEL))
            self.tile(count, chunk, tile, panel, place)

    def tile(self, count: Any, chunk: Any, tile: Any, panel: Any, place: Any) -> None:
        """One tile: its sums, and after the last chunk its results.  panel: among the unit's."""
        raise NotImplementedError

    def store_pairs(self, count: Any, tile: Any, panel: Any, place: Any) -> None:
        """The results of a tile's pairs, from its sums in scratch."""
        layer, tiles, table = self.linear, self.tiles, self.stage.table
        with T.serial(count) as r:
            start = T.bind(place + r * (tiles.panels * PANEL))
            row = ONE.keep(self.table[table.pairs_at + tile * table.rows + r] * layer.n, "int32")
            for p in range(0, tiles.panels, layer.parts):
                column = T.bind(T.truncdiv(self.panel + panel + p, layer.parts) * PANEL)
                value = self.outputs(self.weight_panel + panel + p, start + p * PANEL)
                self.store(row, column, value, start + p * PANEL)

    def place_of_x(self, row_tile: Any, word: Any, n_words: int) -> Any:
        return row_tile * (n_words * self.stage.table.rows) + word * self.tiles.rows


class RoutedProduct(Routed):
    """Weights in f32, bf16 or fp8."""

    def tile(self, count: Any, chunk: Any, tile: Any, panel: Any, place: Any) -> None:
        chunks = -(-self.linear.steps // self.tiles.steps)
        self.accumulate(chunk, chunks, tile, T.bind(self.weight_panel + panel), place)
        with if_last(chunk, chunks):
            self.store_pairs(count, tile, panel, place)


class RoutedQuant(Routed, QuantProduct):
    """Weights in int8 or int4: linear/quant_panel.py's tiles."""

    def __init__(self, stage: Stage) -> None:
        assert isinstance(stage.layer, QuantLinear)
        self.quant = stage.layer
        super().__init__(stage)

    def unit_of(self, block: Any, number: Any) -> None:
        table, active = self.stage.table, ONE.keep(self.table[0], "int32")
        is_last = number + 1 == active
        expert = ONE.keep(self.table[table.experts_at + T.Select(is_last, 0, number + 1)], "int32")
        self.next_unit = T.bind(expert * self.linear.panels + (block + T.Select(is_last, 1, 0)) * PANELS_MULTIPLE)
        super().unit_of(block, number)

    def tile(self, count: Any, chunk: Any, tile: Any, panel: Any, place: Any) -> None:
        here, n_panels = T.bind(self.weight_panel + panel), self.tiles.panels
        to_next = T.Select(panel + n_panels < PANELS_MULTIPLE, n_panels, self.next_unit - here)
        self.sum_up(tile, here, T.bind(to_next))
        self.store_pairs(count, tile, panel, 0)


class RoutedInt8(RoutedQuant, Int8Product):
    """Weights in int8."""


class RoutedInt4(RoutedQuant, Int4Product):
    """Weights in int4."""


class RoutedInt4Zeros(RoutedQuant, Int4ZerosProduct):
    """Weights in int4 whose groups have zeros."""


class RoutedMxfp4(RoutedQuant, Mxfp4Product):
    """Weights in mxfp4."""


ROUTED: Mapping[str, type[RoutedQuant]] = {
    "i8": RoutedInt8,
    "i4": RoutedInt4,
    "z4": RoutedInt4Zeros,
    "m4": RoutedMxfp4,
}
