"""Biases that are linear in distance (ALiBi): worked out, not recognised, as masks are.

A row of keys' biases is added to all scores of a head: slope · key, or slope · (key - last).  A softmax does not change
by what is added to all of its scores, so only the slope matters: the operators here have slope · (key - query).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from llmc.compiler.graph.causal_mask import ALIBI, SHORT
from llmc.compiler.graph.probe import Probe
from llmc.compiler.graph.shapes import dims
from llmc.compiler.weights import Array
from llmc.runtime.errors import LlmcError

Bias = tuple[ir.Value, float]
"""What is added to scores, and the number by which the sum is multiplied afterwards."""
TOLERANCE = 1e-6
"""How far biases may be from linear, as a part of a head's largest: slope · key is rounded to float32."""


def is_row(value: ir.Value | None) -> bool:
    """Whether the value has one number for each head and key, the same for all queries: […, heads, 1, sequence]."""
    *outer, queries, keys = (None, None, *dims(value))
    return queries == 1 and str(keys) == "sequence" and has_heads(outer)


def has_heads(outer: Sequence[object]) -> bool:
    """Whether axes in front of queries and keys count heads: not only batches."""
    return any(str(size) not in ("None", "1", "batch") for size in outer)


def read_slopes(graph: ir.Graph, biases: Sequence[Bias], n_heads: int, n_context: int, place: str) -> Array | None:
    """The slopes float32 [n_heads] of all biases together; None where they come to nothing.  Raises LlmcError for what
    is not linear in up to n_context keys."""
    n_keys = max(n_context, 2)
    probe = Probe(graph, {"batch": 1, "sequence": n_keys}, is_long=True)
    total = np.zeros((n_heads, n_keys))
    for value, factor in biases:
        total += probe.contents(value).astype(np.float64).reshape(-1, n_keys) * factor
    slopes = (total[:, -1] - total[:, 0]) / (n_keys - 1)
    straight = total[:, :1] + slopes[:, None] * np.arange(n_keys)
    if not np.allclose(total, straight, rtol=0, atol=TOLERANCE * np.abs(total).max(axis=1, keepdims=True)):
        raise LlmcError("the attention adds to its scores a bias by position that is not linear in it", place=place)
    return slopes.astype(np.float32) if slopes.any() else None


def refuse_merged(graph: ir.Graph, masks: Sequence[object], place: str) -> None:
    """Masks are the same for all heads; where one is not, a bias is in it."""
    for mask in masks:
        if not isinstance(mask, ir.Value) or len(dims(mask)) < 3 or not has_heads(dims(mask)[:-2]):
            continue
        of_heads = Probe(graph, {"batch": 1, "sequence": SHORT}).contents(mask)
        of_heads = of_heads.reshape(-1, *of_heads.shape[-2:])
        if (of_heads != of_heads[:1]).any():
            raise LlmcError(ALIBI, place=place)
