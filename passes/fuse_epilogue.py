"""Let a product finish its own result: activation and residual are applied before it is written.

rewrite:
    Relu(llmc.LinearBias(x, W, b))
    -->
    llmc.LinearBiasRelu(x, W, b)

    Add(llmc.Linear…(x, W, …), r)
    -->
    llmc.Linear…Residual(x, W, …, r)
for the activations Relu, Gelu, its tanh form, and Silu.
refuses: a product with another user; an r of another shape, or that is a constant.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.graph import constant, emit, producer, replace, used_once
from llmc.compiler.graph.shapes import dims
from llmc.compiler.ops import linear_name, linear_parts
from llmc.passes.merge_gate_up import activation_of


def fuse_epilogue(model: ir.Model) -> int:
    """Assumes Linear and LinearBias nodes and activations of one node, after fuse_norm, which comes first to sums that
    are normalised; leaves any operator of the Linear family. Returns the number of fusions."""
    n_rewrites = 0
    for node in list(model.graph):
        result = with_activation(node) or with_residual(node)
        if result is not None:
            replace(node.outputs[0], result)
            n_rewrites += 1
    return n_rewrites


def linear_of(value: ir.Value | None) -> tuple[ir.Node, tuple[bool, str, bool]] | None:
    """The product that makes this value, if the value has one user; and what is fused into the product already."""
    node = producer(value)
    if node is None or value is None or node.domain != "llmc" or not used_once(value):
        return None
    parts = linear_parts(node.op_type)
    return (node, parts) if parts is not None else None


def with_activation(node: ir.Node) -> ir.Value | None:
    activation = activation_of(node)
    linear = linear_of(node.inputs[0]) if activation else None
    if activation is None or linear is None or linear[1][1:] != ("", False):
        return None
    return emit(node, f"llmc.{linear_name(linear[1][0], activation)}", linear[0].inputs)[0]


def with_residual(node: ir.Node) -> ir.Value | None:
    if node.op_type != "Add" or node.domain:
        return None
    for value, residual in (node.inputs, reversed(node.inputs)):
        linear = linear_of(value)
        if linear is None or linear[1][2] or constant(residual) is not None or dims(residual) != dims(value):
            continue
        name = linear_name(linear[1][0], linear[1][1], residual=True)
        return emit(node, f"llmc.{name}", [*linear[0].inputs, residual])[0]
    return None
