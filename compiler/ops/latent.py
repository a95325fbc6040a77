"""The operators of multi-head latent attention, in which all heads share one key and value: the latent of a token.

L: elements of a latent; RD: of the part of a key that is turned; N: of a query head in front of its turned part.
DeepSeek-AI 2024, arXiv:2405.04434.  See __init__.py for M, P and H.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from llmc.compiler.ops.attention_parts import append, attend, in_sight, own_pages, page_slots
from llmc.compiler.ops.define import Attributes, Dims, operator
from llmc.compiler.ops.rotary import Rotary

LATENT_ATTENTION = "LatentPagedAttention"


def of_heads(shapes: Sequence[Dims], attributes: Attributes) -> Sequence[Dims]:
    heads, n = shapes[1][:2]
    assert isinstance(heads, int)
    assert isinstance(n, int)
    return [(shapes[0][0], heads * n)]


@operator(of_heads)
def HeadProduct(op: Any, x: ir.Value, weight: ir.Value) -> Any:
    """Each head of x by a matrix of its own: y_h = (the first K elements of x_h) W_hᵀ.

    x [M, H·X], weight [H, N, K], K <= X -> [M, H·N].
    """
    n_heads, k = (op.Shape(weight, start=axis, end=axis + 1) for axis in (0, 2))
    heads = op.Reshape(x, op.Concat(op.ints(0), n_heads, op.ints(-1), axis=0))
    rows = op.Unsqueeze(op.Slice(heads, op.ints(0), k, op.ints(2)), op.ints(2))  # [M, H, 1, K]
    return op.Reshape(op.MatMul(rows, op.Transpose(weight, perm=[0, 2, 1])), op.ints(0, -1))


def latent_results(shapes: Sequence[Dims], attributes: Attributes) -> Sequence[Dims]:
    return [(shapes[0][0], attributes["num_heads"] * attributes["latent_dim"]), *shapes[-2:]]


def queries_and_keys(
    op: Any, q: Any, absorbed: Any, kv: Any, norm: Any, cos: Any, sin: Any, sizes: tuple[Any, ...], epsilon: Any
) -> Any:
    """Queries [M, H, L + RD], latents [M, L], turned parts of keys [M, RD]."""
    num_heads, head_dim, latent_dim, rotary_dim, interleaved = sizes
    heads = op.Reshape(q, op.ints(0, num_heads, head_dim))
    straight = op.Sub(op.scalar(head_dim), op.scalar(rotary_dim))
    turning = op.Slice(heads, op.ints(straight), op.ints(head_dim), op.ints(2))
    how = {"rotary_dim": rotary_dim, "interleaved": interleaved}
    turned = Rotary(op, op.Reshape(turning, op.ints(0, -1)), cos, sin, num_heads=num_heads, **how)
    parts = [op.Reshape(x, op.ints(0, num_heads, -1)) for x in (absorbed, turned)]
    latent, rest = op.Split(kv, op.ints(latent_dim, rotary_dim), axis=1, n_results=2)
    latent = op.RMSNormalization(latent, norm, axis=-1, epsilon=epsilon)
    return op.Concat(*parts, axis=2), latent, Rotary(op, rest, cos, sin, num_heads=1, **how)


@operator(lambda shapes, attributes: latent_results(shapes, attributes)[:1])
def CausalLatentAttention(
    op: Any,
    q: ir.Value,
    absorbed: ir.Value,
    kv: ir.Value,
    norm: ir.Value,
    cos: ir.Value,
    sin: ir.Value,
    *,
    num_heads: int,
    head_dim: int,
    latent_dim: int,
    rotary_dim: int,
    interleaved: int,
    epsilon: float,
    scale: float,
    softcap: float,
    window: int,
    layer: int,
) -> Any:
    """Attention over one sequence of M tokens, before it has a KV cache.

    A token's key is its latent, the first L columns of kv normalised (RMSNorm), and behind it the rest of kv turned by
    Rotary; its value is its latent.  A query is what `absorbed` has of its head, and the last RD elements of its head
    of q, turned.  q [M, H·(N + RD)], absorbed [M, H·L], kv [M, L + RD], norm [L], cos, sin [M, RD/2] -> [M, H·L].
    """
    sizes = num_heads, head_dim, latent_dim, rotary_dim, interleaved
    queries, latent, turned = queries_and_keys(op, q, absorbed, kv, norm, cos, sin, sizes, epsilon)
    length = op.Squeeze(op.Shape(q, start=0, end=1), op.ints(0))
    rows = op.Range(op.scalar(0), length, op.scalar(1))
    visible = in_sight(op, rows, op.Unsqueeze(rows, op.ints(1)), window)
    keys = op.Concat(latent, turned, axis=1)
    keys, values = (op.Unsqueeze(x, op.ints(0, 1)) for x in (keys, latent))
    queries = op.Unsqueeze(op.Transpose(queries, perm=[1, 0, 2]), op.ints(0))  # [1, H, M, L + RD]
    out = attend(op, queries, keys, values, visible, scale, softcap)
    return op.Reshape(op.Transpose(op.Squeeze(out, op.ints(0)), perm=[1, 0, 2]), op.ints(0, -1))


@operator(latent_results)
def LatentPagedAttention(
    op: Any,
    q: ir.Value,
    absorbed: ir.Value,
    kv: ir.Value,
    norm: ir.Value,
    cos: ir.Value,
    sin: ir.Value,
    positions: ir.Value,
    page_table: ir.Value,
    k_cache: ir.Value,
    v_cache: ir.Value,
    *,
    num_heads: int,
    head_dim: int,
    latent_dim: int,
    rotary_dim: int,
    interleaved: int,
    epsilon: float,
    scale: float,
    softcap: float,
    window: int,
    layer: int,
) -> Any:
    """CausalLatentAttention for rows of any sequences: a token's turned part of the key and its latent go to the pages
    as those of PagedAttention do, and each row attends its own pages.

    positions int64[M], page_table int64[M, P], k_cache [n_pages, 1, 64, RD], v_cache [n_pages, 1, 64, L]
    -> [M, H·L] and both caches.
    """
    sizes = num_heads, head_dim, latent_dim, rotary_dim, interleaved
    queries, latent, turned = queries_and_keys(op, q, absorbed, kv, norm, cos, sin, sizes, epsilon)
    real, at, slot = page_slots(op, positions, page_table)
    k_cache = append(op, k_cache, turned, slot, real, 1, rotary_dim)
    v_cache = append(op, v_cache, latent, slot, real, 1, latent_dim)
    pages = op.Max(page_table, op.scalar(0))
    rest, values = (own_pages(op, *each) for each in ((k_cache, pages, 1, rotary_dim), (v_cache, pages, 1, latent_dim)))
    keys = op.Concat(values, rest, axis=3)  # [M, 1, P·64, L + RD]
    n_keys = op.Squeeze(op.Shape(keys, start=2, end=3), op.ints(0))
    numbers = op.Range(op.scalar(0), n_keys, op.scalar(1))
    seen = in_sight(op, numbers, op.Unsqueeze(at, op.ints(1, 2, 3)), window)
    out = attend(op, op.Unsqueeze(queries, op.ints(1)), keys, values, seen, scale, softcap)  # [M, 1, H, L]
    out = op.Where(op.Unsqueeze(real, op.ints(1)), op.Reshape(out, op.ints(0, -1)), op.scalar(0.0))
    return out, k_cache, v_cache
