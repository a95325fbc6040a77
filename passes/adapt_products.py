"""Let each token's own adapter add to the products of linear layers, for GPUs: in the graph of those steps in which a
token has one.

rewrite:
    llmc.{…Norm}Linear{Bias}(x, W, …)
    -->
    llmc.{…Norm}LowRank(llmc.{…Norm}Linear{Bias}(x, W, …), x, adapters, A, B, sizes)

    llmc.Linear{Bias}Residual{Moments}(x, W, …, residual)
    -->
    llmc.Linear{Bias}Residual{Moments}(x, W, …, llmc.LowRank(residual, x, adapters, A, B, sizes))

    llmc.{…Norm}GatedLinear{activation}{Bias}(x, [Wg; Wu], …)
    -->
    llmc.{…Norm}LowRankStripsGated{activation}(llmc.{…Norm}LinearStrips{Bias}(x, [Wg; Wu], …), x, adapters, A, B, sizes)

    llmc.Linear…{activation}{Residual}(x, W, …)
    -->
    Add(activation(llmc.LowRank(llmc.Linear…(x, W, …), x, adapters, A, B, sizes)), residual)
refuses: an adapter of what is no such product here; of the product that makes the logits.

Other than insert_adapters this comes when all else is done, and leaves what was fused and deferred: weights lie once
for both graphs, and a step without adapters is what it would be without this.  A gated weight's rows lie with gate and
up in turn, and so do the columns of its product, which the low rank knows: where they cannot (float32, or a number of
columns that is no multiple of 64) the columns are halves.  What is added to a residual takes its place, where nobody
wants it later; else it is added behind the product, and a norm that this one prepared is the next one's own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from llmc.compiler.bind import ALIASES
from llmc.compiler.graph import add_constant, attribute, emit, ints_constant, replace, weight_of
from llmc.compiler.graph.shapes import dims
from llmc.compiler.kernel import TILE_COLUMNS
from llmc.compiler.low_rank import Added, Part, joined_factors, parts_of
from llmc.compiler.ops import DOMAIN, OPERATORS, linear_name, low_rank_name, strips_name
from llmc.compiler.quantization.quantize import QuantizedWeight
from llmc.compiler.weights import Weight
from llmc.passes.gather_rows import M, R
from llmc.passes.insert_adapters import ADAPTERS, refuse_unmet

NAME = re.compile(
    r"(?P<deferred>Deferred)?(?P<norm>RMSNorm|LayerNorm)?"
    r"(?:Linear(?P<bias>Bias)?(?P<activation>Relu|GeluTanh|Gelu|Silu)?(?P<residual>Residual)?(?P<moments>Moments)?"
    r"|GatedLinear(?P<gate>Silu|GeluTanh|Gelu)(?P<gated_bias>Bias)?)"
)
ALONE: dict[str, tuple[str, dict[str, Any]]] = {
    "Relu": ("Relu", {}),
    "Gelu": ("Gelu", {"approximate": "none"}),
    "GeluTanh": ("Gelu", {"approximate": "tanh"}),
    "Silu": (f"{DOMAIN}.Silu", {}),
}
"""Activations as operators of their own, and their attributes."""


@dataclass(frozen=True)
class Product:
    """A product of the step graph, as its operator's name says it."""

    node: ir.Node
    norm: str
    bias: bool
    activation: str
    gate: str
    residual: bool
    moments: bool

    @property
    def inputs(self) -> dict[str, ir.Value]:
        names = OPERATORS[self.node.op_type].inputs
        return {name: value for name, value in zip(names, self.node.inputs, strict=True) if value is not None}

    @property
    def weight(self) -> Weight | None:
        """As the checkpoint has it."""
        found = weight_of(self.inputs["weight"])
        return found.source if isinstance(found, QuantizedWeight) else found

    @property
    def epsilon(self) -> dict[str, Any]:
        """The norm's attribute, where there is one."""
        return {"epsilon": float(attribute(self.node, "epsilon"))} if self.norm else {}

    def operator(self, name: str) -> str:
        """`name` with the norm that is in front of this product, deferred or not."""
        deferred = "Deferred" * self.node.op_type.startswith("Deferred")
        return f"{DOMAIN}.{deferred}{self.norm}{name}"


def product_of(node: ir.Node) -> Product | None:
    found = NAME.fullmatch(node.op_type) if node.domain == DOMAIN else None
    if found is None or dims(node.outputs[0])[0] == R:  # those of logits
        return None
    said = {name: found[name] or "" for name in ("norm", "activation", "gate")}
    bias = bool(found["bias"] or found["gated_bias"])
    return Product(node, bias=bias, residual=bool(found["residual"]), moments=bool(found["moments"]), **said)


def adapt_products(model: ir.Model, *, added: Added) -> int:
    """Assumes a finished step graph for GPUs, before steps are joined; leaves a LowRank node at each product that an
    adapter changes, and the input `adapters` i64[M]. Returns their number."""
    graph = model.graph
    if any(value.name == ADAPTERS for value in graph.inputs):
        return 0
    adapters = ir.Value(name=ADAPTERS, shape=ir.Shape([M]), type=ir.TensorType(ir.DataType.INT64))
    met = set[str]()
    n_rewrites = 0
    for product in [
        found for node in reversed(graph) if (found := product_of(node))
    ]:  # norms before what prepares them
        weight = product.weight
        parts = parts_of(weight) if weight is not None else None
        if weight is not None and parts is not None and any(part.name in added for part in parts):
            adapt(graph, product, operands_of(graph, adapters, weight, parts, added))
            met |= {part.name for part in parts}
            n_rewrites += 1
    of_logits = [node for node in graph if "Linear" in node.op_type and dims(node.outputs[0])[0] == R]
    made = [weight_of(value) for node in of_logits for value in node.inputs if value and value.is_initializer()]
    refuse_unmet(added, met, {str(weight.name) for weight in made if weight is not None})
    graph.inputs.append(adapters)
    return n_rewrites


def operands_of(graph: ir.Graph, adapters: ir.Value, weight: Weight, parts: list[Part], added: Added) -> list[ir.Value]:
    """Of a LowRank: what comes behind x and its norm."""
    factors = [add_constant(graph, each, str(each.name)) for each in joined_factors(weight, parts, added)]
    return [adapters, *factors, ints_constant(graph, [part.n_rows for part in parts])]


def adapt(graph: ir.Graph, product: Product, operands: Sequence[ir.Value]) -> None:
    residual = product.inputs.get("residual")
    if product.gate:
        adapt_gate(product, operands)
    elif residual is not None and not product.activation and is_last_use(graph, residual, product.node):
        (changed,) = low_rank(product, residual, operands)
        product.node.replace_input_with(product.node.inputs.index(residual), changed)
    else:
        adapt_behind(product, operands)


def is_last_use(graph: ir.Graph, value: ir.Value, node: ir.Node) -> bool:
    """Whether nobody wants the value, which a node has made, once this node has run."""
    maker, place = value.producer(), {each: index for index, each in enumerate(graph)}
    users = [use.node for use in value.uses()]
    if maker is None or value.is_graph_output() or any(each.op_type in ALIASES for each in (maker, *users)):
        return False
    return users.count(node) == 1 and all(place[user] <= place[node] for user in users)


def low_rank(product: Product, y: ir.Value, operands: Sequence[ir.Value], *, strips: bool = False) -> list[ir.Value]:
    """What a row's adapter makes of y, in front of the product's own node."""
    node, inputs = product.node, product.inputs
    vectors = [inputs[name] for name in ("norm_weight", "norm_bias") if product.norm and name in inputs]
    name = low_rank_name(product.gate, product.norm, strips=strips)
    made = emit(node, f"{DOMAIN}.{name}", [y, inputs["x"], *vectors, *operands], like=node, **product.epsilon)
    name_made(made[0], f"{node.outputs[0].name}.adapted", f"{node.name}.adapters")
    return made


def adapt_gate(product: Product, operands: Sequence[ir.Value]) -> None:
    """Split a gated product into one without a gate, and what adds to it and gates it."""
    node, weight = product.node, product.weight
    assert weight is not None
    in_strips = weight.stored_dtype != "f32" and weight.dims[0] // 2 % TILE_COLUMNS == 0
    name = strips_name(product.bias) if in_strips else linear_name(product.bias)
    (sums,) = emit(node, product.operator(name), node.inputs, like=node, **product.epsilon)
    name_made(sums, f"{node.outputs[0].name}.sums", str(node.name))
    take_place(node, low_rank(product, sums, operands, strips=in_strips)[0])


def adapt_behind(product: Product, operands: Sequence[ir.Value]) -> None:
    """Add to what a product makes, before its activation and the residual that comes after that."""
    node, inputs = product.node, product.inputs
    if product.moments:
        norm_themselves(node)
    is_apart = product.residual and bool(product.activation)
    gone = ["norm_weight"] * product.moments + ["residual"] * is_apart
    left = {name: value for name, value in inputs.items() if name not in gone}
    name = linear_name(product.bias, residual=product.residual and not is_apart)
    (sums,) = emit(node, product.operator(name), [*left.values()], like=node, **product.epsilon)
    name_made(sums, f"{node.outputs[0].name}.sums", str(node.name))
    (value,) = low_rank(product, sums, operands)
    if product.activation:
        operator, settings = ALONE[product.activation]
        (value,) = emit(node, operator, [value], like=node, **settings)
        name_made(value, f"{node.outputs[0].name}.active", f"{node.name}.{product.activation}")
    if is_apart:
        (value,) = emit(node, "Add", [value, inputs["residual"]], like=node)
        name_made(value, f"{node.outputs[0].name}.sum", f"{node.name}.residual")
    take_place(node, value)


def norm_themselves(front: ir.Node) -> None:
    """Let the products behind this one normalise what it makes, of which it has prepared the norm."""
    for node in {use.node for value in front.outputs[1:] for use in value.uses()}:
        names = OPERATORS[node.op_type].inputs
        kept = [
            value for name, value in zip(names, node.inputs, strict=True) if name not in ("scaled", "moments", "folded")
        ]
        name = f"{DOMAIN}.{node.op_type.removeprefix('Deferred')}"
        (made,) = emit(node, name, kept, like=node, epsilon=float(attribute(node, "epsilon")))
        name_made(made, f"{node.outputs[0].name}.normed", str(node.name))
        take_place(node, made)


def name_made(value: ir.Value, name: str, node_name: str) -> None:
    """What was emitted has names of its own: profiles of a plan go by those of nodes."""
    value.name = name
    made = value.producer()
    assert made is not None
    made.name = node_name


def take_place(node: ir.Node, new: ir.Value) -> None:
    """Put a value in the place of a node's first result, under its name, by which plans know it."""
    old = node.outputs[0]
    new.name, old.name = old.name, None
    if old.is_graph_output():
        old.name = new.name
    replace(old, new)
