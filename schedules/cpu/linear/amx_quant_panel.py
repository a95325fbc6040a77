"""The product of a linear layer with quantised weights on AMX, block by block.

    for unit in parallel:                                       grid = panels of W / (panels a block * group)
        for block of rows of x, for block of panels in the group:
            int4, before the first block of rows: the panels' halves of bytes to bytes, in scratch memory
            sums [rows][panels][16] = 0.0                       in scratch memory
            for block of K:
                exact [rows][panels][16] = x * W                in tile registers, int32
                sums = fma(kept + correction[r], scale, sums)   of the block before, while this one is multiplied;
                                                                z4: what is added has its zero as in quant_panel.py
                kept = exact                                    in scratch memory
            finish as panel.py does, in int8 after multiplying by W's scale

Bytes: W once from memory, while all blocks of rows pass; x once for every unit.  Operations: 2 M N K on bytes,
4 M N K / block on floats.  The limit is neither: with 128 elements a block a tile is stored after every second product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from llmc.schedules.cpu.amx import ROW_BYTES, call
from llmc.schedules.cpu.lanes import Lanes, share
from llmc.schedules.cpu.linear.amx_quant_rule import scratch_words, sums_words, tile_block, tile_steps
from llmc.schedules.cpu.linear.panel import SECOND_LEVEL, VECTOR, Product, loop, prefetch
from llmc.schedules.cpu.linear.panel_layout import PANEL
from llmc.schedules.cpu.linear.quant_dot import halves, llvm_code, times
from llmc.schedules.cpu.linear.quant_layout import Int4Panels
from llmc.schedules.cpu.linear.quant_panel import HALF_BYTES
from llmc.schedules.cpu.linear.quant_rule import QuantLinear
from llmc.schedules.cpu.linear.rule import Tiles


def product_function(quant: QuantLinear, tiles: Tiles) -> Any:
    """(words, scales, corrections, weight[, bias][, residual], y, scratch, task, n_tasks); x as quant_pack.py lays
    it out."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("product")
        product = PRODUCTS[quant.weight](quant, tiles)
        task, n_tasks = T.arg("task", T.int32()), T.arg("n_tasks", T.int32())
        with T.attr(0, "pragma_import_llvm", llvm_code(quant.dot) + product.block.llvm_code()):
            call("tiles_open")
            with share(tiles.grid(quant.linear), task, n_tasks) as unit:
                product.unit(unit)
            call("tiles_close")
    return builder.get()


class BytesProduct(Product):
    """int8: the operands, and the loop nest over them."""

    def __init__(self, quant: QuantLinear, tiles: Tiles) -> None:
        self.quant, self.linear, self.tiles = quant, quant.linear, tiles
        self.block = tile_block(quant, tiles)
        rows = tiles.row_tiles(quant.linear) * tiles.rows
        self.x = T.arg("words", T.buffer((rows * quant.steps,), "int32"))
        self.x_scales = T.arg("scales", T.buffer((rows * quant.blocks,), "float32"))
        self.corrections = T.arg("corrections", T.buffer((rows * quant.blocks,), "int32"))
        self.declare((quant.linear.panels * quant.panel_words, "int32"), scratch_words(quant, tiles))

    def unit(self, unit: Any) -> None:
        tiles = self.tiles
        with loop(tiles.row_tiles(self.linear)) as row_tile, loop(tiles.group) as member:
            panel = T.bind((unit * tiles.group + member) * tiles.panels)
            self.prepare(row_tile, panel, member)
            with T.serial(tiles.rows * tiles.panels) as i:
                VECTOR.store(self.scratch, i * PANEL, VECTOR.all(0.0))
            self.multiply(row_tile, panel, member, 0)
            self.keep()
            with T.serial(1, self.quant.blocks) as block:
                self.multiply(row_tile, panel, member, block)
                self.add(row_tile, panel, block - 1)
                self.keep()
            self.add(row_tile, panel, self.quant.blocks - 1)
            self.scale(panel)
            self.finish(row_tile, panel, 0)

    def prepare(self, row_tile: Any, panel: Any, member: Any) -> None:
        """What the weight needs before it is multiplied."""

    def multiply(self, row_tile: Any, panel: Any, member: Any, block: Any) -> None:
        """The exact sums of a block of K, in registers."""
        quant, tiles, steps = self.quant, self.tiles, tile_steps(self.quant)
        self.prefetch(row_tile, panel, block)
        call("sums_zero")
        for step in range(0, quant.block // 4, steps):
            k = T.bind(block * (quant.block // 4) + step)
            x = self.x[(row_tile * quant.steps + k) * tiles.rows]
            weight, apart = self.tile(panel, member, k)
            call("sums_add", T.address_of(x), T.address_of(weight), apart * 4)

    def keep(self) -> None:
        """The exact sums, from registers to scratch memory: after those there were read, as loads behind these stores
        would wait with them for the products."""
        call("sums_store", T.address_of(self.scratch[sums_words(self.tiles)]), self.tiles.panels * ROW_BYTES)

    def tile(self, panel: Any, member: Any, k: Any) -> tuple[Any, int]:
        """Where the tile of a panel at a step along k begins, and how many words on that of the next panel."""
        return self.weight[panel * self.quant.panel_words + k * PANEL], self.quant.panel_words

    def prefetch(self, row_tile: Any, panel: Any, block: Any) -> None:
        """Asks for what of the weight comes next: for a single block of rows, some lines ahead; of several, each its
        share of the next unit's panels."""
        quant, tiles = self.quant, self.tiles
        row_tiles = tiles.row_tiles(self.linear)
        lines = quant.panel_words // PANEL // quant.blocks
        each = lines if row_tiles == 1 else -(-lines // row_tiles)
        ahead = tiles.far * PANEL if row_tiles == 1 else tiles.group * tiles.panels * quant.panel_words
        for p in range(tiles.panels) if tiles.far else ():
            first = (panel + p) * quant.panel_words + (block * lines + row_tile * each) * PANEL + ahead
            for line in range(each):
                prefetch(self.weight, first + line * PANEL, SECOND_LEVEL)

    def add(self, row_tile: Any, panel: Any, block: Any) -> None:
        """Adds the exact sums of a block to the sums, with their scales."""
        quant, tiles = self.quant, self.tiles
        exact = sums_words(tiles)
        at = T.bind((row_tile * quant.blocks + block) * tiles.rows)
        of_weight = self.block_scales(panel, block)
        zeros = self.block_zeros(panel, block)
        with T.serial(tiles.rows) as r:
            of_x = T.bind(VECTOR.all(self.x_scales[at + r]))
            correction = T.bind(VECTOR.all(self.corrections[at + r]))
            for p in range(tiles.panels):
                place = T.bind((r * tiles.panels + p) * PANEL)
                whole = VECTOR.bits(self.scratch[VECTOR.at(exact + place)])
                scale = of_x * of_weight[p] if of_weight else of_x
                old = self.scratch[VECTOR.at(place)]
                value = self.value(whole, correction, zeros[p] if zeros else None)
                VECTOR.store(self.scratch, place, VECTOR.fma(value, scale, old))

    def value(self, exact: Any, correction: Any, zero: Any) -> Any:
        """What is added of a block: exact sums, of which what was added to codes is taken away, in float32."""
        return T.cast(exact + correction, VECTOR.f32)

    def block_scales(self, panel: Any, block: Any) -> list[Any]:
        """The weight's own scales in a block, of each panel; nothing where it has none."""
        return []

    def block_zeros(self, panel: Any, block: Any) -> list[Any]:
        """1 and an eighth of the zeros of a block, of each panel; nothing where it has none."""
        return []

    def scale(self, panel: Any) -> None:
        """Multiplies the finished sums by what scales the whole rows of the weight."""
        quant, tiles = self.quant, self.tiles
        for p in range(tiles.panels):
            words = self.weight[VECTOR.at((panel + p) * quant.panel_words + quant.steps * PANEL)]
            scales = VECTOR.keep(VECTOR.float(words))
            with T.serial(tiles.rows) as r:
                place = T.bind((r * tiles.panels + p) * PANEL)
                VECTOR.store(self.scratch, place, times(self.scratch[VECTOR.at(place)], scales))


class HalfBytesProduct(BytesProduct):
    """int4: the weight becomes bytes in scratch memory, [panels of a unit][K/4][16] words, in the order of x's."""

    def prepare(self, row_tile: Any, panel: Any, member: Any) -> None:
        quant, tiles = self.quant, self.tiles
        words = quant.block // 8  # of a lane, in a group
        mask = VECTOR.all(HALF_BYTES)
        with T.If(row_tile == 0), T.Then(), T.serial(tiles.panels) as p, T.serial(quant.blocks) as block:
            start = T.bind(self.group_start(panel + p, block))
            to = T.bind(self.as_bytes(member, p) + block * words * 2 * PANEL)
            with T.serial(words) as i:
                both = VECTOR.keep(self.weight[VECTOR.at(start + i * PANEL)], "int32")
                low = T.bitwise_and(both, mask)
                high = T.bitwise_and(T.shift_right(both, VECTOR.all(4)), mask)
                VECTOR.store(self.scratch, to + i * 2 * PANEL, VECTOR.float(low))
                VECTOR.store(self.scratch, to + (i * 2 + 1) * PANEL, VECTOR.float(high))

    def group_start(self, panel: Any, block: Any) -> Any:
        """The first word of a group of a panel: groups lie in pairs."""
        pair, second = T.truncdiv(block, 2), T.truncmod(block, 2)
        in_pair = second * (self.quant.block // 8 * PANEL)
        return panel * self.quant.panel_words + pair * self.layout.pair_words + in_pair

    @property
    def layout(self) -> Int4Panels:
        layout = self.quant.layout
        assert isinstance(layout, Int4Panels)
        return layout

    def as_bytes(self, member: Any, p: Any) -> Any:
        """Where a panel lies as bytes: behind the sums and the exact ones."""
        return 2 * sums_words(self.tiles) + (member * self.tiles.panels + p) * self.quant.steps * PANEL

    def tile(self, panel: Any, member: Any, k: Any) -> tuple[Any, int]:
        return self.scratch[self.as_bytes(member, 0) + k * PANEL], self.quant.steps * PANEL

    def block_scales(self, panel: Any, block: Any) -> list[Any]:
        return self.behind(panel, block, 0)

    def behind(self, panel: Any, block: Any, which: int) -> list[Any]:
        """Of what lies behind the codes of a pair of groups, the part of one: scales (0), zeros (1)."""
        half = Lanes(PANEL // 2)
        pair, second = T.truncdiv(block, 2), T.truncmod(block, 2)
        at = pair * self.layout.pair_words + (self.layout.codes_words + which * PANEL) + second * half.n
        return [
            VECTOR.keep(halves(self.weight[half.at((panel + p) * self.quant.panel_words + at)]))
            for p in range(self.tiles.panels)
        ]

    def scale(self, panel: Any) -> None:
        pass


class HalfBytesZerosProduct(HalfBytesProduct):
    """The same, where groups have zeros."""

    def block_zeros(self, panel: Any, block: Any) -> list[Any]:
        return [VECTOR.keep(zero + VECTOR.all(1.0)) for zero in self.behind(panel, block, 1)]

    def value(self, exact: Any, correction: Any, zero: Any) -> Any:
        return VECTOR.fma(zero, VECTOR.float(correction), T.cast(exact, VECTOR.f32))


PRODUCTS: Mapping[str, type[BytesProduct]] = {
    "i8": BytesProduct,
    "i4": HalfBytesProduct,
    "z4": HalfBytesZerosProduct,
}
