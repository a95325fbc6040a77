"""Let one operator normalise rows and multiply them by their gates.

rewrite:
    Mul(RMSNormalization(x, weight), Mul(z, Sigmoid(z)))
    -->
    llmc.GatedRMSNorm(x, z, weight)
refuses: a norm over other axes; gates of another shape, or by another function; more columns than the kernel takes; a
    norm that others read.

For GPUs, where this would be four launches, three of which read and write the whole value.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.graph import attribute, constant, emit, is_last_axis, producer, replace
from llmc.compiler.graph.shapes import dims

MOST_COLUMNS = 1024
"""What the kernel takes: a warp has a row, and each lane 32 numbers of it."""


def fuse_gated_norm(model: ir.Model) -> int:
    """Assumes a step graph; leaves no gate beside the norm that it multiplies.  Returns their number."""
    n_rewrites = 0
    for node in [node for node in model.graph if node.op_type == "Mul"]:
        for normed, gate in (node.inputs, node.inputs[::-1]):
            norm, z = producer(normed, "RMSNormalization"), gate_of(gate)
            if norm is None or z is None or not fits(norm, z):
                continue
            inputs = [norm.inputs[0], z, norm.inputs[1]]
            (y,) = emit(node, "llmc.GatedRMSNorm", inputs, epsilon=float(attribute(norm, "epsilon", 1e-5)))
            replace(node.outputs[0], y)
            n_rewrites += 1
            break
    return n_rewrites


def fits(norm: ir.Node, z: ir.Value) -> bool:
    x, weight = norm.inputs
    columns = dims(x)[-1]
    is_small = isinstance(columns, int) and columns <= MOST_COLUMNS and dims(weight) == (columns,)
    is_plain = is_last_axis(norm, attribute(norm, "axis", -1)) and dims(z) == dims(x)
    return is_small and is_plain and constant(weight) is not None and len(norm.outputs[0].uses()) == 1


def gate_of(value: ir.Value | None) -> ir.Value | None:
    """z, if the value is silu(z)."""
    product = producer(value, "Mul")
    for z, share in (product.inputs, product.inputs[::-1]) if product is not None else ():
        made = producer(share, "Sigmoid")
        if made is not None and made.inputs[0] is z:
            return z
    return None
