"""What a token's adapter adds to a product: `LowRank`, and `LowRankGated{Silu|Gelu|GeluTanh}`, which ends in a gate.

    {RMSNorm|LayerNorm}? LowRank {{Strips}? Gated {Silu|Gelu|GeluTanh}}?

    y[m] + B_e A_e x[m],  e = adapters[m]        where there is one: e from 0 on

With a norm in front x is normalised first, as for the product; Strips: y's columns are gate and up in strips
(linear.py). Both are for GPUs. The product y may be several that were joined, of `sizes` columns each: each has r
rows of A of its own, and its own columns in B. So a and b are as small as those of the parts together. M, N and K are
as in ops/__init__.py. Hu et al. 2021, "LoRA", arXiv:2106.09685.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from llmc.compiler.ops.define import ATTRIBUTE_TYPES, Attributes, Dims, define
from llmc.compiler.ops.linear import GATES, NORMS, STANDARD_NORMS, finish_gated, half, out_of_strips

LOW_RANK = "LowRank"
INPUTS = ("y", "x", "adapters", "a", "b", "sizes")


def low_rank_name(activation: str = "", norm: str = "", *, strips: bool = False) -> str:
    """`[RMSNorm|LayerNorm]LowRank`, or `[RMSNorm|LayerNorm]LowRank[Strips]Gated{Silu|Gelu|GeluTanh}`."""
    gate = f"{'Strips' * strips}Gated{activation}" if activation else ""
    return f"{norm}{LOW_RANK}{gate}"


@dataclass(frozen=True)
class LowRankParts:
    """What an operator's name says.  activation: of the gate; "" where there is none.  norm: of x; "" likewise."""

    activation: str
    norm: str = ""
    strips: bool = False

    @property
    def name(self) -> str:
        return low_rank_name(self.activation, self.norm, strips=self.strips)


LOW_RANKS = {
    parts.name: parts
    for norm in ("", *NORMS)
    for activation in ("", *GATES)
    for strips in (False, True)[: 1 + bool(activation)]
    for parts in [LowRankParts(activation, norm, strips)]
}


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


def define_low_rank(name: str, parts: LowRankParts) -> None:
    activation, vectors = parts.activation, NORMS.get(parts.norm, ())

    def body(op: Any, y: ir.Value, x: ir.Value, *rest: ir.Value, **settings: Any) -> Any:
        if parts.norm:
            x = getattr(op, STANDARD_NORMS[parts.norm])(x, *rest[: len(vectors)], axis=-1, **settings)
        y = out_of_strips(op, y) if parts.strips else y
        both = changed(op, y, x, *rest[len(vectors) :])
        return finish_gated(activation)(op, both) if activation else both

    def shapes(s: Sequence[Dims], _: Attributes) -> Sequence[Dims]:
        return [(s[0][0], half(s[0][1])) if activation else s[0]]

    gated = f"{activation.lower()}(gate) · up of its {'strips' if parts.strips else 'halves'}; " * bool(activation)
    normed = f"{parts.norm}(x) in the place of x; " * bool(parts.norm)
    doc = (
        f"y[m] + B_e A_e x[m], e = adapters[m], y[m] where that is below 0; {normed}{gated}of y's P parts each has its "
        f"own A and columns of B.    y [M, N], x [M, K]{''.join(f', {vector} [K]' for vector in vectors)}, adapters "
        f"int64[M], a [E, P·r, K], b [E, N, r], sizes int64[P]: the parts' columns "
        f"-> [M, N{'/2' * bool(activation)}].    Hu et al. 2021, arXiv:2106.09685."
    )
    inputs = (*INPUTS[:2], *vectors, *INPUTS[2:])
    define(name, inputs, {"epsilon": ATTRIBUTE_TYPES["float"]} if parts.norm else {}, body, shapes, doc)


for _name, _parts in LOW_RANKS.items():
    define_low_rank(_name, _parts)
