"""Rearrange weights of experts while they are packed, rather than in the graph, where a checkpoint has another order.

rewrite:
    W' = Transpose(W)
    llmc.Experts…(x, index, share, Concat(W'[:, ::2], W'[:, 1::2]), Transpose(V), …)
    -->
    llmc.Experts…(x, index, share, W.rows, V.rows, …)      elements of W and of V, rearranged when they are packed,
                                                           in the dtype they are stored in
refuses: an operand whose numbers differ from the weight's, or that is made of two weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from llmc.compiler.graph import add_constant, attribute, constant, is_experts, op_name, producer, prune, weight_of
from llmc.compiler.graph.shapes import bound, dims, ints
from llmc.compiler.weights import Array, Weight

FIRST_WEIGHT = 3
"""The inputs of Experts… from this one on are weights."""


class Arranged(NamedTuple):
    """A weight, and how it is rearranged.  how: the same as text: equal texts mean equal arrangements."""

    weight: Weight
    arrange: Callable[[Array], Array]
    how: str


def arrange_experts(model: ir.Model) -> int:
    """Assumes and leaves any graph with shapes. Returns the number of weights rearranged."""
    n_rewrites = 0
    for node in list(model.graph):
        if not is_experts(node):
            continue
        for index, value in enumerate(node.inputs[FIRST_WEIGHT:], FIRST_WEIGHT):
            maker, found = producer(value), arranged(value)
            if maker is None or found is None:
                continue
            weight = ordered(found, bound(dims(value), {}))
            node.replace_input_with(index, add_constant(model.graph, weight, str(weight.name)))
            prune([maker])
            n_rewrites += 1
    return n_rewrites


def ordered(found: Arranged, shape: tuple[int, ...]) -> Weight:
    weight, arrange, how = found

    def read() -> Array:
        return arrange(weight.unrounded())

    return Weight.computed(f"{weight.name}.rows", shape, read, weight.stored_dtype, ("arranged", how, weight))


def arranged(value: ir.Value | None) -> Arranged | None:
    """The one weight whose elements, unchanged, make up the value; None if it is made of anything else."""
    weight = weight_of(value)
    if weight is not None:
        return Arranged(weight, lambda array: array, "")
    node = producer(value, *RULES)
    return RULES[op_name(node)](node) if node is not None else None


def transpose(node: ir.Node) -> Arranged | None:
    found, perm = arranged(node.inputs[0]), attribute(node, "perm")
    if found is None or perm is None:
        return None
    return Arranged(found.weight, lambda array: found.arrange(array).transpose(perm), f"{found.how} {tuple(perm)}")


def slice_(node: ir.Node) -> Arranged | None:
    found = arranged(node.inputs[0])
    if found is None or len(node.inputs) < 4 or any(constant(operand) is None for operand in node.inputs[1:]):
        return None
    starts, ends, axes, *steps = (ints(operand) or [] for operand in node.inputs[1:])
    parts = [slice(None)] * len(dims(node.inputs[0]))
    for start, end, axis, step in zip(starts, ends, axes, *(steps or [[1] * len(starts)]), strict=True):
        parts[axis] = slice(start, end, step)
    return Arranged(found.weight, lambda array: found.arrange(array)[tuple(parts)], f"{found.how} {parts}")


def concat(node: ir.Node) -> Arranged | None:
    found = [part for value in node.inputs if (part := arranged(value)) is not None]
    axis = attribute(node, "axis")
    if len(found) != len(node.inputs) or len({id(part.weight) for part in found}) != 1:
        return None

    def arrange(array: Array) -> Array:
        return np.concatenate([part.arrange(array) for part in found], axis)

    return Arranged(found[0].weight, arrange, f"{axis}({'; '.join(part.how for part in found)})")


RULES: dict[str, Callable[[ir.Node], Arranged | None]] = {"Transpose": transpose, "Slice": slice_, "Concat": concat}
