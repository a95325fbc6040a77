"""The operators of attention over a whole sequence.  __init__.py says what M, H, KH and D are; DV: elements of a value,
in most models D."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from llmc.compiler.ops.attention_parts import attend, attend_rows, biases_by_distance, in_sight, linear_bias, near
from llmc.compiler.ops.define import DOMAIN, Attributes, Dims, like_first, operator


def causal_results(shapes: Sequence[Dims], attributes: Attributes) -> Sequence[Dims]:
    values = shapes[2][1]
    assert isinstance(values, int)
    return [(shapes[0][0], attributes["num_heads"] * values // attributes["kv_num_heads"])]


@operator(causal_results)
def CausalAttention(
    op: Any,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    *,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
    softcap: float,
    window: int,
    layer: int,
) -> Any:
    """Attention over one sequence of M tokens, before it has a KV cache.

    Row i attends rows j <= i, and of them those that are in_sight: of a window, or of its own chunk.
    q [M, H·D], k [M, KH·D], v [M, KH·DV] -> [M, H·DV]; see `attend` for the equation.
    """
    return attend_rows(op, q, k, v, (num_heads, kv_num_heads), scale, softcap, window)


@operator(causal_results)
def SinkCausalAttention(
    op: Any,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    sinks: ir.Value,
    *,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
    softcap: float,
    window: int,
    layer: int,
) -> Any:
    """CausalAttention with one more score for each head, which no key has: exp of it joins the softmax's denominator.

    q [M, H·D], k [M, KH·D], v [M, KH·DV], sinks [H] -> [M, H·DV].    Xiao et al. 2023, arXiv:2309.17453.
    """
    return attend_rows(op, q, k, v, (num_heads, kv_num_heads), scale, softcap, window, sinks)


@operator(like_first)
def AlibiCausalAttention(
    op: Any,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    slopes: ir.Value,
    *,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
    softcap: float,
    window: int,
    layer: int,
) -> Any:
    """CausalAttention whose scores, of row i and row j, have slope · (j - i) added, each head its own.

    q [M, H·D], k, v [M, KH·D], slopes [H] -> [M, H·D].    Press et al. 2021, arXiv:2108.12409.
    """
    return attend_rows(op, q, k, v, (num_heads, kv_num_heads), scale, softcap, window, slopes=slopes)


@operator(causal_results)
def BidirectionalAttention(
    op: Any,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    *,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
    softcap: float,
    window: int,
    layer: int,
) -> Any:
    """Attention of an encoder over one sequence of M tokens: row i attends all rows, or those with |j - i| < window.

    q [M, H·D], k [M, KH·D], v [M, KH·DV] -> [M, H·DV]; see `attend` for the equation.
    Devlin et al. 2018, arXiv:1810.04805.
    """
    return attend_rows(op, q, k, v, (num_heads, kv_num_heads), scale, softcap, window, both_ways=True)


@operator(causal_results)
def DistanceBidirectionalAttention(
    op: Any,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    biases: ir.Value,
    *,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
    softcap: float,
    window: int,
    layer: int,
) -> Any:
    """BidirectionalAttention whose scores, of row i and row j, have biases[h, C + j - i] added.

    q [M, H·D], k [M, KH·D], v [M, KH·DV], biases [H, 2 C], M <= C -> [M, H·DV].    Shaw et al. 2018, arXiv:1803.02155.
    """
    return attend_rows(op, q, k, v, (num_heads, kv_num_heads), scale, softcap, window, biases=biases, both_ways=True)


WHOLE_ATTENTION = tuple(f"{DOMAIN}.{kind}BidirectionalAttention" for kind in ("", "Distance"))
"""Attention in which tokens see what is behind them; biases are the input behind q, k and v."""
CAUSAL_ATTENTION = tuple(f"{DOMAIN}.{kind}CausalAttention" for kind in ("", "Sink", "Alibi"))
"""The operators of attention before there is a cache, with their domain, in which tokens see what is before them;
sinks, or slopes, are the input behind q, k and v."""
SEQUENCE_ATTENTION = (*CAUSAL_ATTENTION, *WHOLE_ATTENTION)
"""All of them."""


def attend_batch(
    op: Any, q: Any, k: Any, v: Any, of_heads: Any, scale: Any, softcap: Any, window: Any, *, are_slopes: bool = False
) -> Any:
    """Each sequence of a batch by itself, with sinks or slopes [H]."""
    length = op.Squeeze(op.Shape(q, start=2, end=3), op.ints(0))
    rows = op.Range(op.scalar(0), length, op.scalar(1))
    own = op.Unsqueeze(rows, op.ints(1))
    visible = in_sight(op, rows, own, window)
    groups = op.Div(op.Shape(q, start=1, end=2), op.Shape(k, start=1, end=2))
    in_groups = op.Concat(op.ints(-1), groups, op.ints(0, 0), axis=0)  # [B·KH, H/KH, M, D]
    each = op.Unsqueeze(of_heads, op.ints(1, 2))
    each = op.Expand(each, op.Concat(op.Shape(q, start=0, end=1), op.ints(1, 1, 1), axis=0))
    queries, each = op.Reshape(q, in_groups), op.Reshape(each, in_groups)
    keys, values = (op.Reshape(x, op.ints(-1, 1, 0, 0)) for x in (k, v))
    more = {"bias": linear_bias(op, each, rows, own)} if are_slopes else {"sinks": each}
    out = attend(op, queries, keys, values, visible, scale, softcap, **more)
    return op.Reshape(out, op.Concat(op.Shape(q, start=0, end=3), op.ints(-1), axis=0))


def batch_results(shapes: Sequence[Dims], _: Attributes) -> Sequence[Dims]:
    return [(*shapes[0][:3], shapes[2][3])]


@operator(batch_results)
def SinkAttention(
    op: Any, q: ir.Value, k: ir.Value, v: ir.Value, sinks: ir.Value, *, scale: float, softcap: float, window: int
) -> Any:
    """SinkCausalAttention as models are exported: over a batch, where it is over [M, H·D] of one sequence.

    q [B, H, M, D], k [B, KH, M, D], v [B, KH, M, DV], sinks [H] -> [B, H, M, DV].
    """
    return attend_batch(op, q, k, v, sinks, scale, softcap, window)


@operator(like_first)
def AlibiAttention(
    op: Any, q: ir.Value, k: ir.Value, v: ir.Value, slopes: ir.Value, *, scale: float, softcap: float, window: int
) -> Any:
    """AlibiCausalAttention over a batch, where it is over [M, H·D] of one sequence.

    q [B, H, M, D], k, v [B, KH, M, D], slopes [H] -> [B, H, M, D].
    """
    return attend_batch(op, q, k, v, slopes, scale, softcap, window, are_slopes=True)


@operator(batch_results)
def DistanceAttention(
    op: Any, q: ir.Value, k: ir.Value, v: ir.Value, biases: ir.Value, *, scale: float, softcap: float
) -> Any:
    """DistanceBidirectionalAttention over a batch, where it is over [M, H·D] of one sequence, and of no window.

    q [B, H, M, D], k [B, KH, M, D], v [B, KH, M, DV], biases [H, 2 C] -> [B, H, M, DV].
    """
    rows = op.Range(op.scalar(0), op.Squeeze(op.Shape(q, start=2, end=3), op.ints(0)), op.scalar(1))
    own = op.Unsqueeze(rows, op.ints(1))
    bias = biases_by_distance(op, biases, rows, own)  # [H, M, M]
    bias = op.Expand(bias, op.Concat(op.Shape(q, start=0, end=1), op.Shape(bias), axis=0))
    groups = op.Div(op.Shape(q, start=1, end=2), op.Shape(k, start=1, end=2))
    in_groups = op.Concat(op.ints(-1), groups, op.ints(0, 0), axis=0)  # [B·KH, H/KH, M, …]
    queries, bias = op.Reshape(q, in_groups), op.Reshape(bias, in_groups)
    keys, values = (op.Reshape(x, op.ints(-1, 1, 0, 0)) for x in (k, v))
    out = attend(op, queries, keys, values, near(op, rows, own, 0), scale, softcap, bias=bias)
    return op.Reshape(out, op.Concat(op.Shape(q, start=0, end=3), op.ints(-1), axis=0))
