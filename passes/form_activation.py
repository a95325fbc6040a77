"""Recognise activations that are spelled out.

rewrite:
    Mul(x, Sigmoid(x))
    -->
    llmc.Silu(x)

    Mul(Mul(0.5, x), Add(1, Tanh(Mul(√(2/π), Add(x, Mul(0.044715, Pow(x, 3)))))))
    -->
    Gelu(x, approximate="tanh")
refuses: other numbers than these, to six digits.
"""

from __future__ import annotations

from math import isclose, pi, sqrt

import onnx_ir as ir

from llmc.compiler.graph import emit, number, producer, replace


def form_activation(model: ir.Model) -> int:
    """Assumes and leaves any graph with shapes. Returns the number of rewrites."""
    n_rewrites = 0
    for node in list(model.graph):
        if node.op_type != "Mul" or node.graph is None:
            continue
        x = silu(node)
        y = gelu_tanh(node) if x is None else None
        if x is not None:
            replace(node.outputs[0], emit(node, "llmc.Silu", [x])[0])
        elif y is not None:
            replace(node.outputs[0], emit(node, "Gelu", [y], approximate="tanh")[0])
        n_rewrites += x is not None or y is not None
    return n_rewrites


def silu(node: ir.Node) -> ir.Value | None:
    for x, gate in (node.inputs, reversed(node.inputs)):
        sigmoid = producer(gate, "Sigmoid")
        if sigmoid is not None and sigmoid.inputs[0] is x:
            return x
    return None


def gelu_tanh(node: ir.Node) -> ir.Value | None:
    for half, gate in (node.inputs, reversed(node.inputs)):
        x = without(half, "Mul", 0.5)
        inner = without(argument(without(gate, "Add", 1.0), "Tanh"), "Mul", sqrt(2 / pi))
        total = producer(inner, "Add")
        if x is None or total is None or x not in total.inputs:
            continue
        cubic = next((value for value in total.inputs if value is not x), None)
        cube = producer(without(cubic, "Mul", 0.044715), "Pow")
        if cube is not None and cube.inputs[0] is x and number(cube.inputs[1]) == 3:
            return x
    return None


def without(value: ir.Value | None, op: str, constant: float) -> ir.Value | None:
    """y, if the value is op(y, constant) or op(constant, y)."""
    node = producer(value, op)
    for y, other in (node.inputs, reversed(node.inputs)) if node is not None else ():
        found = number(other)
        if found is not None and isclose(found, constant, rel_tol=1e-6):
            return y
    return None


def argument(value: ir.Value | None, op: str) -> ir.Value | None:
    node = producer(value, op)
    return node.inputs[0] if node is not None else None
