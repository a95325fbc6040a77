"""What a token's adapter adds to a product: `LowRank`, and `LowRankGated{Silu|Gelu|GeluTanh}`, which ends in a gate.

    y[m] + B_e A_e x[m],  e = adapters[m]        where there is one: e from 0 on

The product y may be several that were joined, of `sizes` columns each: each has r rows of A of its own, and its own
columns in B. So a and b are as small as those of the parts together. M, N and K are as in ops/__init__.py. Hu et al.
2021, "LoRA", arXiv:2106.09685.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from llmc.compiler.ops.define import Attributes, Dims, define
from llmc.compiler.ops.linear import GATES, finish_gated, half

LOW_RANK = "LowRank"
INPUTS = ("y", "x", "adapters", "a", "b", "sizes")


def low_rank_name(activation: str = "") -> str:
    """`LowRank`, or `LowRankGated{Silu|Gelu|GeluTanh}`."""
    return f"{LOW_RANK}Gated{activation}" if activation else LOW_RANK


LOW_RANKS = {low_rank_name(activation): activation for activation in ("", *GATES)}
"""The activation of each operator's gate; "" where there is none."""


def changed(op: Any, y: ir.Value, x: ir.Value, adapters: ir.Value, a: ir.Value, b: ir.Value, sizes: ir.Value) -> Any:
    """y and what is added: every adapter for every token, where it is not the token's 0."""
    zero = op.scalar(0)

    def upto(length: ir.Value) -> Any:
        return op.Range(zero, op.Squeeze(length, op.ints(0)), op.scalar(1))

    ends = op.CumSum(sizes, zero)
    columns = op.Unsqueeze(upto(op.Shape(b, start=1, end=2)), op.ints(1))
    part = op.ReduceSum(op.Cast(op.GreaterOrEqual(columns, ends), to=int(ir.DataType.INT64)), op.ints(1))  # [N, 1]
    own = op.Unsqueeze(op.Equal(part, upto(op.Shape(sizes))), op.ints(2))  # [N, P, 1]
    spread = op.Where(own, op.Unsqueeze(b, op.ints(2)), op.scalar(0.0))  # [E, N, P, r]
    whole = op.Transpose(op.Reshape(spread, op.ints(0, 0, -1)), perm=[0, 2, 1])  # [E, P·r, N]
    added = op.MatMul(op.MatMul(x, op.Transpose(a, perm=[0, 2, 1])), whole)  # [E, M, N]
    is_own = op.Equal(op.Unsqueeze(upto(op.Shape(a, start=0, end=1)), op.ints(1)), adapters)  # [E, M]
    each = op.Where(op.Unsqueeze(is_own, op.ints(2)), added, op.scalar(0.0))
    return op.Add(y, op.ReduceSum(each, op.ints(0), keepdims=0))


def define_low_rank(name: str, activation: str) -> None:
    def body(op: Any, *inputs: ir.Value) -> Any:
        both = changed(op, *inputs)
        return finish_gated(activation)(op, both) if activation else both

    def shapes(s: Sequence[Dims], _: Attributes) -> Sequence[Dims]:
        return [(s[0][0], half(s[0][1])) if activation else s[0]]

    gated = f"{activation.lower()}(gate) · up of its halves; " * bool(activation)
    doc = (
        f"y[m] + B_e A_e x[m], e = adapters[m], y[m] where that is below 0; {gated}of y's P parts each has its own A "
        f"and columns of B.    y [M, N], x [M, K], adapters int64[M], a [E, P·r, K], b [E, N, r], sizes int64[P]: the "
        f"parts' columns -> [M, N{'/2' * bool(activation)}].    Hu et al. 2021, arXiv:2106.09685."
    )
    define(name, INPUTS, {}, body, shapes, doc)


for _name, _activation in LOW_RANKS.items():
    define_low_rank(_name, _activation)
