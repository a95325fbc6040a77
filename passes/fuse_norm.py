"""Add the residual and normalise in one operator with two results, so that the sum is written once and not read back.

rewrite:
    s = Add(x, r); n = RMSNormalization(s, w)
    -->
    s, n = llmc.AddRMSNorm(x, r, w)

    s = Add(x, r); n = LayerNormalization(s, w, b)
    -->
    s, n = llmc.AddLayerNorm(x, r, w, b)
refuses: an x and an r of different shapes; a norm over more than the last axis; a LayerNormalization without bias.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.graph import attribute, constant, emit, is_last_axis, producer, replace
from llmc.compiler.graph.shapes import dims

FUSED = {"RMSNormalization": ("llmc.AddRMSNorm", 2), "LayerNormalization": ("llmc.AddLayerNorm", 3)}


def fuse_norm(model: ir.Model) -> int:
    """Assumes a graph over M tokens; leaves no norm of a sum that only it needs to normalise. Returns the number of
    fusions."""
    n_rewrites = 0
    for node in list(model.graph):
        op, n_inputs = FUSED.get(node.op_type, ("", 0))
        add = producer(node.inputs[0], "Add") if op else None
        if add is None or not fits(add, node, n_inputs):
            continue
        # In the place of the sum, whose other users may come before the norm.
        epsilon = float(attribute(node, "epsilon", 1e-5))
        total, normed = emit(add, op, [*fresh_first(add), *node.inputs[1:]], n_results=2, epsilon=epsilon)
        replace(node.outputs[0], normed)
        replace(add.outputs[0], total)
        n_rewrites += 1
    return n_rewrites


def fits(add: ir.Node, norm: ir.Node, n_inputs: int) -> bool:
    same = dims(add.inputs[0]) == dims(add.inputs[1]) == dims(add.outputs[0])
    activations = not any(constant(value) is not None for value in add.inputs)
    weights = len(norm.inputs) == n_inputs and all(constant(value) is not None for value in norm.inputs[1:])
    return (
        same and activations and weights and is_last_axis(norm, attribute(norm, "axis", -1)) and len(norm.outputs) == 1
    )


def fresh_first(add: ir.Node) -> list[ir.Value | None]:
    """The operands with the layer's own result before the residual that passes it by."""
    a, b = add.inputs
    fresh = producer(b, "llmc.Linear", "llmc.LinearBias") is not None
    return [b, a] if fresh and producer(a, "llmc.Linear", "llmc.LinearBias") is None else [a, b]
