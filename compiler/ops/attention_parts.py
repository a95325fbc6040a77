"""What the definitions of attention are made of: over a whole sequence (attention.py), over a step's pages (paged.py),
and over latents (latent.py).  __init__.py says what M, P, H, KH and D are; DV: elements of a value, mostly D."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from llmc.compiler.kernel import PAGE_TOKENS

STEP_INPUTS = ("positions", "page_table", "k_cache", "v_cache")
SIZES = ("num_heads", "kv_num_heads", "head_dim")
TURNING = ("rotary_dim", "interleaved")
FLOATS = ("scale", "softcap", "epsilon")
"""Attributes that are no integers."""


def split_heads(op: Any, qkv: ir.Value, v_cache: ir.Value, sizes: tuple[Any, Any, Any]) -> Any:
    """q [M, H·D], k [M, KH·D], v [M, KH·DV] from the rows they are packed in; DV is that of the cache."""
    num_heads, kv_num_heads, head_dim = sizes
    queries, keys = (op.Mul(op.scalar(heads), op.scalar(head_dim)) for heads in (num_heads, kv_num_heads))
    values = op.Mul(op.scalar(kv_num_heads), op.Squeeze(value_dim(op, v_cache), op.ints(0)))
    return op.Split(qkv, op.ints(queries, keys, values), axis=1, n_results=3)


def value_dim(op: Any, v_cache: ir.Value) -> Any:
    """[DV] of a cache [n_pages, KH, 64, DV]."""
    return op.Shape(v_cache, start=3, end=4)


def in_sight(op: Any, keys: ir.Value, queries: ir.Value, window: Any) -> Any:
    """Whether the key at one position is seen by the query at another; both int64, broadcast together.

    window > 0: where it is one of the last so many.  window < 0: where it is in the query's chunk of -window, the first
    of which begins at position 0.  0: where it is not behind the query.
    """
    width = op.scalar(window)
    before_chunk = op.Sub(queries, op.Add(op.Mod(queries, op.Max(op.Abs(width), op.scalar(1))), op.scalar(1)))
    last_unseen = op.Where(op.Less(width, op.scalar(0)), before_chunk, op.Sub(queries, width))
    near = op.Or(op.Equal(width, op.scalar(0)), op.Greater(keys, last_unseen))
    return op.And(op.LessOrEqual(keys, queries), near)


def near(op: Any, keys: ir.Value, queries: ir.Value, window: Any) -> Any:
    """Whether the key at one position is less than `window` away from the query at another, on either side, or that is
    0; both int64, broadcast together."""
    width = op.scalar(window)
    return op.Or(op.Equal(width, op.scalar(0)), op.Less(op.Abs(op.Sub(keys, queries)), width))


def last_positions(op: Any, positions: Any) -> Any:
    """For each row the position of the last row of its text, [M]: a text begins where positions do, at 0, and its rows
    are one behind the other."""
    begins = op.Cast(op.LessOrEqual(positions, op.scalar(0)), to=int(ir.DataType.INT64))
    text = op.CumSum(begins, op.scalar(0))
    own = op.Equal(op.Unsqueeze(text, op.ints(1)), op.Unsqueeze(text, op.ints(0)))
    return op.ReduceMax(op.Where(own, positions, op.scalar(-1)), op.ints(1), keepdims=0)


def attend(
    op: Any, q: Any, k: Any, v: Any, visible: Any, scale: Any, softcap: Any, sinks: Any = None, bias: Any = None
) -> Any:
    """softmax(cap(scale · q kᵀ)) v over the visible keys, where cap(s) = softcap · tanh(s / softcap) if softcap > 0.

    q […, Q, D], k […, L, D], v […, L, DV], visible bool […, Q, L] -> […, Q, DV].
    Vaswani et al. 2017, arXiv:1706.03762.
    sinks […, Q, 1], broadcast: for each query one more score, which no key has: exp of it joins the softmax's
    denominator.  Xiao et al. 2023, arXiv:2309.17453.    bias […, Q, L], broadcast: added to the capped scores.
    """
    scores = op.Mul(op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2])), op.scalar(scale))
    cap = op.scalar(softcap)
    capped = op.Mul(cap, op.Tanh(op.Div(scores, op.Max(cap, op.scalar(1e-9)))))
    scores = op.Where(op.Greater(cap, op.scalar(0.0)), capped, scores)
    scores = scores if bias is None else op.Add(scores, bias)
    scores = op.Where(visible, scores, op.scalar(float("-inf")))
    if sinks is None:
        return op.MatMul(op.Softmax(scores, axis=-1), v)
    largest = op.Max(op.ReduceMax(scores, op.ints(-1)), sinks)
    weights = op.Exp(op.Sub(scores, largest))
    total = op.Add(op.ReduceSum(weights, op.ints(-1)), op.Exp(op.Sub(sinks, largest)))
    return op.MatMul(op.Div(weights, total), v)


def linear_bias(op: Any, slopes: Any, keys: Any, queries: Any) -> Any:
    """slope · (key - query), their positions int64: all broadcast together.  Press et al. 2021, arXiv:2108.12409."""
    return op.Mul(slopes, op.Cast(op.Sub(keys, queries), to=int(ir.DataType.FLOAT)))


def biases_by_distance(op: Any, biases: Any, keys: Any, queries: Any) -> Any:
    """biases[h, C + key - query] of biases [H, 2 C]; keys and queries int64, broadcast to [Q, L] -> [H, Q, L]."""
    centre = op.Div(op.Shape(biases, start=1, end=2), op.ints(2))
    return op.Gather(biases, op.Add(op.Sub(keys, queries), centre), axis=1)


def page_slots(op: Any, positions: Any, page_table: Any) -> tuple[Any, Any, Any]:
    """For each row: whether it is real, its position (0 if it is not), and its slot among those of all pages."""
    page_tokens = op.scalar(PAGE_TOKENS)
    real = op.GreaterOrEqual(positions, op.scalar(0))
    at = op.Max(positions, op.scalar(0))
    column = op.Unsqueeze(op.Div(at, page_tokens), op.ints(1))
    page = op.Squeeze(op.GatherElements(page_table, column, axis=1), op.ints(1))
    return real, at, op.Add(op.Mul(page, page_tokens), op.Mod(at, page_tokens))


def append_step(
    op: Any, k: Any, v: Any, positions: Any, page_table: Any, k_cache: Any, v_cache: Any, sizes: tuple[Any, Any, Any]
) -> tuple[Any, Any]:
    """Step 1: both caches with the rows' keys and values."""
    _, kv_num_heads, head_dim = sizes
    real, _, slot = page_slots(op, positions, page_table)
    k_cache = append(op, k_cache, k, slot, real, kv_num_heads, head_dim)
    return k_cache, append(op, v_cache, v, slot, real, kv_num_heads, value_dim(op, v_cache))


def attend_pages(
    op: Any, q: Any, positions: Any, page_table: Any, k_cache: Any, v_cache: Any,
    sizes: tuple[Any, Any, Any], scale: Any, softcap: Any, window: Any, sinks: Any = None, slopes: Any = None,
    biases: Any = None, *, both_ways: bool = False, sees: Any = None,
) -> Any:  # fmt: skip
    """Step 2: queries that are turned, over caches that have the step's own keys and values.  both_ways: each row over
    all of its text, rather than over what is before it; sees: and over what is behind it up to there."""
    num_heads, kv_num_heads, head_dim = sizes
    real = op.GreaterOrEqual(positions, op.scalar(0))
    at = op.Max(positions, op.scalar(0))
    groups = op.Div(op.scalar(num_heads), op.scalar(kv_num_heads))
    queries = op.Reshape(q, op.ints(0, kv_num_heads, groups, head_dim))  # [M, KH, H/KH, D]
    pages = op.Max(page_table, op.scalar(0))  # entries past the end of a sequence may hold anything
    keys = own_pages(op, k_cache, pages, kv_num_heads, head_dim)
    values = own_pages(op, v_cache, pages, kv_num_heads, value_dim(op, v_cache))

    n_keys = op.Squeeze(op.Shape(keys, start=2, end=3), op.ints(0))
    places, own_place = op.Range(op.scalar(0), n_keys, op.scalar(1)), op.Unsqueeze(at, op.ints(1, 2, 3))
    if both_ways:
        last = op.Unsqueeze(last_positions(op, positions), op.ints(1, 2, 3))
        seen = op.And(op.LessOrEqual(places, last), near(op, places, own_place, window))
    else:
        seen = in_sight(op, places, own_place, window)
    if sees is not None:
        behind = op.LessOrEqual(places, op.Unsqueeze(sees, op.ints(1, 2, 3)))
        seen = op.Or(seen, op.And(op.Greater(places, own_place), behind))
    if sinks is not None:
        sinks = op.Reshape(sinks, op.ints(kv_num_heads, groups, 1))
    bias = None
    if slopes is not None:
        bias = linear_bias(op, op.Reshape(slopes, op.ints(kv_num_heads, groups, 1)), places, own_place)
    if biases is not None:
        of_heads = biases_by_distance(op, biases, places, op.Unsqueeze(at, op.ints(1)))  # [H, M, L]
        bias = op.Reshape(op.Transpose(of_heads, perm=[1, 0, 2]), op.ints(0, kv_num_heads, groups, -1))
    out = op.Reshape(attend(op, queries, keys, values, seen, scale, softcap, sinks, bias), op.ints(0, -1))
    return op.Where(op.Unsqueeze(real, op.ints(1)), out, op.scalar(0.0))


def append(op: Any, cache: Any, rows: Any, slot: Any, real: Any, kv_num_heads: Any, head_dim: Any) -> Any:
    """The cache with each real row at its slot: [n_pages, KH, 64, D], rows [M, KH·D] -> like the cache.

    A row that is not real goes to one slot past the end, which is then cut off.
    """
    flat = op.Reshape(op.Transpose(cache, perm=[0, 2, 1, 3]), op.ints(-1, kv_num_heads, head_dim))
    end = op.Shape(flat, start=0, end=1)
    flat = op.Pad(flat, op.ints(0, 0, 0, 1, 0, 0))
    slot = op.Unsqueeze(op.Where(real, slot, end), op.ints(1))
    flat = op.ScatterND(flat, slot, op.Reshape(rows, op.ints(0, kv_num_heads, head_dim)))
    flat = op.Slice(flat, op.ints(0), end, op.ints(0))
    paged = op.Reshape(flat, op.ints(-1, PAGE_TOKENS, kv_num_heads, head_dim))
    return op.Transpose(paged, perm=[0, 2, 1, 3])


def own_pages(op: Any, cache: Any, pages: Any, kv_num_heads: Any, head_dim: Any) -> Any:
    """Each row's own pages one after the other: cache [n_pages, KH, 64, D], pages [M, P] -> [M, KH, P·64, D]."""
    rows = op.Transpose(op.Gather(cache, pages, axis=0), perm=[0, 2, 1, 3, 4])  # [M, KH, P, 64, D]
    return op.Reshape(rows, op.ints(0, kv_num_heads, -1, head_dim))


def attend_rows(
    op: Any, q: Any, k: Any, v: Any, heads: tuple[Any, Any], scale: Any, softcap: Any, window: Any, sinks: Any = None,
    slopes: Any = None, biases: Any = None, *, both_ways: bool = False,
) -> Any:  # fmt: skip
    """Each of M rows over those before it, in sight; both_ways: over all that are near.  heads: (H, KH).

    q [M, H·D], k [M, KH·D], v [M, KH·DV] -> [M, H·DV].
    """
    num_heads, kv_num_heads = heads
    length = op.Squeeze(op.Shape(q, start=0, end=1), op.ints(0))
    rows = op.Range(op.scalar(0), length, op.scalar(1))
    visible = (near if both_ways else in_sight)(op, rows, op.Unsqueeze(rows, op.ints(1)), window)
    per_key_head = op.ints(0, kv_num_heads, -1)
    keys, values = (op.Transpose(op.Reshape(x, per_key_head), perm=[1, 0, 2]) for x in (k, v))  # [KH, M, D]
    groups = op.Div(op.scalar(num_heads), op.scalar(kv_num_heads))
    queries = op.Transpose(op.Reshape(q, op.ints(0, kv_num_heads, groups, -1)), perm=[1, 2, 0, 3])  # [KH, H/KH, M, D]
    keys, values = (op.Unsqueeze(x, op.ints(1)) for x in (keys, values))
    if sinks is not None:
        sinks = op.Reshape(sinks, op.ints(kv_num_heads, groups, 1, 1))
    bias = None
    if slopes is not None:
        of_heads = op.Reshape(slopes, op.ints(kv_num_heads, groups, 1, 1))
        bias = linear_bias(op, of_heads, rows, op.Unsqueeze(rows, op.ints(1)))
    if biases is not None:
        of_heads = biases_by_distance(op, biases, rows, op.Unsqueeze(rows, op.ints(1)))
        bias = op.Reshape(of_heads, op.Concat(op.ints(kv_num_heads, groups), op.Shape(of_heads, start=1), axis=0))
    out = attend(op, queries, keys, values, visible, scale, softcap, sinks, bias)
    return op.Reshape(op.Transpose(out, perm=[2, 0, 1, 3]), op.ints(0, -1))
