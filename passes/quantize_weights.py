"""Store the weights of linear layers and of experts as integer codes with scales.

rewrite:
    llmc.Linear…(x, W, …), llmc.GatedLinear…(x, W, …), llmc.Experts…(x, index, share, W, V)
    -->
    the same of W.int4, a weight of as many elements whose values are codes * scales (compiler/quantize.py)
refuses: a weight that is computed; one that is quantised already; the product that makes the logits, unless asked; the
product that chooses experts, which is small, and a wrong choice is a large error; in mxfp4 all but experts.

Embeddings, norms and biases stay as they are.  A table that also is the embedding is kept for that, so quantising the
product that makes the logits then adds a copy.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.graph import add_constant, is_experts, op_name, weight_of
from llmc.compiler.quantize import QuantizedWeight, Scheme
from llmc.runtime.errors import LlmcError


def quantize_weights(model: ir.Model, scheme: Scheme) -> int:
    """Assumes a step graph; leaves Linear and Experts nodes whose weights are QuantizedWeights.  Returns the number of
    weights.  Raises LlmcError where there is none."""
    graph = model.graph
    if scheme.of_experts_alone and not any(is_experts(node) for node in graph):
        fact = f"{scheme.name} is for the weights of experts, and the model has none"
        raise LlmcError(fact, place=f"--quant {scheme.name}", hint="use --quant int4")
    spared = set() if scheme.lm_head else products_before(graph.outputs[0])
    for node in graph:
        if is_experts(node):
            spared |= {linear for value in node.inputs[1:3] if value is not None for linear in products_before(value)}
    n_rewrites = 0
    for node in graph:
        if is_experts(node):
            n_rewrites += quantize_input(node, 3, scheme) + quantize_input(node, 4, scheme)
        elif is_linear(node) and node not in spared and not scheme.of_experts_alone:
            n_rewrites += quantize_input(node, 1, scheme)
    return n_rewrites


def quantize_input(node: ir.Node, index: int, scheme: Scheme) -> int:
    """Quantise the weight that is this input of the node, if it is one that can be.  Returns how many that were."""
    graph, value = node.graph, node.inputs[index]
    weight = weight_of(value)
    if value is None or weight is None or isinstance(weight, QuantizedWeight):
        return 0
    assert isinstance(graph, ir.Graph)
    stored = QuantizedWeight(weight, scheme)
    node.replace_input_with(index, add_constant(graph, stored, str(stored.name)))
    if not value.uses() and not value.is_graph_output():
        graph.initializers.pop(str(value.name), None)
    return 1


def is_linear(node: ir.Node) -> bool:
    return op_name(node).startswith(("llmc.Linear", "llmc.GatedLinear"))


def products_before(result: ir.Value) -> set[ir.Node]:
    """The last linear layers on the way to a value."""
    found: set[ir.Node] = set()
    queue = [result]
    while queue:
        node = queue.pop().producer()
        if node is not None and is_linear(node):
            found.add(node)
        elif node is not None:
            queue += [value for value in node.inputs if value is not None]
    return found
