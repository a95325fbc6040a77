"""The operators of mixtures of experts: `Experts{Silu|Gelu|GeluTanh}`.  See ops.py for what M and K are."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from llmc.compiler.ops_define import define
from llmc.compiler.ops_linear import GATES, finish_gated


def experts_name(activation: str) -> str:
    """`Experts{Silu|Gelu|GeluTanh}`."""
    return f"Experts{activation}"


EXPERTS = {experts_name(activation): activation for activation in GATES}
"""The activation of each operator."""


def define_experts(activation: str) -> None:
    """Register the experts gated by one activation."""

    def body(op: Any, x: ir.Value, index: ir.Value, share: ir.Value, gate_up: ir.Value, down: ir.Value) -> Any:
        """Every expert for every token, weighted by 0 where it was not chosen: not how it is computed, but the same."""
        n_experts = op.Squeeze(op.Shape(down, start=0, end=1), op.ints(0))
        numbers = op.Range(op.scalar(0), n_experts, op.scalar(1))
        chosen = op.Equal(op.Unsqueeze(index, op.ints(2)), numbers)  # [M, k, E]
        each = op.Where(chosen, op.Unsqueeze(share, op.ints(2)), op.scalar(0.0))
        weights = op.Unsqueeze(op.Transpose(op.ReduceSum(each, op.ints(1), keepdims=0), perm=[1, 0]), op.ints(2))
        both = op.MatMul(x, op.Transpose(gate_up, perm=[0, 2, 1]))  # [E, M, 2N]
        inner = finish_gated(activation)(op, both)
        results = op.MatMul(inner, op.Transpose(down, perm=[0, 2, 1]))  # [E, M, K]
        return op.ReduceSum(op.Mul(results, weights), op.ints(0), keepdims=0)

    gate = f"{activation.lower()}(x Wgᵀ)"
    doc = (
        f"Σ_j share_j · (({gate} · (x Wuᵀ)) Wdᵀ), the sum over the k experts of a token, whose numbers `index` holds; "
        "[Wg; Wu] = gate_up and Wd = down of that expert.    x [M, K], index int64[M, k], share [M, k], "
        "gate_up [E, 2N, K], down [E, K, N] -> [M, K].    Shazeer et al. 2017, arXiv:1701.06538."
    )
    define(experts_name(activation), ["x", "index", "share", "gate_up", "down"], {}, body, lambda s, _: [s[0]], doc)


for _activation in EXPERTS.values():
    define_experts(_activation)
