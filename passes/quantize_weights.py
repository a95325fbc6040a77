"""Store the weights of linear layers as integer codes with scales.

rewrite:
    llmc.Linear…(x, W, …), llmc.GatedLinear…(x, W, …)
    -->
    the same of W.int4, a weight of as many elements whose values are codes * scales (compiler/quantize.py)
refuses: a weight that is computed; one that is quantised already; the product that makes the logits, unless asked.

Embeddings, norms and biases stay as they are.  A table that also is the embedding is kept for that, so quantising the
product that makes the logits then adds a copy.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.graph import add_constant, op_name, weight_of
from llmc.compiler.quantize import QuantizedWeight, Scheme


def quantize_weights(model: ir.Model, scheme: Scheme) -> int:
    """Assumes a step graph; leaves Linear nodes whose weight is a QuantizedWeight.  Returns the number of nodes."""
    graph = model.graph
    spared = set() if scheme.lm_head else products_before(graph.outputs[0])
    n_rewrites = 0
    for node in graph:
        if not is_linear(node) or node in spared:
            continue
        value = node.inputs[1]
        weight = weight_of(value)
        if value is None or weight is None or isinstance(weight, QuantizedWeight):
            continue
        stored = QuantizedWeight(weight, scheme)
        node.replace_input_with(1, add_constant(graph, stored, str(stored.name)))
        if not value.uses() and not value.is_graph_output():
            graph.initializers.pop(str(value.name), None)
        n_rewrites += 1
    return n_rewrites


def is_linear(node: ir.Node) -> bool:
    return op_name(node).startswith(("llmc.Linear", "llmc.GatedLinear"))


def products_before(result: ir.Value) -> set[ir.Node]:
    """The last linear layers on the way to a result."""
    found: set[ir.Node] = set()
    queue = [result]
    while queue:
        node = queue.pop().producer()
        if node is not None and is_linear(node):
            found.add(node)
        elif node is not None:
            queue += [value for value in node.inputs if value is not None]
    return found
