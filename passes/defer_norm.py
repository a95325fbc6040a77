"""Let the product in front of a norm prepare it, and the product behind it apply it to its sums.

rewrite:
    y = llmc.LinearResidual(x, W, residual)
    z = llmc.RMSNormLinear…(y, g, V, …)
    -->
    y, scaled, moments = llmc.LinearResidualMoments(x, W, residual, g)
    z = llmc.DeferredRMSNormLinear…(y, g, V, …, scaled, moments)

    y = llmc.LinearBiasResidual(x, W, c, residual)
    z = llmc.LayerNormLinear…(y, g, b, V, bias, …)
    -->
    y, scaled, moments = llmc.LinearBiasResidualMoments(x, W, c, residual, g)
    z = llmc.DeferredLayerNormLinear…(y, g, b, V, bias, …, scaled, moments, [V g; V b + bias])
refuses: y of other than two dimensions, or a width that is no multiple of 64; y that two products normalise; a product
in front with an activation or a norm of its own, and one behind that adds a residual; products that multiply numbers of
different types; a norm behind anything else, as a model's first.

For GPUs.  In steps of so many tokens that not every block can normalise them all for itself, a norm would otherwise be
a launch of its own.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.graph import add_constant, attribute, emit, op_name, producer, replace, unused_name, weight_of
from llmc.compiler.graph.shapes import dims
from llmc.compiler.kernel import TILE_COLUMNS
from llmc.compiler.ops import OPERATORS, deferred_name, moments_name
from llmc.compiler.quantization.quantize import QuantizedWeight
from llmc.compiler.weights import FoldedNorm

IN_FRONT = ("llmc.LinearResidual", "llmc.LinearBiasResidual")


def defer_norm(model: ir.Model) -> int:
    """Assumes a step graph after fuse_norm_linear, quantised if it is to be; leaves no norm of a sum to the product
    behind it alone that the product before it can prepare.  Returns the number of norms."""
    n_rewrites = 0
    for node in list(model.graph):
        front = producer(node.inputs[0], *IN_FRONT) if is_normed(node) else None
        if front is None or not fits(front, node):
            continue
        norm_weight = node.inputs[1]
        name = f"llmc.{moments_name(front.op_type)}"
        y, scaled, moments = emit(front, name, [*front.inputs, norm_weight], n_results=3, like=front)
        replace(front.outputs[0], y)
        inputs = [*node.inputs, scaled, moments, *folded(model.graph, node)]
        epsilon = float(attribute(node, "epsilon"))
        (z,) = emit(node, f"llmc.{deferred_name(node.op_type)}", inputs, like=node, epsilon=epsilon)
        replace(node.outputs[0], z)
        n_rewrites += 1
    return n_rewrites


def is_normed(node: ir.Node) -> bool:
    """Whether the node is a product that normalises x itself, for which there is an operator with a deferred norm."""
    return node.domain == "llmc" and deferred_name(node.op_type) in OPERATORS


def fits(front: ir.Node, node: ir.Node) -> bool:
    y = front.outputs[0]
    shape = dims(y)
    n_norms = sum(use.idx == 0 and is_normed(use.node) for use in y.uses())
    whole = len(shape) == 2 and isinstance(shape[1], int) and shape[1] % TILE_COLUMNS == 0
    return whole and n_norms == 1 and not y.is_graph_output() and multiplies(front) == multiplies(node) is not None


def multiplies(node: ir.Node) -> str | None:
    """The dtype that a product multiplies in: that of its weight, or what the weight's codes are widened to."""
    weight = weight_of(node.inputs[OPERATORS[node.op_type].inputs.index("weight")])
    if weight is None:
        return None
    source = weight.source if isinstance(weight, QuantizedWeight) else weight
    return source.stored_dtype


def folded(graph: ir.Graph, node: ir.Node) -> list[ir.Value]:
    """For a product behind LayerNorm the constant [V g; V b + bias], by which it applies mean and bias to its sums."""
    if not op_name(node).startswith("llmc.LayerNorm"):
        return []
    norm_weight, norm_bias, weight, *bias = (weight_of(value) for value in node.inputs[1:])
    assert weight is not None
    assert norm_weight is not None
    assert norm_bias is not None
    constant = FoldedNorm(weight, norm_weight, norm_bias, *bias)
    return [add_constant(graph, constant, unused_name(graph, str(constant.name)))]
