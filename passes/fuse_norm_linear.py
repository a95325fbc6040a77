"""Let a product normalise its own operand, where nothing else wants it normalised.

rewrite:
    llmc.Linear…(RMSNormalization(x, w), W, …)
    -->
    llmc.RMSNormLinear…(x, w, W, …)

    llmc.GatedLinear…(LayerNormalization(x, w, b), W, …)
    -->
    llmc.LayerNormGatedLinear…(x, w, b, W, …)
refuses: a norm with another user; one over more than the last axis; a LayerNormalization without bias.

For GPUs: a launch costs as much as reading some megabytes, and a norm of a few tokens is worked out again by every
block that needs it sooner than a kernel of its own would begin.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.graph import attribute, constant, emit, is_last_axis, producer, replace, used_once
from llmc.compiler.ops import normed_name

FUSED = {"RMSNormalization": ("RMSNorm", 2), "LayerNormalization": ("LayerNorm", 3)}


def fuse_norm_linear(model: ir.Model) -> int:
    """Assumes a step graph whose products have taken what follows them; leaves no product of a norm that only it
    needs.  Returns the number of fusions."""
    n_rewrites = 0
    for node in list(model.graph):
        if node.domain != "llmc" or not node.op_type.startswith(("Linear", "GatedLinear")):
            continue
        norm = producer(node.inputs[0], *FUSED)
        if norm is None or not fits(norm):
            continue
        name = normed_name(FUSED[norm.op_type][0], node.op_type)
        epsilon = float(attribute(norm, "epsilon", 1e-5))
        (fused,) = emit(node, f"llmc.{name}", [*norm.inputs, *node.inputs[1:]], epsilon=epsilon)
        replace(node.outputs[0], fused)
        n_rewrites += 1
    return n_rewrites


def fits(norm: ir.Node) -> bool:
    weights = len(norm.inputs) == FUSED[norm.op_type][1] and all(
        constant(value) is not None for value in norm.inputs[1:]
    )
    return weights and used_once(norm.outputs[0]) and is_last_axis(norm, attribute(norm, "axis", -1))
