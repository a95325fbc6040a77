"""Write GatherND along one axis as Gather.

rewrite:
    GatherND(table, Unsqueeze(index, [-1]))
    -->
    Gather(table, index, axis=0)
refuses: several coordinates, batches.

PyTorch exports `scale[index]` so, in routers with a scale for each expert.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.graph import attribute, emit, producer, replace
from llmc.compiler.graph.shapes import dims, ints


def form_gather(model: ir.Model) -> int:
    """Assumes and leaves any graph with shapes.  Returns the number of rewrites."""
    n_rewrites = 0
    for node in list(model.graph):
        index = one_coordinate(node.inputs[1]) if node.op_type == "GatherND" else None
        if index is not None and attribute(node, "batch_dims", 0) == 0:
            replace(node.outputs[0], emit(node, "Gather", [node.inputs[0], index], axis=0)[0])
            n_rewrites += 1
    return n_rewrites


def one_coordinate(value: ir.Value | None) -> ir.Value | None:
    """The index, if the value [..., 1] is that with one more axis."""
    node = producer(value, "Unsqueeze")
    if node is None or value is None or ints(node.inputs[1]) not in ([-1], [len(dims(value)) - 1]):
        return None
    return node.inputs[0]
