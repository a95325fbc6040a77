"""Compute both halves of a gated MLP in one product, so that x is read once and their product never reaches memory.

rewrite:
    Mul(llmc.Silu(llmc.Linear(x, Wg)), llmc.Linear(x, Wu))
    g, u = Split(llmc.Linear(x, [Wg; Wu])); Mul(llmc.Silu(g), u)
    -->
    llmc.GatedLinearSilu(x, [Wg; Wu])
also for Gelu and its tanh form, and with biases.
refuses: a gate or an up product with another user, or of another x; biases for one of the two.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.graph import (
    add_constant,
    attribute,
    emit,
    family_name,
    op_name,
    producer,
    replace,
    used_once,
    weight_of,
)
from llmc.compiler.graph.shapes import dims
from llmc.compiler.ops import gated_linear_name
from llmc.compiler.weights import Weight


def merge_gate_up(model: ir.Model) -> int:
    """Assumes Linear and LinearBias nodes and one-node activations; leaves GatedLinear nodes. Returns their number."""
    n_rewrites = 0
    for node in list(model.graph):
        if node.op_type != "Mul" or node.graph is None:
            continue
        for gate, up in (node.inputs, reversed(node.inputs)):
            result = merged(node, gate, up)
            if result is not None:
                replace(node.outputs[0], result)
                n_rewrites += 1
                break
    return n_rewrites


def activation_of(node: ir.Node | None) -> str | None:
    """How operators' names spell the activation that this node is; None for another node."""
    if node is None or op_name(node) not in ("llmc.Silu", "Gelu", "Relu"):
        return None
    return "GeluTanh" if attribute(node, "approximate", "none") == "tanh" else node.op_type


def merged(node: ir.Node, gate: ir.Value | None, up: ir.Value | None) -> ir.Value | None:
    activate = producer(gate, "llmc.Silu", "Gelu")
    activation = activation_of(activate)
    if activate is None or activation is None or gate is None or up is None or not (used_once(gate) and used_once(up)):
        return None
    operands = from_split(activate.inputs[0], up) or from_pair(node, activate.inputs[0], up)
    if operands is None:
        return None
    return emit(node, f"llmc.{gated_linear_name(activation, len(operands) == 3)}", operands)[0]


def from_split(gate: ir.Value | None, up: ir.Value) -> list[ir.Value | None] | None:
    """The operands of one Linear whose equal halves are gate and up."""
    split = producer(gate, "Split")
    if (
        split is None
        or gate is None
        or list(split.outputs) != [gate, up]
        or dims(gate) != dims(up)
        or len(gate.uses()) > 1
    ):
        return None
    product = split.inputs[0]
    linear = producer(product, "llmc.Linear", "llmc.LinearBias")
    return list(linear.inputs) if linear is not None and product is not None and used_once(product) else None


def from_pair(node: ir.Node, gate: ir.Value | None, up: ir.Value) -> list[ir.Value | None] | None:
    """The operands of two Linears, joined."""
    pair = [producer(value, "llmc.Linear", "llmc.LinearBias") for value in (gate, up)]
    a, b = pair
    if a is None or b is None or gate is None or not used_once(gate) or a.inputs[0] is not b.inputs[0]:
        return None
    if dims(gate) != dims(up) or a.op_type != b.op_type or not isinstance(node.graph, ir.Graph):
        return None
    operands: list[ir.Value | None] = [a.inputs[0]]
    for one, other in zip(a.inputs[1:], b.inputs[1:], strict=True):
        weights = [weight for value in (one, other) if (weight := weight_of(value)) is not None]
        name = family_name([str(weight.name) for weight in weights])
        operands.append(add_constant(node.graph, Weight.concat(weights, axis=0, name=name), name))
    return operands
