"""Recognise a router that lets a token choose among the experts of its best groups only.

rewrite:
    best = TopK(ReduceSum(TopK(Reshape(s, [-1, G, E/G]), 2).values, -1), kept).indices
    Where(Not(Cast(Reshape(Expand(Unsqueeze(ScatterElements(0, best, 1, axis=1), -1)), [-1, E]))), fill, s)
    -->
    llmc.KeepGroups(s, num_groups=G, kept, best=2, fill)                  s [batch·sequence, E]

    likewise with ReduceMax of each group in place of the sum: best=1

    all groups are kept
    -->
    s
refuses: groups of other scores than those that are masked, or chosen among tokens; a mask of anything but zeros and
ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import onnx_ir as ir

from llmc.compiler.graph import attribute, emit, is_last_axis, number, producer, replace
from llmc.compiler.graph.shapes import dims, ints
from llmc.compiler.ops.define import Dims


class Groups(NamedTuple):
    """Scores [batch·sequence, E] in groups, of which `kept` are kept; a group is ranked by the sum of its `best`
    scores."""

    scores: ir.Value
    num_groups: int
    kept: int
    best: int
    fill: float


def form_groups(model: ir.Model) -> int:
    """Assumes the exported graph, with shapes; leaves KeepGroups nodes.  Returns the number of rewrites."""
    n_rewrites = 0
    for node in list(model.graph):
        found = groups_of(node) if node.op_type == "Where" else None
        if found is None:
            continue
        scores, num_groups, kept, best, fill = found
        if kept < num_groups:
            settings: dict[str, Any] = {"num_groups": num_groups, "kept": kept, "best": best, "fill": fill}
            scores = emit(node, "llmc.KeepGroups", [scores], **settings)[0]
        replace(node.outputs[0], scores)
        n_rewrites += 1
    return n_rewrites


def groups_of(where: ir.Node) -> Groups | None:
    negated, other, scores = where.inputs
    mask, fill = producer(negated, "Not"), number(other)
    cast = producer(mask.inputs[0], "Cast") if mask is not None else None
    if cast is None or fill is None or scores is None or len(dims(scores)) != 2:
        return None
    index = scattered(repeated(cast.inputs[0], dims(scores)))
    chosen = producer(index, "TopK")
    if chosen is None or index is not chosen.outputs[1] or not takes_largest(chosen):
        return None
    kept, goodness = ints(chosen.inputs[1]), chosen.inputs[0]
    best = how_good(goodness, scores)
    count = dims(goodness)[-1]
    if best is None or not kept or not isinstance(count, int):
        return None
    return Groups(scores, count, kept[0], best, fill)


def takes_largest(top_k: ir.Node) -> bool:
    """Whether a TopK takes the largest along the last axis."""
    return bool(attribute(top_k, "largest", 1)) and is_last_axis(top_k, attribute(top_k, "axis", -1))


def repeated(value: ir.Value | None, wanted: Dims) -> ir.Value | None:
    """m [T, G], if the value [T, E] has each of its elements E/G times in a row."""
    joined = producer(value, "Reshape")
    spread = producer(joined.inputs[0] if joined else None, "Expand")
    column = producer(spread.inputs[0] if spread else None, "Unsqueeze")
    if value is None or spread is None or column is None or dims(value) != wanted:
        return None
    narrow = column.inputs[0]
    if narrow is None or ints(column.inputs[1]) not in ([-1], [2]) or len(dims(narrow)) != 2:
        return None
    return narrow if dims(spread.outputs[0])[:2] == dims(narrow) else None


def scattered(value: ir.Value | None) -> ir.Value | None:
    """The indices [T, kept] along axis 1 at which the value [T, G] is 1; it is 0 elsewhere."""
    node = producer(value, "ScatterElements")
    if node is None or not is_last_axis(node, attribute(node, "axis", 0)):
        return None
    if attribute(node, "reduction", "none") not in ("none", b"none"):
        return None
    zeros, index, ones = node.inputs
    return index if filled_with(zeros) == 0.0 and filled_with(ones) == 1.0 else None


def filled_with(value: ir.Value | None) -> float | None:
    """The number that all elements of a value are."""
    spread, made = producer(value, "Expand"), producer(value, "ConstantOfShape")
    if spread is not None:
        return number(spread.inputs[0])
    if made is not None:
        tensor = attribute(made, "value")
        return float(tensor.numpy().reshape(-1)[0]) if tensor is not None else 0.0
    return number(value)


def how_good(value: ir.Value | None, scores: ir.Value) -> int | None:
    """How many of a group's largest scores the value [T, G] sums up; None if it is something else."""
    node = producer(value, "ReduceSum", "ReduceMax")
    if node is None or attribute(node, "keepdims", 1) or len(node.inputs) < 2:
        return None
    grouped, best = node.inputs[0], [1]
    if node.op_type == "ReduceSum":
        largest = producer(grouped, "TopK")
        if largest is None or grouped is not largest.outputs[0] or not takes_largest(largest):
            return None
        grouped, best = largest.inputs[0], ints(largest.inputs[1]) or []
    cut = producer(grouped, "Reshape")
    if grouped is None or cut is None or cut.inputs[0] is not scores or ints(node.inputs[1]) not in ([-1], [2]):
        return None
    return best[0] if best and len(dims(grouped)) == 3 and dims(grouped)[0] == dims(scores)[0] else None
