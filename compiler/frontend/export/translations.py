"""What torch.onnx.export is told of PyTorch's operators that it does not know, or writes badly: ONNX in their place."""

from __future__ import annotations

from math import pi, prod, sqrt
from typing import Any

import torch
from onnxscript import opset23 as op


def slice_scatter(x: Any, part: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    """x with `part` in the place of x[start:end:step] along `dim`, as a model has it that writes a tensor piece by
    piece: in ONNX what stands before the part, the part, and what stands behind it; with steps, a choice of both."""
    if step != 1:
        size = x.shape[dim]
        order = list(range(size))
        written = range(size)[slice(start, end, step)]
        order[written.start : written.stop : step] = range(size, size + len(written))
        both = op.Concat(x, part, axis=dim)
        return op.Gather(both, op.Constant(value_ints=order), axis=dim)
    pieces = [part]
    axis = op.Constant(value_ints=[dim])

    def cut(first: int, last: int) -> Any:
        return op.Slice(x, op.Constant(value_ints=[first]), op.Constant(value_ints=[last]), axis)

    if start:
        pieces.insert(0, cut(0, start))
    if end is not None and end < torch.iinfo(torch.int64).max:
        pieces.append(cut(end, torch.iinfo(torch.int64).max))
    return op.Concat(*pieces, axis=dim) if len(pieces) > 1 else op.Identity(part)


def erf_inv(x: Any) -> Any:
    """The inverse of the error function, as Gemma 3n makes a quantile of a constant, which folds it.

    Winitzki's approximation, right to 2e-3, then Newton's method, which squares the error: three steps are more than
    float32 holds.
    """

    def number(value: float) -> Any:
        return op.Constant(value_float=value)

    log = op.Log(op.Sub(number(1.0), op.Mul(x, x)))
    half = op.Add(number(2 / (pi * WINITZKI)), op.Div(log, number(2.0)))
    inner = op.Sqrt(op.Sub(op.Mul(half, half), op.Div(log, number(WINITZKI))))
    y = op.Mul(op.Sign(x), op.Sqrt(op.Sub(inner, half)))
    for _ in range(3):
        error = op.Sub(op.Erf(y), x)
        y = op.Sub(y, op.Mul(error, op.Mul(number(sqrt(pi) / 2), op.Exp(op.Mul(y, y)))))
    return y


def std(x: Any, dim: Any = None, correction: float | None = None, keepdim: bool = False) -> Any:
    """The root of the variance along axes of known size; torch.onnx's own form of it loses the shape."""
    axes = list(range(len(x.shape))) if dim is None else list(dim)
    count = prod(x.shape[axis] for axis in axes)
    along = op.Constant(value_ints=axes)
    error = op.Sub(x, op.ReduceMean(x, along, keepdims=1))
    variance = op.ReduceMean(op.Mul(error, error), along, keepdims=int(keepdim))
    corrected = 1 if correction is None else correction
    if corrected:
        variance = op.Mul(variance, op.Constant(value_float=count / (count - corrected)))
    return op.Sqrt(variance)


WINITZKI = 0.147
TRANSLATIONS: dict[Any, Any] = {
    torch.ops.aten.slice_scatter.default: slice_scatter,
    torch.ops.aten.std.correction: std,
    torch.ops.prims.erf_inv.default: erf_inv,
}
