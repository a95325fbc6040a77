"""Columns of rows, moved (schedules/columns_call.py).

    for row in parallel:  y_o[row, to : to + n] = x_i[row, from : from + n]    for each piece (i, from, o, to, n)

Reads and writes each element once: memory is the limit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, Operand, short_hash
from llmc.compiler.target import Target
from llmc.schedules.columns_call import Columns, columns_of
from llmc.schedules.rule import Rule


def match(call: Call, target: Target) -> Columns | None:
    return columns_of(call, target.lanes)


def implement(call: Call, columns: Columns, target: Target) -> Implementation:
    key = f"build_columns({columns!r})"
    moved = columns.rows * sum(n for *_, n in columns.pieces)
    name = f"columns_{columns.rows}x{sum(columns.operands)}_{short_hash(key)}"
    operands = [Operand("input", i) for i in range(len(columns.operands))]
    results = [Operand("output", o) for o in range(len(columns.results))]
    launch = Launch(Kernel(name, key, partial(build_columns, columns)), (*operands, *results), columns.rows, 8 * moved)
    return Implementation((launch,))


def build_columns(columns: Columns) -> Any:
    from llmc.schedules.cpu import row_kernels  # TVM is imported only when something is compiled

    return row_kernels.columns_kernel(columns)


RULES = (Rule("columns", match, implement),)
