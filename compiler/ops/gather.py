"""Rows of tables, by number: what a step begins with.

    Gather2, Gather3, …      rows_i = table_i[index_i]
    WeightRows               rows = weight[index], of a weight that lies as a product wants it

A GPU's launch waits for the one in front of it, so that several small ones cost several times what one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from llmc.compiler.ops.define import Attributes, Dims, define, operator

MOST_TABLES = 8
"""Each takes three of a kernel's pointers."""


def gathers_name(n_tables: int) -> str:
    """`Gather2`, …: the operator for so many."""
    return f"Gather{n_tables}"


def define_gathers(n_tables: int) -> None:
    def body(op: Any, *inputs: ir.Value) -> Any:
        return [op.Gather(table, index, axis=0) for table, index in zip(inputs[::2], inputs[1::2], strict=True)]

    def shapes(s: Sequence[Dims], _: Attributes) -> Sequence[Dims]:
        return [(*index, *table[1:]) for table, index in zip(s[::2], s[1::2], strict=True)]

    inputs = [f"{name}_{i}" for i in range(n_tables) for name in ("table", "index")]
    doc = "rows_i = table_i[index_i].    table_i [N_i, …], index_i i64[M] -> [M, …] each."
    define(gathers_name(n_tables), inputs, {}, body, shapes, doc)


GATHERS = tuple(map(gathers_name, range(2, MOST_TABLES + 1)))
for _n_tables in range(2, MOST_TABLES + 1):
    define_gathers(_n_tables)


@operator(lambda s, _: [(*s[1], s[0][1])])
def WeightRows(op: Any, weight: ir.Value, index: ir.Value) -> Any:
    """rows = weight[index].    weight [N, K] of llmc.Linear, index i64[M] -> [M, K]."""
    return op.Gather(weight, index, axis=0)
