"""The operators of attention over the paged KV cache of a step.  __init__.py says what M, P, H, KH and D are;
DV: elements of a value, in most models D."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import onnx_ir as ir

from llmc.compiler.ops.attention_parts import (
    FLOATS,
    SIZES,
    STEP_INPUTS,
    TURNING,
    append_step,
    attend_pages,
    split_heads,
    value_dim,
)
from llmc.compiler.ops.define import ATTRIBUTE_TYPES, Attributes, Dims, define
from llmc.compiler.ops.rotary import Rotary, turn

ONE = ir.tensor(np.ones(1, np.float32))


def attention_results(shapes: Sequence[Dims], attributes: Attributes) -> Sequence[Dims]:
    k_cache, v_cache = shapes[-2:]
    of_value = v_cache[3]
    assert isinstance(of_value, int)
    return [(shapes[0][0], attributes["num_heads"] * of_value), k_cache, v_cache]


def norm_heads(op: Any, x: ir.Value, weight: ir.Value, num_heads: Any, head_dim: Any, epsilon: Any) -> Any:
    """Each head of x [M, num_heads · D] by RMSNorm over its D elements, weight [D] -> like x."""
    heads = op.Reshape(x, op.ints(0, num_heads, head_dim))
    return op.Reshape(op.RMSNormalization(heads, weight, axis=-1, epsilon=epsilon), op.ints(0, -1))


PAGED = """Append the step's keys and values to the paged cache, then let each row attend its own sequence.

1. Row m's key and value go to page page_table[m, pos // 64], offset pos % 64, where pos = positions[m].
2. Row m attends the keys at positions j <= pos in the pages of page_table[m]: only j > pos - window where
   window > 0, and only j // -window = pos // -window where window < 0; see `attend` for the equation. A row with
   pos = -1 writes nothing and gives zeros.
qkv [M, (H + KH)·D + KH·DV] (queries, keys, values), positions int64[M], page_table int64[M, P],
k_cache [n_pages, KH, 64, D], v_cache [n_pages, KH, 64, DV] -> [M, H·DV] and both caches.
Kwon et al. 2023, arXiv:2309.06180."""
APPENDED = """Step 2 of PagedAttention, over a cache that has the step's keys and values: a product in front has done
step 1 (append.py), or the cache is another layer's, whose keys and values this one attends too.
queries [M, H·D]; the rest as for PagedAttention -> [M, H·DV]."""
NORMED = """Before that queries and keys are normalised head by head: x / sqrt(mean(x²) + epsilon) · weight, over D.
query_norm, key_norm [D]."""
TURNED = """Queries and keys are turned by Rotary, normalised ones after that; keys are cached turned.
cos, sin [M, rotary_dim/2]."""
VALUES = """So are values, without a weight: x / sqrt(mean(x²) + epsilon), over DV."""
WITH_SINKS = """Each head has one more score, which no key has: exp of it joins the softmax's denominator.
sinks [H].    Xiao et al. 2023, arXiv:2309.17453."""
WITH_SLOPES = """A row's scores have slope · (j - pos) added, each head its own.
slopes [H].    Press et al. 2021, arXiv:2108.12409."""


BIDIRECTIONAL = """Append the step's keys and values to pages, then let each row attend all of its text, which is in
this step whole.

A text's rows are one behind the other, with positions from 0 on. 1. is as for PagedAttention.
2. Row m attends the keys at the positions of all rows of its text: only those with |j - pos| < window where
   window > 0; see `attend` for the equation. A row with pos = -1 writes nothing and gives zeros.
qkv [M, (H + KH)·D + KH·DV] (queries, keys, values), positions int64[M], page_table int64[M, P],
k_cache [n_pages, KH, 64, D], v_cache [n_pages, KH, 64, DV] -> [M, H·DV] and both caches.
Devlin et al. 2018, arXiv:1810.04805."""
WITH_BIASES = """A row's scores have biases[h, C + j - pos] added.
biases [H, 2 C], C = 64 P.    Shaw et al. 2018, arXiv:1803.02155."""
LOOKING_AHEAD = """Row m attends the keys up to the position sees[m] too, which is not before its own: those behind it
are of this step. The rows of a picture see all of it, those of a text themselves.
sees int64[M]."""
SAID = {NORMED: 0, VALUES: 4, TURNED: 1, WITH_SINKS: 2, WITH_SLOPES: 3, WITH_BIASES: 5, LOOKING_AHEAD: 6}
"""What an operator's docstring says besides, and by which part of its name."""


def paged_attention_name(
    norm: bool,
    rotary: bool,
    sinks: bool = False,
    alibi: bool = False,
    values: bool = False,
    both_ways: bool = False,
    distances: bool = False,
    ahead: bool = False,
) -> str:
    """`[RMSNorm[Values]][Rotary][Sink][Alibi][Distance][Bidirectional|Ahead]PagedAttention`."""
    of_rows = f"{'RMSNorm' * norm}{'Values' * values}{'Rotary' * rotary}"
    biased = f"{'Sink' * sinks}{'Alibi' * alibi}{'Distance' * distances}"
    return f"{of_rows}{biased}{'Bidirectional' * both_ways}{'Ahead' * ahead}PagedAttention"


def define_paged_attention(
    norm: bool,
    rotary: bool,
    sinks: bool,
    alibi: bool,
    values: bool,
    both_ways: bool = False,
    distances: bool = False,
    ahead: bool = False,
) -> None:
    """Register paged attention whose queries and keys are normalised, turned, both or neither, with sinks, with biases
    by distance (along a line, or from a table), or with neither; whose values are normalised or not; over all of a
    text, what is before a row, or that and as much behind it as it is told."""

    def body(op: Any, qkv: ir.Value, *inputs: ir.Value, **settings: Any) -> Any:
        *vectors, positions, page_table, k_cache, v_cache = inputs
        sees = vectors.pop() if ahead else None
        biases = vectors.pop() if distances else None
        slopes = vectors.pop() if alibi else None
        of_heads = vectors.pop() if sinks else None
        sizes = num_heads, kv_num_heads, head_dim = tuple(settings[name] for name in SIZES)
        q, k, v = split_heads(op, qkv, v_cache, sizes)
        if norm:
            query_norm, key_norm, *vectors = vectors
            q = norm_heads(op, q, query_norm, num_heads, head_dim, settings["epsilon"])
            k = norm_heads(op, k, key_norm, kv_num_heads, head_dim, settings["epsilon"])
        if values:
            ones = op.ConstantOfShape(value_dim(op, v_cache), value=ONE)
            v = norm_heads(op, v, ones, kv_num_heads, value_dim(op, v_cache), settings["epsilon"])
        if rotary:
            cos, sin = vectors
            q, k = turn(op, q, k, cos, sin, (num_heads, kv_num_heads), *(settings[name] for name in TURNING))
        scale, softcap, window = (settings[name] for name in ("scale", "softcap", "window"))
        k_cache, v_cache = append_step(op, k, v, positions, page_table, k_cache, v_cache, sizes)
        where = positions, page_table, k_cache, v_cache
        others: Any = {"both_ways": both_ways, "sees": sees}
        out = attend_pages(op, q, *where, sizes, scale, softcap, window, of_heads, slopes, biases, **others)
        return out, k_cache, v_cache

    parts = norm, rotary, sinks, alibi, values, distances, ahead
    said_first = BIDIRECTIONAL if both_ways else PAGED
    vectors = [*["query_norm", "key_norm"] * norm, *["cos", "sin"] * rotary, *["sinks"] * sinks, *["slopes"] * alibi]
    vectors += ["biases"] * distances + ["sees"] * ahead
    names = (*SIZES, "scale", "softcap", "window", "layer", *TURNING * rotary, *["epsilon"] * norm)
    define(
        paged_attention_name(norm, rotary, sinks, alibi, values, both_ways, distances, ahead),
        ["qkv", *vectors, *STEP_INPUTS],
        {name: ATTRIBUTE_TYPES["float" if name in FLOATS else "int"] for name in names},
        body,
        attention_results,
        "\n\n".join([said_first, *(said for said, part in SAID.items() if parts[part])]),
    )


PAGED_ATTENTION = {
    paged_attention_name(*parts): parts
    for parts in (
        *product((False, True), (False, True), (False, True), (False,), (False,)),
        (False, False, False, True, False),
        *((True, rotary, False, False, True) for rotary in (False, True)),
    )
}
"""(norm, rotary, sinks, alibi, values) of each operator of this family that goes forwards."""
for _parts in PAGED_ATTENTION.values():
    define_paged_attention(*_parts)
WHOLE_PAGED_ATTENTION = {
    paged_attention_name(norm, rotary, both_ways=True): (norm, rotary)
    for norm, rotary in product((False, True), repeat=2)
}
"""(norm, rotary) of each whose rows attend all of their text."""
for _norm, _rotary in WHOLE_PAGED_ATTENTION.values():
    define_paged_attention(_norm, _rotary, False, False, False, both_ways=True)
DISTANCE_PAGED_ATTENTION = paged_attention_name(False, False, both_ways=True, distances=True)
"""The one whose scores have biases by distance added."""
WHOLE_PAGED_ATTENTION[DISTANCE_PAGED_ATTENTION] = (False, False)
define_paged_attention(False, False, False, False, False, both_ways=True, distances=True)

AHEAD_PAGED_ATTENTION = {
    paged_attention_name(norm, rotary): paged_attention_name(norm, rotary, ahead=True)
    for norm, rotary in product((False, True), repeat=2)
}
"""For each of the family that may look ahead, the one that does."""
for _norm, _rotary in product((False, True), repeat=2):
    define_paged_attention(_norm, _rotary, False, False, False, ahead=True)


def appended_attention_name(norm: bool, rotary: bool, sinks: bool = False) -> str:
    """`[RMSNorm][Rotary][Sink]AppendedAttention`."""
    return f"{'RMSNorm' * norm}{'Rotary' * rotary}{'Sink' * sinks}AppendedAttention"


def define_appended_attention(norm: bool, rotary: bool, sinks: bool) -> None:
    """Register attention that appends nothing, whose queries are normalised, turned, both or neither, with sinks or
    without."""

    def body(op: Any, queries: ir.Value, *inputs: ir.Value, **settings: Any) -> Any:
        *vectors, positions, page_table, k_cache, v_cache = inputs
        of_heads = vectors.pop() if sinks else None
        sizes = num_heads, _, head_dim = tuple(settings[name] for name in SIZES)
        if norm:
            query_norm, *vectors = vectors
            queries = norm_heads(op, queries, query_norm, num_heads, head_dim, settings["epsilon"])
        if rotary:
            how = {name: settings[name] for name in TURNING}
            queries = Rotary(op, queries, *vectors, num_heads=num_heads, **how)
        scale, softcap, window = (settings[name] for name in ("scale", "softcap", "window"))
        return attend_pages(
            op, queries, positions, page_table, k_cache, v_cache, sizes, scale, softcap, window, of_heads
        )

    vectors = [*["query_norm"] * norm, *["cos", "sin"] * rotary, *["sinks"] * sinks]
    names = (*SIZES, "scale", "softcap", "window", "layer", *TURNING * rotary, *["epsilon"] * norm)
    define(
        appended_attention_name(norm, rotary, sinks),
        ["queries", *vectors, *STEP_INPUTS],
        {name: ATTRIBUTE_TYPES["float" if name in FLOATS else "int"] for name in names},
        body,
        lambda shapes, attributes: attention_results(shapes, attributes)[:1],
        "\n\n".join([APPENDED, *[NORMED] * norm, *[TURNED] * rotary, *[WITH_SINKS] * sinks]),
    )


APPENDED_ATTENTION = {appended_attention_name(*parts): parts for parts in product((False, True), repeat=3)}
"""(norm, rotary, sinks) of each operator of this family."""
for _of_queries in APPENDED_ATTENTION.values():
    define_appended_attention(*_of_queries)
