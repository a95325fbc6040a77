"""The operators that make one vector of a text out of those of its tokens.  __init__.py says what M and R are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from llmc.compiler.ops.define import Attributes, Dims, like_first, operator


@operator(like_first)
def PoolMean(op: Any, x: ir.Value) -> Any:
    """For each token the mean over it and all before it; so at a text's last token that over all of it.

    x [M, K] of one text, or [batch, M, K] -> like x.
    """
    along = op.Shape(x, start=-2, end=-1)
    count = op.Range(op.scalar(1), op.Add(op.Squeeze(along, op.ints(0)), op.scalar(1)), op.scalar(1))
    count = op.Unsqueeze(op.Cast(count, to=int(ir.DataType.FLOAT)), op.ints(1))
    return op.Div(op.CumSum(x, op.scalar(-2)), count)


@operator(like_first)
def PoolFirst(op: Any, x: ir.Value) -> Any:
    """For each token the first of its text.    x [M, K] of one text, or [batch, M, K] -> like x."""
    return op.Expand(op.Slice(x, op.ints(0), op.ints(1), op.ints(-2)), op.Shape(x))


def results(shapes: Sequence[Dims], _: Attributes) -> Sequence[Dims]:
    return [(shapes[2][0], shapes[0][1])]


@operator(results)
def PoolMeanRows(op: Any, x: ir.Value, positions: ir.Value, rows: ir.Value) -> Any:
    """PoolMean of some rows of a step whose texts are in it whole, each one's rows one behind the other.

    x [M, K], positions int64[M], rows int64[R] -> [R, K].
    """
    last = op.Unsqueeze(rows, op.ints(1))
    before = op.Unsqueeze(op.Gather(positions, rows, axis=0), op.ints(1))
    every = op.Range(op.scalar(0), op.Squeeze(op.Shape(x, start=0, end=1), op.ints(0)), op.scalar(1))
    own = op.And(op.GreaterOrEqual(every, op.Sub(last, before)), op.LessOrEqual(every, last))
    number = int(ir.DataType.FLOAT)
    count = op.Cast(op.Max(op.Add(before, op.scalar(1)), op.scalar(1)), to=number)
    return op.Div(op.MatMul(op.Cast(own, to=number), x), count)


@operator(results)
def PoolFirstRows(op: Any, x: ir.Value, positions: ir.Value, rows: ir.Value) -> Any:
    """PoolFirst of some rows of such a step.    x [M, K], positions int64[M], rows int64[R] -> [R, K]."""
    before = op.Max(op.Gather(positions, rows, axis=0), op.scalar(0))
    return op.Gather(x, op.Sub(rows, before), axis=0)


POOLS = ("PoolMean", "PoolFirst")
"""Over whole sequences; those of a step are called …Rows."""
