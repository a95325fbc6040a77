"""Rows in the place of tokens' embeddings, and what they add to layers: llmc.TakeGiven, TakeFirst, AddGiven, in place.

    for row in parallel:  x[row] = given[row] where is_given[row]
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


@dataclass(frozen=True)
class Given:
    """`rows` rows of `columns` elements."""

    rows: int
    columns: int
    lanes: int

    def __str__(self) -> str:
        return f"{self.lanes} lanes"


@dataclass(frozen=True)
class Part:
    """Of `parts` parts of a row, `columns` elements each, the one that is taken, or the one that is added."""

    rows: int
    columns: int
    parts: int
    part: int
    adds: bool
    lanes: int

    def __str__(self) -> str:
        return f"{self.lanes} lanes"


def match(call: Call, target: Target) -> Given | None:
    if call.op != f"{DOMAIN}.{TAKE_GIVEN}":
        return None
    rows, columns = call.outputs[0].shape
    return Given(rows, columns, target.lanes)


def implement(call: Call, given: Given, target: Target) -> Implementation:
    key = f"build_given({given!r})"
    kernel = Kernel(f"take_given_{given.rows}x{given.columns}_{short_hash(key)}", key, partial(build_given, given))
    operands = (Operand("input", 1), Operand("input", 2), Operand("output", 0))
    return Implementation((Launch(kernel, operands, given.rows, 4 * given.rows),))


def build_given(given: Given) -> Any:
    from llmc.schedules.cpu import row_kernels  # TVM is imported only when something is compiled

    return row_kernels.given_kernel(given)


def match_part(call: Call, target: Target) -> Part | None:
    adds = call.op == f"{DOMAIN}.{ADD_GIVEN}"
    if not adds and call.op != f"{DOMAIN}.{TAKE_FIRST}":
        return None
    rows, columns = call.outputs[0].shape
    given = call.inputs[2]
    assert given is not None, "its definition asks for it"
    return Part(rows, columns, given.shape[1] // columns, call.attribute("part", 0), adds, target.lanes)


def implement_part(call: Call, part: Part, target: Target) -> Implementation:
    key = f"build_part({part!r})"
    name = f"{'add' if part.adds else 'take'}_given_{part.rows}x{part.columns}_{short_hash(key)}"
    kernel = Kernel(name, key, partial(build_part, part))
    operands = (Operand("input", 1), Operand("input", 2), Operand("output", 0))
    return Implementation((Launch(kernel, operands, part.rows, 4 * part.rows),))


def build_part(part: Part) -> Any:
    from llmc.schedules.cpu import row_kernels

    return row_kernels.part_kernel(part)


RULES = (Rule("given", match, implement), Rule("given_part", match_part, implement_part))
