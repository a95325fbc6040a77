"""Work out what depends on constants alone once, when it is packed, and not in every step.

rewrite:
    Add(w, 1.0)
    -->
    w', a weight that is computed when it is read
refuses: a transposed weight, which `form_linear` takes as it is; values made of weights that are not float32.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.graph import add_constant, constant, evaluate, replace, unused_name
from llmc.compiler.graph.run import extract
from llmc.compiler.graph.shapes import bound, dims, infer_missing
from llmc.compiler.weights import Array, Weight


def fold_constants(model: ir.Model) -> int:
    """Assumes and leaves any graph; gives every value a shape. Returns the number of nodes folded."""
    infer_missing(model.graph)
    n_rewrites = 0
    left: set[ir.Value] = set()  # of weights, but no numbers: a comparison's result, say, becomes part of what uses it
    for node in list(model.graph):
        if node.op_type == "Transpose" or len(node.outputs) > 1 or not node.inputs:
            continue
        if all(value is None or value in left or constant(value) is not None for value in node.inputs):
            result = node.outputs[0]
            part = extract(result, [])
            if has_weights(part) and result.dtype != ir.DataType.FLOAT:
                left.add(result)
                continue
            replace(result, folded(model.graph, result, part))
            n_rewrites += 1
    return n_rewrites


def has_weights(part: ir.Model) -> bool:
    return any(isinstance(value.const_value, Weight) for value in part.graph.initializers.values())


def folded(graph: ir.Graph, result: ir.Value, part: ir.Model) -> ir.Value:
    """A constant for `result`, which `part` computes from constants: a `Weight`, unread until it is packed, if any of
    these is one."""

    def read() -> Array:
        return next(iter(evaluate(part, {}).values()))

    weights = [w for value in part.graph.initializers.values() if isinstance(w := value.const_value, Weight)]
    if not weights:
        return add_constant(graph, read(), unused_name(graph, str(result.name)))
    name = unused_name(graph, f"{weights[0].name}.folded")
    return add_constant(graph, Weight.computed(name, bound(dims(result), {}), read), name)
