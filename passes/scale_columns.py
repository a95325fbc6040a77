"""Divide what a product reads by what its weight's columns are multiplied by: more even inputs, for rounding.

rewrite:
    x = RMSNormalization(h, g)            llmc.Linear…(x, W, …), llmc.GatedLinear…(x, V, …)
    -->
    x = RMSNormalization(h, g / s)        llmc.Linear…(x, W s, …), llmc.GatedLinear…(x, V s, …)

    likewise llmc.AddRMSNorm(h, r, g), and with b / s LayerNormalization(h, g, b), llmc.AddLayerNorm(h, r, g, b)

    x = llmc.GatedLinear…(h, [Wg; Wu])    llmc.Linear…(x, W, …)
    -->
    x = llmc.GatedLinear…(h, [Wg; Wu/s])  llmc.Linear…(x, W s, …)

    likewise its bias, and llmc.Linear{Bias}Relu(h, U / s, b / s)
refuses: an x with another user than such products, or that makes the logits, which kinds of devices gather at different
places; weights that others use too; weights that a checkpoint keeps as codes which the scheme may keep; an x that has
been divided.

s are powers of two, so that no number is rounded: quantization/columns.py says which, why, and where nothing is gained.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import onnx_ir as ir

from llmc.compiler.graph import (
    add_constant,
    attribute,
    constant,
    is_last_axis,
    is_linear,
    op_name,
    products_of_logits,
    weight_of,
)
from llmc.compiler.quantization.columns import Columns, divides
from llmc.compiler.quantization.quantize import Scheme
from llmc.compiler.weights import Weight

NORMS = {
    "RMSNormalization": (0, (1,)),
    "LayerNormalization": (0, (1, 2)),
    "llmc.AddRMSNorm": (1, (2,)),
    "llmc.AddLayerNorm": (1, (2, 3)),
}
"""Which result is normed, and which inputs are the weight and the bias that make it."""
RELU = {"llmc.LinearRelu": (1,), "llmc.LinearBiasRelu": (1, 2)}


class Place(NamedTuple):
    """x: what is to be divided.  made_by: the inputs of its node that do so, the first of them first, each from a row
    on.  products: all that read it."""

    x: ir.Value
    made_by: tuple[int, ...]
    first: int
    products: tuple[ir.Node, ...]

    @property
    def node(self) -> ir.Node:
        node = self.x.producer()
        assert node is not None
        return node


def scale_columns(model: ir.Model, scheme: Scheme, columns: Columns) -> int:
    """Assumes a step graph, before it is quantised.  Returns the number of values that are divided."""
    users = Counter(id(constant(value)) for node in model.graph for value in node.inputs if constant(value) is not None)
    logits = products_of_logits(model.graph)
    found = {
        place: weight
        for place in map(place_of, model.graph)
        if place is not None
        and logits.isdisjoint(place.products)
        and (weight := dividing(place, scheme, users)) is not None
    }
    wanted = {place.x: (weight, [weight_at(node, 1) for node in place.products]) for place, weight in found.items()}
    columns.measure(model.graph, wanted, scheme)
    n_divided = 0
    for place, weight in found.items():
        scales = columns.of[weight]
        if (scales == 1).all():
            continue
        n_divided += 1
        for index in place.made_by:
            replace_weight(place.node, index, columns.scaled(weight_at(place.node, index), scales, -1, 0, place.first))
        for product in place.products:
            replace_weight(product, 1, columns.scaled(weight_at(product, 1), scales, 1, 1))
    return n_divided


def place_of(node: ir.Node) -> Place | None:
    """What a node makes that can be divided, if only products read it."""
    op, result, first = op_name(node), 0, 0
    if op in NORMS:
        result, made_by = NORMS[op]
        if len(node.inputs) <= made_by[-1] or not is_last_axis(node, attribute(node, "axis", -1)):
            return None
    elif op in RELU:
        made_by = RELU[op]
    elif op.startswith("llmc.GatedLinear") and (weight := weight_of(node.inputs[1])) is not None:
        made_by, first = tuple(range(1, len(node.inputs))), weight.dims[0] // 2
    else:
        return None
    x = node.outputs[result]
    products = tuple(dict.fromkeys(use.node for use in x.uses()))
    only_products = all(is_linear(product) and product.inputs[0] is x for product in products)
    read_once = len(x.uses()) == len(products) and not x.is_graph_output()
    return Place(x, made_by, first, products) if products and only_products and read_once else None


def dividing(place: Place, scheme: Scheme, users: Counter[int]) -> Weight | None:
    """The first weight that is to divide, if all weights are the place's own, and none has codes to keep."""
    inputs = [(place.node, index) for index in place.made_by] + [(product, 1) for product in place.products]
    for node, index in inputs:
        value = node.inputs[index]
        weight = weight_of(value)
        if weight is None or not isinstance(constant(value), Weight) or users[id(weight)] > 1:
            return None
        if may_be_kept(weight, scheme):
            return None
    weight = weight_at(*inputs[0])
    return None if divides(weight) else weight


def may_be_kept(weight: Weight, scheme: Scheme) -> bool:
    """Whether the scheme may hold the codes that a checkpoint has: those of rows, or in int4 of any groups."""
    return weight.coded is not None and (bool(scheme.group) or not weight.coded.group)


def weight_at(node: ir.Node, index: int) -> Weight:
    weight = weight_of(node.inputs[index])
    assert weight is not None
    return weight


def replace_weight(node: ir.Node, index: int, weight: Weight) -> None:
    graph, value = node.graph, node.inputs[index]
    assert isinstance(graph, ir.Graph)
    assert value is not None
    node.replace_input_with(index, add_constant(graph, weight, str(weight.name)))
    graph.initializers.pop(str(value.name), None)
