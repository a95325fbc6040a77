"""Drop what nothing uses and what changes nothing.

rewrite:
    Identity(x), Cast(x) to its own type, Reshape(x) to its own shape, Reshape(Reshape(x)), Transpose(x) in order
    -->
    x, or one Reshape
refuses: to drop an input of the graph: the runtime fills it.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.graph import attribute, constant, producer, prune, replace
from llmc.compiler.graph.shapes import dims, ints


def drop_dead(model: ir.Model) -> int:
    """Assumes shapes; leaves no unused node or initializer. Returns the number of nodes dropped."""
    graph = model.graph
    n_before = len(graph)
    for node in list(graph):
        same = unchanged(node)
        inner = producer(node.inputs[0], "Reshape") if node.op_type == "Reshape" else None
        if same is not None and not (same.is_graph_input() and node.outputs[0].is_graph_output()):
            replace(node.outputs[0], same)
        elif inner is not None and is_absolute(node.inputs[1]):
            node.replace_input_with(0, inner.inputs[0])
            prune([inner])
    prune(reversed(graph))
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
    return n_before - len(graph)


def is_absolute(shape: ir.Value | None) -> bool:
    """Whether no entry of a Reshape's shape is 0, which would stand for a size of its input."""
    return constant(shape) is not None and 0 not in (ints(shape) or [])


def unchanged(node: ir.Node) -> ir.Value | None:
    """The input of the node that its result is equal to, if there is one."""
    x, y = (node.inputs or [None])[0], node.outputs[0]
    if x is None or node.domain or x.is_initializer():
        return None
    same_type = x.dtype == y.dtype and dims(x) == dims(y)
    if node.op_type == "Identity" or (node.op_type in ("Cast", "Reshape", "Expand") and same_type):
        return x
    if node.op_type == "Transpose" and tuple(attribute(node, "perm") or ()) == tuple(range(len(dims(x)))):
        return x
    return None
