"""Rows in the place of tokens' embeddings: llmc.TakeGiven, in place.

    for row in parallel:  x[row] = given[row] where is_given[row]

A row that is a token's costs a look at its mark, another one reads and writes 4 C bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, Operand, short_hash
from llmc.compiler.ops import DOMAIN, TAKE_GIVEN
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


RULES = (Rule("given", match, implement),)
