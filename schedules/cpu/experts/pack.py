"""Rows of x for the tiles of a mixture of experts: rounded or quantised, and laid out, as for linear layers.

    for (tile, some columns) in parallel:
        for row in the tile: the row of x of its pair, as linear/pack.py or linear/quant_pack.py have it

A tile's rows lie side by side, as many as its kind of tiles has, so that one row lies as a vector.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from llmc.schedules.cpu.experts.rule import Stage
from llmc.schedules.cpu.lanes import AVX512_BF16, Lanes
from llmc.schedules.cpu.linear import pack, quant_dot, quant_pack
from llmc.schedules.cpu.linear.quant_rule import QuantLinear, blocks_a_unit
from llmc.schedules.cpu.linear.rule import PACKING_COLUMNS, Linear

ONE = Lanes(1)


def packing_function(stage: Stage) -> Any:
    """(x, table, packed, task, n_tasks), where quantised (x, table, words, scales, corrections, task, n_tasks)."""
    layer, blocks = stage.layer, stage.layer.packing_blocks
    if isinstance(layer, Linear):
        llvm = AVX512_BF16 if layer.dot == "dpbf16" else ""
    else:
        llvm = quant_dot.llvm_code(layer.dot)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("pack_pairs")
        operands = Operands(stage)
        task, n_tasks = T.arg("task", T.int32()), T.arg("n_tasks", T.int32())
        with T.attr(0, "pragma_import_llvm", llvm), units(operands.table, 1, blocks, task, n_tasks) as unit:
            tile = T.bind(T.truncdiv(unit, blocks))
            block = T.bind(T.truncmod(unit, blocks))
            operands.pack(tile, block)
    return builder.get()


def units(table: Any, at: int, factor: int, task: Any, n_tasks: Any) -> Any:
    """A loop over this task's units, whose number is a number in the table times `factor`."""
    total = ONE.keep(table[at] * factor, "int32")
    return T.serial(T.truncdiv(task * total, n_tasks), T.truncdiv((task + 1) * total, n_tasks))


class Operands:
    """What the kernel reads and writes."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        n_rows = stage.table.pairs // stage.divisor
        self.x = T.arg("x", T.buffer((n_rows * stage.linear.k,), "float32"))
        self.table = T.arg("table", T.buffer((stage.table.words,), "int32"))
        first, *rest = stage.packed_bytes
        pairs_of_bf16 = not isinstance(stage.layer, Linear) or stage.layer.dot == "dpbf16"
        self.packed = [T.arg("packed", T.buffer((first // 4,), "int32" if pairs_of_bf16 else "float32"))]
        for dtype, n_bytes in zip(("float32", "int32"), rest, strict=False):
            self.packed.append(T.arg(f"packed_{dtype}", T.buffer((n_bytes // 4,), dtype)))

    def pack(self, tile: Any, block: Any) -> None:
        """Some columns of a tile's rows."""
        count = ONE.keep(self.table[self.stage.table.counts_at + tile], "int32")
        some = self.of_floats if isinstance(self.stage.layer, Linear) else self.of_bytes
        kinds = [kind.rows for kind in self.stage.tiles]
        if kinds == [1]:
            some(tile, block, count, 1)
            return
        rows = T.int32(kinds[-1])
        for size in reversed(kinds[:-1]):
            rows = T.Select(count <= size, T.int32(size), rows)
        with T.If(count == 1):
            with T.Then():
                some(tile, block, count, 1)
            with T.Else():
                some(tile, block, count, ONE.keep(rows, "int32"))

    def row_of_x(self, tile: Any, row: Any) -> Any:
        table = self.stage.table
        return T.truncdiv(self.table[table.pairs_at + tile * table.rows + row], self.stage.divisor)

    def of_floats(self, tile: Any, block: Any, count: Any, rows: Any) -> None:
        layer = self.stage.layer
        assert isinstance(layer, Linear)
        first = T.bind(block * PACKING_COLUMNS)
        place = pack.Place(layer, rows, self.packed[0], tile * (self.stage.table.rows * layer.steps * layer.words))
        with T.serial(count) as row:
            start = ONE.keep(self.row_of_x(tile, row) * layer.k, "int32")
            place.row(first, row, self.x, start)

    def of_bytes(self, tile: Any, block: Any, count: Any, rows: Any) -> None:
        layer = self.stage.layer
        assert isinstance(layer, QuantLinear)
        each, whole = blocks_a_unit(layer), layer.linear.k // layer.block
        first = T.bind(block * each)
        last = T.bind(T.min(first + each, layer.blocks))
        place = RoutedPlace(layer, self, rows)
        with T.serial(count) as row, T.serial(T.max(T.min(last, whole) - first, 0)) as i:
            place.block(tile, first + i, row, full=True)
        if whole < layer.blocks:
            with T.serial(count) as row, T.serial(T.max(last - T.max(first, whole), 0)) as i:
                place.block(tile, T.max(first, whole) + i, row, full=False)


class RoutedPlace(quant_pack.Place):
    """Where the parts of a block go, when the rows of a tile come from anywhere."""

    def __init__(self, quant: QuantLinear, operands: Operands, rows: Any) -> None:
        self.quant, self.rows, self.tile_steps = quant, rows, 1
        self.operands = operands
        self.x = operands.x
        self.words, self.scales, self.corrections = operands.packed

    def row_of_x(self, tile: Any, row: Any) -> Any:
        return self.operands.row_of_x(tile, row)

    def place(self, tile: Any, word: Any, n_words: int) -> Any:
        return tile * (n_words * self.operands.stage.table.rows) + word * self.rows
