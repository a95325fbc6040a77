"""Let the experts of a layer add the residual to their sum.

rewrite:
    Add(llmc.Experts…(x, index, share, W, V), r)
    -->
    llmc.Experts…Residual(x, index, share, W, V, r)      likewise those with biases and a clamped gate
refuses: experts with another user; an r of another shape, or that is a constant.

For GPUs, where the sum would be a launch of its own, between kernels that wait for memory.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.graph import attribute, constant, emit, producer, replace, used_once
from llmc.compiler.graph.shapes import dims
from llmc.compiler.ops import CLAMPED_EXPERTS, EXPERTS, OPERATORS


def fuse_experts(model: ir.Model) -> int:
    """Assumes a step graph; leaves no sum of experts and one other value.  Returns the number of sums."""
    n_rewrites = 0
    for node in list(model.graph):
        if node.op_type != "Add":
            continue
        for value, residual in (node.inputs, node.inputs[::-1]):
            experts = producer(value, *(f"llmc.{name}" for name in (*EXPERTS, *CLAMPED_EXPERTS)))
            if experts is None or value is None or not used_once(value) or not is_residual(residual, value):
                continue
            settings = {key: attribute(experts, key) for key in OPERATORS[experts.op_type].attributes}
            name = f"llmc.{experts.op_type}Residual"
            replace(node.outputs[0], emit(node, name, [*experts.inputs, residual], like=experts, **settings)[0])
            n_rewrites += 1
            break
    return n_rewrites


def is_residual(value: ir.Value | None, of: ir.Value) -> bool:
    return value is not None and constant(value) is None and dims(value) == dims(of)
