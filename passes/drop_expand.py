"""Drop an Expand whose users broadcast by themselves.

rewrite:
    MatMul(Expand(w [1, 8, 1], [batch, 8, 1]), x [batch, 1, sequence])
    -->
    MatMul(w, x)
refuses: an Expand with a user that does not broadcast, or whose result would be smaller without it.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.graph import prune
from llmc.compiler.graph.shapes import BROADCAST, broadcast, dims
from llmc.runtime.errors import LlmcError


def drop_expand(model: ir.Model) -> int:
    """Assumes and leaves a graph with shapes. Returns the number of operands that are no longer expanded."""
    n_rewrites = 0
    for node in list(model.graph):
        if node.op_type != "Expand" or node.inputs[0] is None:
            continue
        for use in list(node.outputs[0].uses()):
            if repeats(use.node, use.idx, node.inputs[0]):
                use.node.replace_input_with(use.idx, node.inputs[0])
                n_rewrites += 1
        prune([node])
    return n_rewrites


def repeats(user: ir.Node, index: int, narrow: ir.Value) -> bool:
    """Whether the user's result has the same shape with the operand as it is before it is expanded."""
    shapes = [dims(narrow) if i == index else dims(value) for i, value in enumerate(user.inputs)]
    try:
        if user.op_type in BROADCAST:
            return broadcast(shapes) == dims(user.outputs[0])
        if user.op_type == "MatMul" and min(map(len, shapes)) > 1:
            same = shapes[index][-2:] == dims(user.inputs[index])[-2:]
            return same and broadcast([shape[:-2] for shape in shapes]) == dims(user.outputs[0])[:-2]
    except LlmcError:
        pass
    return False
