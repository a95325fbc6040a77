"""Columns of rows, moved: Split, Concat and Slice of the last axis, and one slice of the axis in front of it; for the
schedules of every target.

    y_o[row, to : to + n] = x_i[row, from : from + n]    for each piece (i, from, o, to, n) and row
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from math import prod

from llmc.compiler.kernel import Call, TensorType

Piece = tuple[int, int, int, int, int]
"""(operand, its first column, result, its first column, columns)."""


@dataclass(frozen=True)
class Columns:
    """`rows` rows.  operands, results: how many columns each has.  lanes: of a vector; 0 where there are none."""

    rows: int
    operands: tuple[int, ...]
    results: tuple[int, ...]
    pieces: tuple[Piece, ...]
    lanes: int = 0

    def __str__(self) -> str:
        return f"{self.lanes} lanes" if self.lanes else "a thread for each element"


def columns_of(call: Call, lanes: int = 0) -> Columns | None:
    """The columns that a call moves; None if it is another operator, or not of float32."""
    x, y = call.inputs[0] if call.inputs else None, call.outputs[0]
    if x is None or x.constant or len(x.shape) < 2:
        return None
    if any(kind.dtype != "f32" or kind.tiled for kind in (x, *call.outputs)):
        return None
    found = {"Split": split, "Concat": concat, "Slice": cut, "Gather": pick}.get(call.op, lambda _, x: None)(call, x)
    if found is None:
        return None
    operands, pieces = found
    rows = prod(y.shape) // y.shape[-1]
    results = tuple(kind.shape[-1] for kind in call.outputs)
    return Columns(rows, operands, results, tuple(pieces), lanes)


Found = tuple[tuple[int, ...], list[Piece]]


def split(call: Call, x: TensorType) -> Found | None:
    if not is_last(call.attribute("axis", 0), x):
        return None
    sizes = [kind.shape[-1] for kind in call.outputs]
    starts = accumulate(sizes[:-1], initial=0)
    return x.shape[-1:], [(0, start, o, 0, n) for o, (start, n) in enumerate(zip(starts, sizes, strict=True))]


def concat(call: Call, x: TensorType) -> Found | None:
    kinds = [
        kind for kind in call.inputs if kind is not None and kind.dtype == "f32" and not (kind.constant or kind.tiled)
    ]
    if not is_last(call.attribute("axis", 0), x) or len(kinds) != len(call.inputs):
        return None
    sizes = tuple(kind.shape[-1] for kind in kinds)
    starts = accumulate(sizes[:-1], initial=0)
    return sizes, [(i, 0, 0, start, n) for i, (start, n) in enumerate(zip(starts, sizes, strict=True))]


def cut(call: Call, x: TensorType) -> Found | None:
    """Slice(x, starts, ends, axes[, steps]), of the last axis alone."""
    starts, axes, steps = (call.attribute(f"input.{i}") for i in (1, 3, 4))
    if starts is None or axes is None or len(axes) != 1 or not is_last(axes[0], x) or steps not in (None, (1,)):
        return None
    start = max(starts[0] + x.shape[-1], 0) if starts[0] < 0 else starts[0]
    return x.shape[-1:], [(0, start, 0, 0, call.outputs[0].shape[-1])]


def pick(call: Call, x: TensorType) -> Found | None:
    """Gather(x, i, axis=-2): a slice of the axis in front of the last, which a row has next to each other."""
    index, axis = call.attribute("input.1"), call.attribute("axis", 0)
    index = index[0] if isinstance(index, tuple) and len(index) == 1 else index
    if not isinstance(index, int) or len(x.shape) < 3 or axis % len(x.shape) != len(x.shape) - 2:
        return None
    n, size = x.shape[-2:]
    return (n * size,), [(0, index % n * size, 0, 0, size)]


def is_last(axis: int, x: TensorType) -> bool:
    return axis in (-1, len(x.shape) - 1)
