"""Rows in the place of tokens that go into later layers too, whose results they add to: n K numbers a row.

TakeFirst       a step's rows where tokens have their embeddings: each its token's, or the first K numbers of one given
Deepened        where a model has a layer's results, and would add what such rows have for it
AddGiven        a step's rows there
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from llmc.compiler.ops.define import like_first, operator

DEEPENED, TAKE_FIRST, ADD_GIVEN = "Deepened", "TakeFirst", "AddGiven"
DEEP = "llmc.deep"
"""In the metadata of a tower's graph: a picture's rows go into later layers of the text too."""


def part_of(op: Any, x: ir.Value, given: ir.Value, part: Any) -> Any:
    """Columns part K to (part + 1) K of given [M, n K], K being the columns of x."""
    columns = op.Shape(x, start=1, end=2)
    start = op.Mul(op.ints(part), columns)
    return op.Slice(given, start, op.Add(start, columns), op.ints(1))


def mark_of(op: Any, is_given: ir.Value) -> Any:
    """bool [M, 1] of int64 [M]."""
    return op.Cast(op.Unsqueeze(is_given, op.ints(1)), to=int(ir.DataType.BOOL))


@operator(like_first)
def TakeFirst(op: Any, x: ir.Value, is_given: ir.Value, given: ir.Value) -> Any:
    """given[m, :K] where is_given[m] is not 0, else x[m].    x [M, K], given [M, n K], is_given int64[M] -> [M, K]."""
    return op.Where(mark_of(op, is_given), part_of(op, x, given, 0), x)


@operator(like_first)
def Deepened(op: Any, x: ir.Value, *, part: int) -> Any:
    """x, which is what a layer makes.    x [M, K], or [batch, sequence, K] -> like x.

    part: of rows that stand for tokens, what they add to it; counted from 1, for 0 is in place of an embedding.
    """
    return op.Identity(x)


@operator(like_first)
def AddGiven(op: Any, x: ir.Value, is_given: ir.Value, given: ir.Value, *, part: int) -> Any:
    """x[m] + given[m, part K : (part + 1) K] where is_given[m] is not 0, else x[m].

    x [M, K], given [M, n K], is_given int64[M] -> [M, K].    Meng et al. 2024, arXiv:2406.04334.
    """
    return op.Where(mark_of(op, is_given), op.Add(x, part_of(op, x, given, part)), x)
