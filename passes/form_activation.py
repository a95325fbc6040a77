"""Recognise activations that are spelled out.

rewrite:
    Mul(x, Sigmoid(x))
    -->
    llmc.Silu(x)

    Mul(Mul(0.5, x), Add(1, Tanh(Mul(√(2/π), Add(x, Mul(0.044715, Pow(x, 3)))))))
    -->
    Gelu(x, approximate="tanh")                 likewise of Mul(Mul(√(2/π), x), Add(1, Mul(Mul(0.044715, x), x)))

    Mul(Mul(x, Add(Erf(Div(x, √2)), 1)), 0.5)
    -->
    Gelu(x)
refuses: other numbers than these, to six digits.
"""

from __future__ import annotations

from collections.abc import Iterator
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
        y = gelu(node) if x is None else None
        if x is not None:
            replace(node.outputs[0], emit(node, "llmc.Silu", [x])[0])
        elif y is not None:
            replace(node.outputs[0], emit(node, "Gelu", [y[0]], approximate=y[1])[0])
        n_rewrites += x is not None or y is not None
    return n_rewrites


def silu(node: ir.Node) -> ir.Value | None:
    for x, gate in (node.inputs, reversed(node.inputs)):
        sigmoid = producer(gate, "Sigmoid")
        if sigmoid is not None and sigmoid.inputs[0] is x:
            return x
    return None


def gelu(node: ir.Node) -> tuple[ir.Value, str] | None:
    """x and how it is approximated, if the node is 0.5 x (1 + tanh …) or 0.5 x (1 + erf …), multiplied in any order."""
    for factors in products_of_three(node):
        halves = [value for value in factors if is_number(value, 0.5)]
        if len(halves) != 1:
            continue
        a, b = (value for value in factors if value is not halves[0])
        for x, gate in ((a, b), (b, a)):
            wave = producer(without(gate, "Add", 1.0), "Tanh", "Erf")
            if x is None or wave is None:
                continue
            if wave.op_type == "Tanh" and is_bent(wave.inputs[0], x):
                return x, "tanh"
            if wave.op_type == "Erf" and is_over_root_two(wave.inputs[0], x):
                return x, "none"
    return None


def products_of_three(node: ir.Node) -> Iterator[tuple[ir.Value | None, ...]]:
    """The factors of a * (b * c), for either side that is a product."""
    for outer, product in (node.inputs, reversed(node.inputs)):
        inner = producer(product, "Mul")
        if inner is not None:
            yield outer, *inner.inputs


def is_bent(value: ir.Value | None, x: ir.Value) -> bool:
    """Whether the value is √(2/π) (x + 0.044715 x³), or the same with x factored out."""
    if is_cubic(without(value, "Mul", sqrt(2 / pi)), x):
        return True
    node = producer(value, "Mul")
    for a, b in (node.inputs, reversed(node.inputs)) if node is not None else ():
        if without(a, "Mul", sqrt(2 / pi)) is not x:
            continue
        square = producer(without(b, "Add", 1.0), "Mul")
        for c, d in (square.inputs, reversed(square.inputs)) if square is not None else ():
            if d is x and without(c, "Mul", 0.044715) is x:
                return True
    return False


def is_cubic(value: ir.Value | None, x: ir.Value) -> bool:
    """Whether the value is x + 0.044715 x³."""
    total = producer(value, "Add")
    if total is None or x not in total.inputs:
        return False
    return any(is_cube(without(other, "Mul", 0.044715), x) for other in total.inputs if other is not x)


def is_cube(value: ir.Value | None, x: ir.Value) -> bool:
    node = producer(value, "Pow", "Mul")
    if node is None:
        return False
    if node.op_type == "Pow":
        return node.inputs[0] is x and number(node.inputs[1]) == 3
    squares = [producer(other, "Mul") for other in node.inputs if other is not x]
    return x in node.inputs and len(squares) == 1 and squares[0] is not None and all(v is x for v in squares[0].inputs)


def is_over_root_two(value: ir.Value | None, x: ir.Value) -> bool:
    node = producer(value, "Div")
    if node is not None:
        return node.inputs[0] is x and is_number(node.inputs[1], sqrt(2))
    return without(value, "Mul", sqrt(0.5)) is x


def is_number(value: ir.Value | None, wanted: float) -> bool:
    found = number(value)
    return found is not None and isclose(found, wanted, rel_tol=1e-6)


def without(value: ir.Value | None, op: str, constant: float) -> ir.Value | None:
    """y, if the value is op(y, constant) or op(constant, y)."""
    node = producer(value, op)
    for y, other in (node.inputs, reversed(node.inputs)) if node is not None else ():
        if is_number(other, constant):
            return y
    return None
