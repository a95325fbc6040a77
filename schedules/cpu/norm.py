"""Norms over the last axis, alone or behind an addition (schedules/norm_call.py).

One launch (row_kernels.py), one row a unit.  Reads each operand and writes each result once from memory: 8 C bytes a
row (16 C with the addition); the row's second and third pass find it in the first level cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, short_hash
from llmc.compiler.target import Target
from llmc.schedules.norm_call import parse, vector_layouts
from llmc.schedules.rule import Rule


@dataclass(frozen=True)
class Norm:
    """As NormCall has them, and the lanes of a vector."""

    rows: int
    columns: int
    centred: bool
    adds: bool
    bias: bool
    epsilon: float
    lanes: int

    def __str__(self) -> str:
        return f"{self.lanes} lanes"


def match(call: Call, target: Target) -> Norm | None:
    asked = parse(call)
    return Norm(**vars(asked), lanes=target.lanes) if asked else None


def implement(call: Call, norm: Norm, target: Target) -> Implementation:
    asked = parse(call)
    assert asked is not None
    words = norm.rows * norm.columns * (4 if norm.adds else 2) + norm.columns * (1 + norm.bias)
    kind = f"{'add_' * norm.adds}{'layer' if norm.centred else 'rms'}_norm{'_bias' * norm.bias}"
    key = f"build_norm({norm!r})"
    name = f"{kind}_{norm.rows}x{norm.columns}_{short_hash(key)}"
    launch = Launch(
        Kernel(name, key, partial(build_norm, norm)),
        asked.operands,
        norm.rows,
        4 * words,
        norm.rows * norm.columns * (7 if norm.centred else 4),
    )
    return Implementation((launch,), layouts=vector_layouts(call, asked))


def build_norm(norm: Norm) -> Any:
    from llmc.schedules.cpu import row_kernels  # TVM is imported only when something is compiled

    return row_kernels.norm_kernel(norm)


RULES = (Rule("norm", match, implement),)
