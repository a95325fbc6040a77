"""Rows of a table, by number: token embeddings, tables of positions, the hidden states whose logits are wanted.

    for row in parallel:  y[row] = float32(table[clamp(index[row])])        (row_kernels.py)

The table stays as it is stored and is widened on the way: 2 C bytes read a row in bf16, 4 C written.  A number out of
range, such as the -1 of a row that pads the step, takes the nearest row there is.

A table that a product multiplies by (llmc.WeightRows) lies in that one's panels, 4 bytes of a row in each cache line: a
row reads 16 times as much, some microseconds, and the table is there once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

from llmc.compiler.kernel import DTYPE_BYTES, Call, Implementation, Kernel, Launch, Layout, Operand, short_hash
from llmc.compiler.target import Target
from llmc.schedules.cpu.linear.panel_layout import Panels
from llmc.schedules.cpu.linear.quant_layout import Int8Panels
from llmc.schedules.rule import Rule


@dataclass(frozen=True)
class Gather:
    """`rows` rows of `columns` elements out of `entries`.  table, index: their element types."""

    rows: int
    columns: int
    entries: int
    table: str
    index: str
    lanes: int

    def __str__(self) -> str:
        return f"{self.lanes} lanes"


def match(call: Call, target: Target) -> Gather | None:
    if call.op != "Gather" or call.attribute("axis", 0) != 0:
        return None
    table, index = call.inputs
    if table is None or index is None or index.dtype not in ("i32", "i64") or call.outputs[0].dtype != "f32":
        return None
    if table.dtype not in ("f32", "bf16", "f16") or (table.dtype != "f32" and not table.constant) or not table.shape:
        return None
    columns = prod(table.shape[1:])
    return Gather(prod(index.shape), columns, table.shape[0], table.dtype, index.dtype, target.lanes)


def implement(call: Call, gather: Gather, target: Target) -> Implementation:
    key = f"build_gather({gather!r})"
    digest = short_hash(key)
    launch = Launch(
        Kernel(f"gather_{gather.table}_{gather.rows}x{gather.columns}_{digest}", key, partial(build_gather, gather)),
        (Operand("input", 0), Operand("input", 1), Operand("output", 0)),
        gather.rows,
        gather.rows * gather.columns * (4 + DTYPE_BYTES[gather.table]),
    )
    return Implementation((launch,))


def build_gather(gather: Gather) -> Any:
    from llmc.schedules.cpu import row_kernels  # TVM is imported only when something is compiled

    return row_kernels.gather_kernel(gather)


LAYOUTS: Mapping[str, Layout] = {"f32": Panels("f32"), "bf16": Panels("bf16"), "i8": Int8Panels()}
"""Of a weight in panels, by its dtype: what linear/rule.py and linear/quant_rule.py ask for."""


def match_panels(call: Call, target: Target) -> Gather | None:
    if call.op != "llmc.WeightRows":
        return None
    table, index = call.inputs
    if table is None or index is None or table.dtype not in LAYOUTS or call.outputs[0].dtype != "f32":
        return None
    entries, columns = table.shape
    return Gather(prod(index.shape), columns, entries, table.dtype, index.dtype, lanes=1)


def implement_panels(call: Call, gather: Gather, target: Target) -> Implementation:
    key = f"build_gather_panels({gather!r})"
    name = f"gather_panels_{gather.table}_{gather.rows}x{gather.columns}_{short_hash(key)}"
    kernel = Kernel(name, key, partial(build_gather_panels, gather))
    operands = (Operand("input", 0), Operand("input", 1), Operand("output", 0))
    n_bytes = gather.rows * gather.columns * (4 + DTYPE_BYTES[gather.table])
    return Implementation((Launch(kernel, operands, gather.rows, n_bytes),), layouts={0: LAYOUTS[gather.table]})


def build_gather_panels(gather: Gather) -> Any:
    from llmc.schedules.cpu import row_kernels

    return row_kernels.gather_panels_kernel(gather, LAYOUTS[gather.table].n_bytes((gather.entries, gather.columns)))


RULES = (Rule("gather", match, implement), Rule("gather_panels", match_panels, implement_panels))
