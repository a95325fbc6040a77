"""Store the weights of linear layers and of experts as integer codes with scales.

rewrite:
    llmc.Linear…(x, W, …), llmc.GatedLinear…(x, W, …), llmc.Experts…(x, index, share, W, V)
    -->
    the same of W.int4, a weight of as many elements whose values are codes * scales (compiler/quantization/quantize.py)
    in int4: with zeros where a checkpoint's codes have them, and in int8 what it keeps in more than 4 bits while most
    is in no more; unless asked, int8 for the product that makes the logits of a vocabulary (none does in a model that
    ends with a norm, as for embeddings)
refuses: a weight that is computed; one that is quantised already; the product that makes logits of a few labels, unless
asked or kept as codes; the product that chooses experts, which is small, and a wrong choice is a large error; likewise
those that say how much of a state is kept, and how much of a token goes in; one of few inputs, which says how streams
are mixed, and the product that makes these; in mxfp4 all but experts and what a checkpoint keeps as codes beside them,
or is asked for, which become int8.

Embeddings, norms and biases stay as they are; of a table that also makes the logits see share_table.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

import onnx_ir as ir

from llmc.compiler.graph import (
    add_constant,
    is_experts,
    is_linear,
    op_name,
    producer,
    products_before,
    products_of_logits,
    weight_of,
)
from llmc.compiler.graph.shapes import dims
from llmc.compiler.ops import DOMAIN, SELECTIVE_SCAN
from llmc.compiler.quantization.inputs import LEAST_INPUTS
from llmc.compiler.quantization.quantize import QuantizedWeight, Scheme
from llmc.compiler.weights import Weight
from llmc.passes.part_gates import RULES
from llmc.runtime.errors import LlmcError

Schemes = tuple[Scheme, Scheme, Scheme]
"""For most weights; for those that a checkpoint keeps in more than 4 bits; for those whose codes have zeros there."""
SPARED = {
    **dict.fromkeys(RULES, (1, 2)),
    f"{DOMAIN}.Stateful{SELECTIVE_SCAN}": (1, 3, 4),
}
"""The gates of layers with a state: the inputs that say how much of it is kept, and how much of a token goes in."""
SMALL = 4
"""Bits of a code that int4 may hold."""


def quantize_weights(model: ir.Model, scheme: Scheme) -> int:
    """Assumes a step graph; leaves Linear and Experts nodes whose weights are QuantizedWeights.  Returns the number of
    weights.  Raises LlmcError where experts alone are to be quantised and there are none."""
    graph = model.graph
    if scheme.of_experts_alone and not any(is_experts(node) for node in graph):
        fact = f"{scheme.name} is for the weights of experts, and the model has none"
        raise LlmcError(fact, place=f"--quant {scheme.name}", hint="use --quant int4")
    logits = products_of_logits(graph)
    small_logits = {node for node in logits if scheme.lm_head is None and is_worth_8_bits(node, scheme)}
    spared = set() if scheme.lm_head else set(logits) - small_logits
    for node in graph:
        for index in (1, 2) if is_experts(node) else SPARED.get(op_name(node), ()):
            if (value := node.inputs[index]) is not None:
                found = products_before(value)
                spared |= with_factors(found) if op_name(node) in RULES else found
        if is_linear(node) and dims(node.inputs[0])[-1] in range(LEAST_INPUTS):
            assert node.inputs[0] is not None
            spared |= {node} | products_before(node.inputs[0])
    if scheme.of_experts_alone:
        spared |= {node for node in graph if is_linear(node) and node not in logits and not is_kept_as_codes(node)}
    places = list(inputs_to_quantize(graph, spared))
    weights = [weight for node, index in places if (weight := weight_of(node.inputs[index])) is not None]
    zeros = replace(scheme, zeros=scheme.dtype == "i4")
    wide = scheme.in_8_bits if scheme.dtype == "i4" and are_most_small(weights) else scheme
    of_experts = scheme, wide, zeros
    in_8_bits = (scheme.in_8_bits,) * 3
    measured = (scheme, scheme, zeros)  # where 8 bits are worth it is known
    of_others = in_8_bits if scheme.of_experts_alone else measured if scheme.most_bits is not None else of_experts

    def schemes(node: ir.Node) -> Schemes:
        return of_experts if is_experts(node) else in_8_bits if node in small_logits else of_others

    return sum(quantize_input(node, index, schemes(node)) for node, index in places)


def with_factors(products: set[ir.Node]) -> set[ir.Node]:
    """The products, and those right in front of them: of a matrix that is kept as two factors, the first one."""
    before = {node for product in products if (node := producer(product.inputs[0])) is not None and is_linear(node)}
    return products | before


def are_logits_quantized(model: ir.Model) -> bool:
    """Whether a product that makes the logits has codes for a weight."""
    weights = (weight_of(node.inputs[1]) for node in products_of_logits(model.graph))
    return any(isinstance(weight, QuantizedWeight) for weight in weights)


def inputs_to_quantize(graph: ir.Graph, spared: set[ir.Node]) -> Iterator[tuple[ir.Node, int]]:
    """Nodes, and which of their inputs are weights to be quantised."""
    for node in graph:
        if is_experts(node):
            yield from ((node, 3), (node, 4))
        elif is_linear(node) and node not in spared:
            yield node, 1


def is_worth_8_bits(node: ir.Node, scheme: Scheme) -> bool:
    """Whether a product that makes the logits is quantised without anybody's asking: one of a vocabulary, which has
    more rows than columns, for of a few labels it saves nothing.  What is for experts alone leaves it as it is kept."""
    weight = weight_of(node.inputs[1])
    is_large = weight is not None and not scheme.of_experts_alone and weight.dims[0] > weight.dims[1]
    return is_large or is_kept_as_codes(node)


def is_kept_as_codes(node: ir.Node) -> bool:
    """Whether a checkpoint keeps a linear layer's weight as codes, of 8 bits or fewer."""
    weight = weight_of(node.inputs[1])
    return weight is not None and weight.coded is not None


def are_most_small(weights: list[Weight]) -> bool:
    """Whether a checkpoint keeps most of these in 4 bits or fewer, of those that it keeps as codes."""
    sizes = [(prod(weight.dims), weight.coded.bits) for weight in weights if weight.coded is not None]
    return 2 * sum(size for size, bits in sizes if bits <= SMALL) > sum(size for size, _ in sizes)


def scheme_of(weight: Weight, schemes: Schemes) -> Scheme:
    """The scheme for a weight."""
    scheme, wide, zeros = schemes
    if weight.sources & scheme.wide:
        return scheme.in_8_bits
    if weight.coded is None or not scheme.group:
        return scheme
    if weight.coded.bits > SMALL:
        return wide
    return zeros if weight.coded.has_zeros_of(scheme.group) else scheme


def quantize_input(node: ir.Node, index: int, schemes: Schemes) -> int:
    """Quantise the weight that is this input of the node, if it can be.  Returns the number of weights: 0 or 1."""
    graph, value = node.graph, node.inputs[index]
    weight = weight_of(value)
    if value is None or weight is None or isinstance(weight, QuantizedWeight):
        return 0
    assert isinstance(graph, ir.Graph)
    stored = QuantizedWeight(weight, scheme_of(weight, schemes))
    node.replace_input_with(index, add_constant(graph, stored, str(stored.name)))
    if not value.uses() and not value.is_graph_output():
        graph.initializers.pop(str(value.name), None)
    return 1
