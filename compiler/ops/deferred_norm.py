"""A norm between two products, deferred: the first prepares it, the second applies it to its sums.

    Linear{Bias}?Residual{Tile}?Moments                       y, scaled = y ∘ g, and moments of y's parts
    Deferred{RMSNorm|LayerNorm}Linear{Bias}?{activation}?     what the operator without "Deferred" gives, from those
    Deferred{RMSNorm|LayerNorm}GatedLinear{activation}{Bias}?
    Deferred{RMSNorm|LayerNorm}LinearStrips{Bias}?

A norm multiplies a row by one number 1/d (and takes the mean away), and so may the sums of the product behind it:

    RMS      norm(y) Wᵀ         =  (scaled Wᵀ) / d
    layer    norm(y) Wᵀ + bias  =  (scaled Wᵀ - mean · (W g)) / d + (W b + bias)        folded = [W g; W b + bias]

moments [N/16, M, 2]: of each 16 columns of y their mean, and the sum of the squared differences from it; TileMoments
are those of each 64, [N/64, M, 2].  The deferred operators take them of parts of any width, all alike.  They also take
y, the norm's weights and the bias: where a schedule gains nothing by the rest, it does without `scaled`, `moments` and
`folded`.  See linear.py for all else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import onnx_ir as ir

from llmc.compiler.kernel import PART_COLUMNS, TILE_COLUMNS
from llmc.compiler.ops.define import ATTRIBUTE_TYPES, Attributes, Dim, Dims, define
from llmc.compiler.ops.linear import (
    ACTIVATIONS,
    GATES,
    NORMS,
    finish_gated,
    full,
    gated_linear_name,
    half,
    in_strips,
    linear_name,
    normed_name,
    strips_name,
)


def moments_name(product: str, columns: int = PART_COLUMNS) -> str:
    """`Linear{Bias}?Residual{Tile}?Moments`: a product that prepares the norm behind it.  columns: of a part."""
    return f"{product}{'Tile' * (columns == TILE_COLUMNS)}Moments"


def deferred_name(product: str) -> str:
    """`DeferredRMSNormLinear…`: a product that applies the norm in front of it to its sums."""
    return f"Deferred{product}"


# -- definitions ---------------------------------------------------------------------------------------------------


def moments(op: Any, y: ir.Value, columns: int) -> ir.Value:
    """[N/columns, M, 2] of y [M, N]."""
    parts = op.Reshape(y, op.ints(0, -1, columns))
    mean = op.ReduceMean(parts, op.ints(-1), keepdims=1)
    difference = op.Sub(parts, mean)
    squares = op.ReduceSum(op.Mul(difference, difference), op.ints(-1), keepdims=1)
    result: ir.Value = op.Transpose(op.Concat(mean, squares, axis=-1), perm=[1, 0, 2])
    return result


def mean_and_factor(
    op: Any, norm: str, scaled: ir.Value, moments: ir.Value, epsilon: Any
) -> tuple[ir.Value | None, ir.Value]:
    """For each row, [M, 1]: the mean that is taken away, None for RMSNorm, and 1/d."""
    columns = op.Div(op.Shape(scaled, start=1), op.Shape(moments, start=0, end=1))  # of a part
    means, squares = op.Split(moments, axis=-1, num_outputs=2, n_results=2)
    mean = None if norm == "RMSNorm" else op.ReduceMean(means, op.ints(0), keepdims=0)
    from_mean = means if mean is None else op.Sub(means, mean)
    each = op.Add(op.Div(squares, op.Cast(columns, to=int(ir.DataType.FLOAT))), op.Mul(from_mean, from_mean))
    variance = op.ReduceMean(each, op.ints(0), keepdims=0)
    return mean, op.Reciprocal(op.Sqrt(op.Add(variance, op.scalar(epsilon))))


def define_moments(bias: bool, columns: int) -> None:
    name = linear_name(bias, "", residual=True)

    def body(op: Any, x: ir.Value, weight: ir.Value, *rest: ir.Value) -> Any:
        *biases, residual, norm_weight = rest
        y = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
        y = op.Add(op.Add(y, *biases) if biases else y, residual)
        return y, op.Mul(y, norm_weight), moments(op, y, columns)

    def shapes(s: Sequence[Dims], _: Attributes) -> Sequence[Dims]:
        m, n = s[0][0], s[1][0]
        assert isinstance(n, int)
        return [(m, n), (m, n), (n // columns, m, 2)]

    inputs = ["x", "weight", *["bias"] * bias, "residual", "norm_weight"]
    doc = (
        f"y = {name}, y ∘ norm_weight, moments of y.    x [M, K], W [N, K], norm_weight [N], N a multiple of "
        f"{columns} -> [M, N], [M, N], [N/{columns}, M, 2]."
    )
    define(moments_name(name, columns), inputs, {}, body, shapes, doc)


def define_deferred(norm: str, name: str, bias: bool, finish: Callable[..., Any], width: Callable[[Dim], Dim]) -> None:
    """name: of the product; finish(op, sums): what follows bias."""
    parameters = NORMS[norm]
    weight_at = 1 + len(parameters)

    def body(op: Any, *inputs: ir.Value, epsilon: Any) -> Any:
        rest = list(inputs[weight_at + 1 + bias :])
        mean, factor = mean_and_factor(op, norm, rest[0], rest[1], epsilon)
        sums = op.MatMul(rest[0], op.Transpose(inputs[weight_at], perm=[1, 0]))
        if mean is None:
            sums = op.Mul(sums, factor)
            return finish(op, op.Add(sums, inputs[weight_at + 1]) if bias else sums)
        weight_sums, shift = op.Split(rest[2], axis=0, num_outputs=2, n_results=2)
        return finish(op, op.Add(op.Mul(op.Sub(sums, op.Mul(mean, weight_sums)), factor), shift))

    folded = norm == "LayerNorm"
    define(
        deferred_name(normed_name(norm, name)),
        ["x", *parameters, "weight", *["bias"] * bias, "scaled", "moments", *["folded"] * folded],
        {"epsilon": ATTRIBUTE_TYPES["float"]},
        body,
        lambda s, _: [(*s[0][:-1], width(s[weight_at][0]))],
        f"{norm}(x), then {name}, where scaled = x ∘ norm_weight [M, K], moments are those of parts of x [parts, M, 2]"
        f"{', and folded [2, rows of W] = [W norm_weight; W norm_bias + bias]' * folded}.    -> [M, N].",
    )


for _columns, _bias in product((PART_COLUMNS, TILE_COLUMNS), (False, True)):
    define_moments(_bias, _columns)
for _norm in NORMS:
    for _activation, _bias in product(ACTIVATIONS, (False, True)):
        define_deferred(_norm, linear_name(_bias, _activation), _bias, ACTIVATIONS[_activation], full)
    for _activation, _bias in product(GATES, (False, True)):
        define_deferred(_norm, gated_linear_name(_activation, _bias), _bias, finish_gated(_activation), half)
    for _bias in (False, True):
        define_deferred(_norm, strips_name(_bias), _bias, in_strips, full)
