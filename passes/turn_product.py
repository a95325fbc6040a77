"""Turn a product with the weight on the left into one with the weight on the right, as linear layers have it.

rewrite:
    MatMul(W, x)                                                                W [N, K], x [batch, K, sequence]
    -->
    Transpose(MatMul(Transpose(x, [0, 2, 1]), Transpose(W)), [0, 2, 1])
refuses: W that is no weight of two axes; x of other than three axes.

Mamba computes the steps of its scan so, channel by channel.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.graph import constant, emit, replace
from llmc.compiler.graph.shapes import dims


def turn_product(model: ir.Model) -> int:
    """Assumes and leaves any graph with shapes.  Returns the number of products that are turned."""
    n_rewrites = 0
    for node in list(model.graph):
        if node.op_type != "MatMul" or constant(node.inputs[0]) is None or constant(node.inputs[1]) is not None:
            continue
        weight, x = node.inputs
        if len(dims(weight)) != 2 or len(dims(x)) != 3:
            continue
        rows = emit(node, "Transpose", [x], perm=[0, 2, 1])[0]
        turned = emit(node, "Transpose", [weight], perm=[1, 0])[0]
        y = emit(node, "MatMul", [rows, turned])[0]
        replace(node.outputs[0], emit(node, "Transpose", [y], perm=[0, 2, 1])[0])
        n_rewrites += 1
    return n_rewrites
