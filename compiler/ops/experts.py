"""The operators of mixtures of experts: `Experts{Silu|Gelu|GeluTanh}[Residual]`, `ExpertsClampedSwish[Bias][Residual]`.

See __init__.py for what M and K are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from llmc.compiler.ops.define import ATTRIBUTE_TYPES, define
from llmc.compiler.ops.linear import GATES, finish_gated


def experts_name(activation: str) -> str:
    """`Experts{Silu|Gelu|GeluTanh}`."""
    return f"Experts{activation}"


EXPERTS = {experts_name(activation): activation for activation in GATES}
"""The activation of each operator."""


RESIDUAL_EXPERTS = {f"{name}Residual": activation for name, activation in EXPERTS.items()}
"""The same with a residual that is added to the sum."""


def clamped_experts_name(bias: bool) -> str:
    """`ExpertsClampedSwish[Bias]`."""
    return f"ExpertsClampedSwish{'Bias' * bias}"


CLAMPED_EXPERTS = {clamped_experts_name(bias): bias for bias in (False, True)}
"""The operators whose gate and up are clamped; whether the experts have biases."""
RESIDUAL_CLAMPED_EXPERTS = {f"{name}Residual": bias for name, bias in CLAMPED_EXPERTS.items()}
"""The same with a residual that is added to the sum."""
CLAMP = ("alpha", "limit", "offset")
"""Attributes of theirs: see `define_clamped_experts`."""

OF_EXPERTS = (
    "the sum over the k experts of a token, whose numbers `index` holds; [Wg; Wu] = gate_up and Wd = down of that"
)
SHAPES = "x [M, K], index int64[M, k], share [M, k], gate_up [E, 2N, K], down [E, K, N]"
SHAZEER = "Shazeer et al. 2017, arXiv:1701.06538."


def mixture(op: Any, inputs: list[ir.Value], gate: Callable[[ir.Value], Any], biases: tuple[ir.Value, ...] = ()) -> Any:
    """Every expert for every token, weighted by 0 where it was not chosen: kernels compute the same sum otherwise.

    inputs: x, index, share, gate_up and down.  biases: of both products, [E, 2N] and [E, K], or none."""
    x, index, share, gate_up, down = inputs
    n_experts = op.Squeeze(op.Shape(down, start=0, end=1), op.ints(0))
    numbers = op.Range(op.scalar(0), n_experts, op.scalar(1))
    chosen = op.Equal(op.Unsqueeze(index, op.ints(2)), numbers)  # [M, k, E]
    each = op.Where(chosen, op.Unsqueeze(share, op.ints(2)), op.scalar(0.0))
    weights = op.Unsqueeze(op.Transpose(op.ReduceSum(each, op.ints(1), keepdims=0), perm=[1, 0]), op.ints(2))
    of_up, of_down = (op.Unsqueeze(bias, op.ints(1)) for bias in biases) if biases else (None, None)
    both = op.MatMul(x, op.Transpose(gate_up, perm=[0, 2, 1]))  # [E, M, 2N]
    inner = gate(op.Add(both, of_up) if biases else both)
    results = op.MatMul(inner, op.Transpose(down, perm=[0, 2, 1]))  # [E, M, K]
    results = op.Add(results, of_down) if biases else results
    return op.ReduceSum(op.Mul(results, weights), op.ints(0), keepdims=0)


def define_experts(name: str, activation: str, residual: bool) -> None:
    """Register the experts gated by one activation."""

    def body(op: Any, *inputs: ir.Value) -> Any:
        y = mixture(op, list(inputs[:5]), lambda both: finish_gated(activation)(op, both))
        return op.Add(y, inputs[5]) if residual else y

    added, shape = (" + residual", ", residual [M, K]") if residual else ("", "")
    doc = (
        f"Σ_j share_j · (({activation.lower()}(x Wgᵀ) · (x Wuᵀ)) Wdᵀ){added}, {OF_EXPERTS} expert.    "
        f"{SHAPES}{shape} -> [M, K].    {SHAZEER}"
    )
    inputs = ["x", "index", "share", "gate_up", "down", *["residual"] * residual]
    define(name, inputs, {}, body, lambda s, _: [s[0]], doc)


def define_clamped_experts(name: str, bias: bool, residual: bool) -> None:
    """Register experts gated by g · sigmoid(alpha g) · (u + offset), g = min(gate, limit), u = up within ±limit."""

    def body(op: Any, *inputs: ir.Value, alpha: Any, limit: Any, offset: Any) -> Any:
        def gate(both: ir.Value) -> Any:
            gate, up = op.Split(both, axis=-1, num_outputs=2, n_results=2)
            most = op.scalar(limit)
            gate, up = op.Min(gate, most), op.Max(op.Min(up, most), op.Neg(most))
            swish = op.Mul(gate, op.Sigmoid(op.Mul(gate, op.scalar(alpha))))
            return op.Mul(swish, op.Add(up, op.scalar(offset)))

        y = mixture(op, list(inputs[:5]), gate, inputs[5 : 5 + 2 * bias])
        return op.Add(y, inputs[-1]) if residual else y

    added, shape = (" + residual", ", residual [M, K]") if residual else ("", "")
    of = ("(x Wgᵀ + bg)", "(x Wuᵀ + bu)", "Wdᵀ + bd") if bias else ("x Wgᵀ", "x Wuᵀ", "Wdᵀ")
    doc = (
        f"Σ_j share_j · ((g · sigmoid(alpha g) · (u + offset)) {of[2]}){added}, g = min({of[0]}, limit), "
        f"u = max(min({of[1]}, limit), -limit), {OF_EXPERTS}{', [bg; bu] = gate_up_bias and bd = down_bias' * bias} "
        f"expert.    {SHAPES}{', gate_up_bias [E, 2N], down_bias [E, K]' * bias}{shape} -> [M, K].    {SHAZEER}"
    )
    inputs = ["x", "index", "share", "gate_up", "down", *["gate_up_bias", "down_bias"] * bias, *["residual"] * residual]
    attributes = dict.fromkeys(CLAMP, ATTRIBUTE_TYPES["float"])
    define(name, inputs, attributes, body, lambda s, _: [s[0]], doc)


for _name, _activation in (EXPERTS | RESIDUAL_EXPERTS).items():
    define_experts(_name, _activation, residual=_name in RESIDUAL_EXPERTS)
for _name, _bias in (CLAMPED_EXPERTS | RESIDUAL_CLAMPED_EXPERTS).items():
    define_clamped_experts(_name, _bias, residual=_name in RESIDUAL_CLAMPED_EXPERTS)
