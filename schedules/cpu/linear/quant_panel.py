"""The product of a linear layer with quantised weights, tile by tile.

    for unit in parallel:                                       grid = panels of W / panels a tile
        for row tile:
            sums [rows][panels][16] = 0.0
            for block of K:
                exact [rows][panels][16] = correction[r]        in registers, int32; z4: 0
                for step in the block:
                    w[p]        = W[panel p][step]              16 outputs, four k each; int4: a half of each byte
                    exact[r][p] += x[row tile][step][r] * w[p]  four products in one instruction (quant_dot.py)
                z4: exact[r][p] = fma(1 + zero[p] / 8, correction[r], exact[r][p])      exact too where zeros are whole
                sums[r][p] = fma(exact, scale, sums)            scale: of x in this row and block, in int4 times W's
            finish as panel.py does, in int8 after multiplying by W's scale

Bytes: W once for M up to a tile's rows; beyond, a unit's panels stay in the second level cache while the row tiles
pass, and x is read once for every unit.  Operations: 2 M N K on bytes, 4 M N K / block on floats.
The limit is memory up to M of about 16, then arithmetic.

Lines of the weight are asked for one by one, as far ahead as `near` says, and at the end of a tile's panels among those
that are taken next: what waits for memory there, or for lines asked for together, does not multiply meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from llmc.schedules.cpu.lanes import Lanes, ask, share
from llmc.schedules.cpu.linear.panel import VECTOR, Product
from llmc.schedules.cpu.linear.panel_layout import PANEL
from llmc.schedules.cpu.linear.quant_dot import dot4, e2m1, halves, llvm_code, times, upper_halves
from llmc.schedules.cpu.linear.quant_layout import Int4Panels
from llmc.schedules.cpu.linear.quant_rule import QuantLinear
from llmc.schedules.cpu.linear.rule import Tiles

HALF_BYTES = 0x0F0F0F0F
HALF = Lanes(PANEL // 2)
Sums = dict[tuple[int, int], Any]
"""A tile's, by row and panel."""
MOST_UNROLLED = 64
"""Words of the weight times rows that are written out in a row."""


def product_function(quant: QuantLinear, tiles: Tiles) -> Any:
    """(words, scales, corrections, weight[, bias][, residual], y, scratch, task, n_tasks); x as quant_pack.py lays
    it out."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("product")
        product = PRODUCTS[quant.weight](quant, tiles)
        task, n_tasks = T.arg("task", T.int32()), T.arg("n_tasks", T.int32())
        llvm = llvm_code(quant.dot)
        with T.attr(0, "pragma_import_llvm", llvm), share(tiles.grid(quant.linear), task, n_tasks) as unit:
            product.unit(unit)
    return builder.get()


class QuantProduct(Product):
    """The operands and the loop nest; how a weight becomes bytes is for the subclasses to say."""

    def __init__(self, quant: QuantLinear, tiles: Tiles) -> None:
        layer = quant.linear
        self.quant, self.linear, self.tiles = quant, layer, tiles
        self.declare_x(tiles.row_tiles(layer) * tiles.rows)
        self.declare((layer.panels * quant.panel_words, "int32"), tiles.rows * tiles.panels * PANEL)

    def declare_x(self, rows: int) -> None:
        quant = self.quant
        self.x = T.arg("words", T.buffer((rows * quant.steps,), "int32"))
        self.x_scales = T.arg("scales", T.buffer((rows * quant.blocks,), "float32"))
        self.corrections = T.arg("corrections", T.buffer((rows * quant.blocks,), "int32"))

    @property
    def places(self) -> list[tuple[int, int]]:
        """A tile's sums: of each row and panel."""
        return [(r, p) for r in range(self.tiles.rows) for p in range(self.tiles.panels)]

    def unit(self, unit: Any) -> None:
        row_tiles = self.tiles.row_tiles(self.linear)
        with T.serial(row_tiles) as row_tile:
            panel = T.bind(unit * self.tiles.panels)
            self.sum_up(row_tile, panel, self.tiles.panels)
            self.finish(row_tile, panel, 0)

    def sum_up(self, row_tile: Any, panel: Any, to_next: Any) -> None:
        """A tile's sums, to scratch.  to_next: how many panels further those lie that are taken next."""
        sums = {at: T.alloc_buffer((PANEL,), "float32") for at in self.places}
        for at in self.places:
            VECTOR.store(sums[at], 0, VECTOR.all(0.0))
        starts = [T.bind((panel + p) * self.quant.panel_words) for p in range(self.tiles.panels)]
        self.blocks(sums, row_tile, starts, to_next * self.quant.panel_words)
        for r, p in self.places:
            value = self.scaled(sums[r, p][VECTOR.at(0)], starts[p])
            VECTOR.store(self.scratch, (r * self.tiles.panels + p) * PANEL, value)

    def blocks(self, sums: Sums, row_tile: Any, starts: list[Any], to_next: Any) -> None:
        """Adds every block to the sums.  starts: the first word of each panel; to_next: as many words further begin
        those that are taken next."""
        raise NotImplementedError

    def scaled(self, value: Any, start: Any) -> Any:
        """A finished sum times what scales the whole row of the weight."""
        return value

    def begin(self, row_tile: Any, block: Any) -> tuple[Sums, Any]:
        """The exact sums of a block, and where its scales and corrections lie."""
        at = T.bind(self.place_of_x(row_tile, block, self.quant.blocks))
        exact = {place: T.alloc_buffer((PANEL,), "int32") for place in self.places}
        for r, p in self.places:
            VECTOR.store(exact[r, p], 0, self.first(at + r))
        return exact, at

    def first(self, at: Any) -> Any:
        """What a row's exact sums begin with: what takes away what was added to codes."""
        return VECTOR.all(self.corrections[at])

    def multiply(self, exact: Sums, row_tile: Any, step: Any, weights: list[Any]) -> None:
        """Adds one step: 16 lanes of four bytes of each panel times four bytes of each row."""
        at = T.bind(self.place_of_x(row_tile, step, self.quant.steps))
        for r in range(self.tiles.rows):
            x = T.bind(VECTOR.all(self.x[at + r]))
            for p, w in enumerate(weights):
                VECTOR.store(exact[r, p], 0, dot4(exact[r, p][VECTOR.at(0)], w, x))

    def add(self, sums: Sums, values: Sums, scales: list[list[Any]]) -> None:
        """sums = fma(value, scale, sums), with a scale for each row and panel."""
        for r, p in self.places:
            VECTOR.store(sums[r, p], 0, VECTOR.fma(values[r, p], scales[r][p], sums[r, p][VECTOR.at(0)]))

    def as_floats(self, exact: Sums) -> Sums:
        """Exact sums in float32."""
        return {place: T.cast(exact[place][VECTOR.at(0)], VECTOR.f32) for place in self.places}

    def unrolled(self, words: int) -> int:
        """How many of a block's words are written out in a row."""
        most = max(1, MOST_UNROLLED // len(self.places))
        return max(n for n in range(1, min(words, most) + 1) if words % n == 0)

    def ahead(self, part: Any, part_words: int, n_parts: int, to_next: Any) -> Any:
        """How many words further lies what is asked for beside a part of a panel, of `n_parts`: about `near` lines,
        in whole parts."""
        parts = round(self.tiles.near * PANEL / part_words) or 1
        return T.bind(parts * part_words + T.Select(part + parts < n_parts, 0, to_next - n_parts * part_words))

    def load(self, at: Any, ahead: Any) -> Any:
        """16 words of the weight; what lies `ahead` words further is asked for."""
        self.ask(at + ahead)
        return VECTOR.keep(self.weight[VECTOR.at(at)], "int32")

    def ask(self, at: Any) -> None:
        """Asks for a cache line of the weight, if these tiles ask at all."""
        if self.tiles.near:
            ask(self.weight[at])


class Int8Product(QuantProduct):
    """A word of the weight is four elements."""

    def blocks(self, sums: Sums, row_tile: Any, starts: list[Any], to_next: Any) -> None:
        steps = self.quant.block // 4
        unroll = self.unrolled(steps)
        with T.serial(self.quant.blocks) as block:
            ahead = self.ahead(block, steps * PANEL, self.quant.blocks, to_next)
            exact, at = self.begin(row_tile, block)
            with T.serial(steps // unroll) as some:
                for i in range(unroll):
                    step = T.bind(block * steps + some * unroll + i)
                    weights = [self.load(start + step * PANEL, ahead) for start in starts]
                    self.multiply(exact, row_tile, step, weights)
            scales = [[VECTOR.all(self.x_scales[at + r])] * self.tiles.panels for r in range(self.tiles.rows)]
            self.add(sums, self.as_floats(exact), scales)

    def scaled(self, value: Any, start: Any) -> Any:
        scales = self.weight[VECTOR.at(start + self.quant.steps * PANEL)]
        return times(value, VECTOR.float(scales))


class Int4Product(QuantProduct):
    """A word of the weight is two steps: the low and the high halves of its bytes.  Groups come in pairs."""

    def blocks(self, sums: Sums, row_tile: Any, starts: list[Any], to_next: Any) -> None:
        words = self.quant.block // 8  # of a lane, in a group
        n_pairs, pair_words = self.quant.blocks // 2, self.layout.pair_words
        with T.serial(n_pairs) as pair:
            firsts = [T.bind(start + pair * pair_words) for start in starts]
            ahead = self.ahead(pair, pair_words, n_pairs, to_next)
            for group in range(2):
                exact, at = self.begin(row_tile, pair * 2 + group)
                unroll = self.unrolled(words)
                with T.serial(words // unroll) as some:
                    for i in range(unroll):
                        word = T.bind(group * words + some * unroll + i)
                        stored = [self.load(first + word * PANEL, ahead) for first in firsts]
                        low, high = self.halves_of(stored)
                        step = T.bind((pair * 2 * words + word) * 2)
                        self.multiply(exact, row_tile, step, low)
                        self.multiply(exact, row_tile, step + 1, high)
                of_weight = [self.behind(first, group, 0) for first in firsts]
                of_x = [VECTOR.all(self.x_scales[at + r]) for r in range(self.tiles.rows)]
                values = self.values(exact, at, firsts, group)
                self.add(sums, values, [[x * w for w in of_weight] for x in of_x])
            for behind in range(self.layout.codes_words, pair_words, PANEL):
                for first in firsts:
                    self.ask(first + behind + ahead)

    @property
    def layout(self) -> Int4Panels:
        layout = self.quant.layout
        assert isinstance(layout, Int4Panels)
        return layout

    def behind(self, first: Any, group: int, which: int) -> Any:
        """Of what lies behind a pair's codes, the 16 of a group: scales (0), zeros (1)."""
        at = self.layout.codes_words + which * PANEL + group * HALF.n
        return VECTOR.keep(self.of_halves(self.weight[HALF.at(first + at)]))

    def values(self, exact: Sums, at: Any, firsts: list[Any], group: int) -> Sums:
        """What is added of a group: its exact sums, in float32.  firsts: where its pair begins in each panel."""
        return self.as_floats(exact)

    def of_halves(self, words: Any) -> Any:
        """Scales as float32, of the 16 bits that each is stored in."""
        return halves(words)

    def halves_of(self, stored: list[Any]) -> tuple[list[Any], list[Any]]:
        """The low and the high half of each byte, as bytes."""
        mask = VECTOR.all(HALF_BYTES)
        low = [VECTOR.keep(T.bitwise_and(w, mask), "int32") for w in stored]
        high = [VECTOR.keep(T.bitwise_and(T.shift_right(w, VECTOR.all(4)), mask), "int32") for w in stored]
        return low, high


class Int4ZerosProduct(Int4Product):
    """The same, where groups have zeros."""

    def first(self, at: Any) -> Any:
        return VECTOR.all(0)

    def values(self, exact: Sums, at: Any, firsts: list[Any], group: int) -> Sums:
        """The sums of products with codes less their zero.  exact: of codes + 8.  A correction is -8 times the sum of
        x: once of it takes away the 8, and an eighth of the zero times it the zero."""
        zeros = [VECTOR.keep(self.behind(first, group, 1) + VECTOR.all(1.0)) for first in firsts]
        corrections = [VECTOR.float(VECTOR.all(self.corrections[at + r])) for r in range(self.tiles.rows)]
        values = self.as_floats(exact)
        return {(r, p): VECTOR.fma(zeros[p], corrections[r], values[r, p]) for r, p in self.places}


class Mxfp4Product(Int4Product):
    """The same, where the halves are numbers of e2m1, and scales bf16."""

    def of_halves(self, words: Any) -> Any:
        return upper_halves(words)

    def halves_of(self, stored: list[Any]) -> tuple[list[Any], list[Any]]:
        low, high = super().halves_of(stored)
        return [VECTOR.keep(e2m1(w), "int32") for w in low], [VECTOR.keep(e2m1(w), "int32") for w in high]


PRODUCTS: Mapping[str, type[QuantProduct]] = {"i8": Int8Product, "i4": Int4Product, "z4": Int4ZerosProduct}
