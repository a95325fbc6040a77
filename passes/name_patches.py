"""Call the number of patches M, and that of the rows that they become R: the graph is of any.

rewrite:
    pixels f32[N, K] … Reshape(x [N, E], [N/4, 4·E]) … made f32[N/4, D]
    -->
    pixels f32[M, K] … Reshape(x [M, E], [-1, 4·E]) … made f32[R, D]
refuses: other constants in which these numbers are; shapes that have both of them, or one twice.
"""

from __future__ import annotations

from collections.abc import Container

import onnx_ir as ir

from llmc.compiler.graph import ints_constant
from llmc.compiler.graph.shapes import dims
from llmc.compiler.ops.define import Dim
from llmc.runtime.errors import LlmcError


def name_patches(model: ir.Model) -> int:
    """Assumes numbers for shapes, last of all passes: from here on no shape can be worked out from others.  Returns how
    many values have got another shape."""
    graph = model.graph
    n_patches, n_rows = dims(graph.inputs[0])[0], dims(graph.outputs[0])[0]
    if not isinstance(n_patches, int) or not isinstance(n_rows, int):
        return 0
    names = {n_rows: ir.SymbolicDim("R"), n_patches: ir.SymbolicDim("M")}
    made = [value for node in graph for value in node.outputs]
    weights = [value for value in graph.initializers.values() if value.dtype == ir.DataType.FLOAT]
    if len(names) < 2 or any(set(dims(value)) & set(names) for value in weights):
        raise LlmcError(f"name_patches: a weight has {n_patches} or {n_rows} rows")
    for node in list(graph):
        if node.op_type == "Reshape":
            shape = [size for size in dims(node.outputs[0]) if isinstance(size, int)]
            free = [-1 if size in names else size for size in shape]
            if free.count(-1) > 1:
                raise LlmcError("name_patches: a shape has two numbers of patches", place=f"node {node.name}")
            node.replace_input_with(1, ints_constant(graph, free))
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
        elif value not in weights and value.const_value is not None and knows(value.const_value, names):
            raise LlmcError("name_patches: an operator knows the number of patches", place=f"constant {name}")
    n_named = 0
    for value in (*graph.inputs, *made):
        named: list[Dim] = [names.get(size, size) if isinstance(size, int) else size for size in dims(value)]
        n_named += tuple(named) != dims(value)
        value.shape = ir.Shape(named)
    return n_named


def knows(tensor: ir.TensorProtocol, numbers: Container[int]) -> bool:
    """Whether one of them is in it."""
    return any(number in numbers for number in tensor.numpy().reshape(-1).tolist())
