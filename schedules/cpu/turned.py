"""Angles of positions in three directions: llmc.GatherTurned.

    for row in parallel:  for column c:  y[row][c] = table[clamp(turns[row][directions[c]])][c]

Columns of one direction that are side by side are read together.  4 C bytes read a row, 4 C written, once a step for
all layers.  A number out of range takes the nearest row there is, as in gather.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, Operand, short_hash
from llmc.compiler.ops import DOMAIN, GATHER_TURNED
from llmc.compiler.target import Target
from llmc.schedules.rule import Rule


@dataclass(frozen=True)
class Turned:
    """`rows` rows of so many columns as there are directions, out of `entries`."""

    rows: int
    entries: int
    directions: tuple[int, ...]
    lanes: int

    def __str__(self) -> str:
        return f"{self.lanes} lanes"

    @property
    def columns(self) -> int:
        return len(self.directions)

    @property
    def pieces(self) -> list[tuple[int, int, int]]:
        """(direction, first column, how many) of columns of one direction that are side by side."""
        pieces, first = [], 0
        for direction, run in groupby(self.directions):
            n = len(list(run))
            pieces.append((direction, first, n))
            first += n
        return pieces


def match(call: Call, target: Target) -> Turned | None:
    if call.op != f"{DOMAIN}.{GATHER_TURNED}":
        return None
    table, turns = call.inputs
    assert table is not None, "its definition asks for it"
    if table.dtype != "f32" or turns is None or turns.dtype != "i32":
        return None
    return Turned(call.outputs[0].shape[0], table.shape[0], tuple(call.attribute("directions")), target.lanes)


def implement(call: Call, turned: Turned, target: Target) -> Implementation:
    key = f"build_turned({turned!r})"
    name = f"gather_turned_{turned.rows}x{turned.columns}_{short_hash(key)}"
    operands = (Operand("input", 0), Operand("input", 1), Operand("output", 0))
    kernel = Kernel(name, key, partial(build_turned, turned))
    return Implementation((Launch(kernel, operands, turned.rows, 8 * turned.rows * turned.columns),))


def build_turned(turned: Turned) -> Any:
    from llmc.schedules.cpu import row_kernels  # TVM is imported only when something is compiled

    return row_kernels.turned_kernel(turned)


RULES = (Rule("turned", match, implement),)
