"""Rows in the place of tokens' embeddings, and what they add to layers: llmc.TakeGiven, TakeFirst, AddGiven, in place.

    for row in parallel:  x[row] = given[row][part], or += it, where is_given[row]

A row that is a token's costs a look at its mark, another one reads and writes 4 C bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, Operand, short_hash
from llmc.compiler.ops import ADD_GIVEN, DOMAIN, TAKE_FIRST, TAKE_GIVEN
from llmc.compiler.target import Target
from llmc.schedules.rule import Rule

OPERATORS = tuple(f"{DOMAIN}.{name}" for name in (TAKE_GIVEN, TAKE_FIRST, ADD_GIVEN))


@dataclass(frozen=True)
class Given:
    """Of `parts` parts of a given row, `columns` elements each, the one that is taken, or the one that is added."""

    rows: int
    columns: int
    parts: int
    part: int
    adds: bool
    lanes: int

    def __str__(self) -> str:
        return f"{self.lanes} lanes"


def match(call: Call, target: Target) -> Given | None:
    if call.op not in OPERATORS:
        return None
    rows, columns = call.outputs[0].shape
    given = call.inputs[2]
    assert given is not None, "its definition asks for it"
    adds = call.op == f"{DOMAIN}.{ADD_GIVEN}"
    return Given(rows, columns, given.shape[1] // columns, call.attribute("part", 0), adds, target.lanes)


def implement(call: Call, given: Given, target: Target) -> Implementation:
    key = f"build_given({given!r})"
    name = f"{'add' if given.adds else 'take'}_given_{given.rows}x{given.columns}_{short_hash(key)}"
    kernel = Kernel(name, key, partial(build_given, given))
    operands = (Operand("input", 1), Operand("input", 2), Operand("output", 0))
    return Implementation((Launch(kernel, operands, given.rows, 4 * given.rows),))


def build_given(given: Given) -> Any:
    from llmc.schedules.cpu import row_kernels  # TVM is imported only when something is compiled

    return row_kernels.given_kernel(given)


RULES = (Rule("given", match, implement),)
