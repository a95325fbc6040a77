"""Norms with what stands beside them in one pass over a row, and the activation that ONNX has no operator for.
__init__.py says what M and K are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from llmc.compiler.ops.define import Attributes, Dims, like_first, operator


def two_like_first(shapes: Sequence[Dims], _: Attributes) -> Sequence[Dims]:
    return [shapes[0], shapes[0]]


@operator(like_first)
def Silu(op: Any, x: ir.Value) -> Any:
    """x · sigmoid(x).    x any shape.    Elfwing et al. 2017, arXiv:1702.03118."""
    return op.Mul(x, op.Sigmoid(x))


@operator(two_like_first)
def AddRMSNorm(op: Any, x: ir.Value, residual: ir.Value, weight: ir.Value, *, epsilon: float) -> Any:
    """sum = x + residual; normed = sum / sqrt(mean(sum²) + epsilon) · weight.

    x, residual [M, K], weight [K] -> sum, normed [M, K].    Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    total = op.Add(x, residual)
    return total, op.RMSNormalization(total, weight, axis=-1, epsilon=epsilon)


@operator(two_like_first)
def AddLayerNorm(op: Any, x: ir.Value, residual: ir.Value, weight: ir.Value, bias: ir.Value, *, epsilon: float) -> Any:
    """sum = x + residual; normed = (sum - mean(sum)) / sqrt(var(sum) + epsilon) · weight + bias.

    x, residual [M, K], weight, bias [K] -> sum, normed [M, K].    Ba et al. 2016, arXiv:1607.06450.
    """
    total = op.Add(x, residual)
    return total, op.LayerNormalization(total, weight, bias, axis=-1, epsilon=epsilon)


@operator(like_first)
def GatedRMSNorm(op: Any, x: ir.Value, z: ir.Value, weight: ir.Value, *, epsilon: float) -> Any:
    """RMSNorm(x) · silu(z), silu(z) = z · sigmoid(z).    x, z [M, …, K], weight [K] -> like x."""
    normed = op.RMSNormalization(x, weight, axis=-1, epsilon=epsilon)
    return op.Mul(normed, op.Mul(z, op.Sigmoid(z)))


@operator(like_first)
def QueryKeyRMSNorm(op: Any, qkv: ir.Value, query_norm: ir.Value, key_norm: ir.Value, *, epsilon: float) -> Any:
    """The first A columns of each row, and the next B, by RMSNorm over all of them; the rest as it is.

    qkv [M, C], query_norm [A], key_norm [B] -> like qkv.    As OLMo 2 has it: all heads together.
    """
    queries, keys = op.Shape(query_norm), op.Shape(key_norm)
    values = op.Sub(op.Shape(qkv, start=1), op.Add(queries, keys))
    q, k, v = op.Split(qkv, op.Concat(queries, keys, values, axis=0), axis=1, n_results=3)
    normed = (op.RMSNormalization(x, w, axis=-1, epsilon=epsilon) for x, w in ((q, query_norm), (k, key_norm)))
    return op.Concat(*normed, v, axis=1)
