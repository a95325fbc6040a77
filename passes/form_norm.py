"""Recognise RMSNorm where it is spelled out, and LayerNorm where RMSNorm is applied to x minus its mean.

rewrite:
    Mul(w, Mul(x, Reciprocal(Sqrt(Add(ReduceMean(Pow(x, 2)), eps)))))    or x / Sqrt(…), x * (1 / Sqrt(…)), no eps
    -->
    RMSNormalization(x, w, axis=-1, epsilon=eps)

    Mul(x, Reciprocal(Sqrt(Add(ReduceMean(Pow(x, 2)), eps))))             no weight behind it: the same forms
    -->
    RMSNormalization(x, 1, axis=-1, epsilon=eps)

    RMSNormalization(Sub(x, ReduceMean(x)), w)
    -->
    LayerNormalization(x, w)
refuses: a mean over other axes than the last.  A weight that is no vector along that axis stays a Mul behind the norm.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from llmc.compiler.graph import add_constant, attribute, constant, emit, is_last_axis, number, producer, replace
from llmc.compiler.graph.shapes import dims, ints


def form_norm(model: ir.Model) -> int:
    """Assumes and leaves any graph with shapes. Returns the number of norms formed."""
    return form_rms_norm(model) + form_bare_norm(model) + form_layer_norm(model)


def form_layer_norm(model: ir.Model) -> int:
    n_rewrites = 0
    for node in list(model.graph):
        centred = producer(node.inputs[0], "Sub") if node.op_type == "RMSNormalization" else None
        if centred is None or not is_last_axis(node, attribute(node, "axis", -1)):
            continue
        x, mean = centred.inputs
        if x is not None and mean_of(mean) is x:
            settings = {"axis": -1, "epsilon": attribute(node, "epsilon", 1e-5)}
            replace(node.outputs[0], emit(node, "LayerNormalization", [x, *node.inputs[1:]], **settings)[0])
            n_rewrites += 1
    return n_rewrites


def form_rms_norm(model: ir.Model) -> int:
    n_rewrites = 0
    for node in list(model.graph):
        if node.op_type != "Mul" or node.graph is None:
            continue
        for normed, weight in (node.inputs, reversed(node.inputs)):
            found = normalised(normed)
            if found is None or weight is None or not is_scale(weight, found[0]):
                continue
            operands = [found[0], weight]
            replace(node.outputs[0], emit(node, "RMSNormalization", operands, axis=-1, epsilon=found[1])[0])
            n_rewrites += 1
            break
    return n_rewrites


def form_bare_norm(model: ir.Model) -> int:
    n_rewrites = 0
    for node in list(model.graph):
        found = normalised(node.outputs[0]) if node.op_type in ("Mul", "Div") and node.graph is not None else None
        size = dims(found[0])[-1] if found is not None else None
        if found is None or not isinstance(size, int):
            continue
        ones = add_constant(model.graph, np.ones(size, np.float32), f"ones.{size}")
        replace(node.outputs[0], emit(node, "RMSNormalization", [found[0], ones], axis=-1, epsilon=found[1])[0])
        n_rewrites += 1
    return n_rewrites


def is_scale(weight: ir.Value, x: ir.Value) -> bool:
    """Whether the value is a constant with one number for each element of the last axis, or made of one (1 + w)."""
    made = producer(weight)
    fixed = constant(weight) is not None or (
        made is not None and all(constant(value) is not None for value in made.inputs if value is not None)
    )
    return fixed and dims(weight) == dims(x)[-1:]


def normalised(value: ir.Value | None) -> tuple[ir.Value, float] | None:
    """x and eps, if the value is x over the root of its mean square."""
    node = producer(value, "Mul", "Div")
    if node is None:
        return None
    pairs = [tuple(node.inputs)] if node.op_type == "Div" else [tuple(node.inputs), tuple(reversed(node.inputs))]
    for x, factor in pairs:
        root = producer(factor, "Sqrt") if node.op_type == "Div" else inverse_root(factor)
        epsilon = mean_square(root.inputs[0], x) if root is not None else None
        if x is not None and epsilon is not None:
            return x, epsilon
    return None


def inverse_root(value: ir.Value | None) -> ir.Node | None:
    """The Sqrt under a Reciprocal, or under 1 / …; or the root of Pow(…, -0.5)."""
    node = producer(value, "Reciprocal", "Div", "Pow")
    if node is None:
        return None
    if node.op_type == "Div":
        return producer(node.inputs[1], "Sqrt") if number(node.inputs[0]) == 1 else None
    if node.op_type == "Pow":
        return node if number(node.inputs[1]) == -0.5 else None
    return producer(node.inputs[0], "Sqrt")


def mean_square(value: ir.Value | None, x: ir.Value | None) -> float | None:
    """eps, if the value is mean(x²) + eps; 0 if it is mean(x²)."""
    add = producer(value, "Add")
    if add is None:
        return 0.0 if is_square(mean_of(value), x) else None
    for mean, small in (add.inputs, reversed(add.inputs)):
        if is_square(mean_of(mean), x) and (epsilon := number(small)) is not None:
            return epsilon
    return None


def mean_of(value: ir.Value | None) -> ir.Value | None:
    """x, if the value is the mean of x over its last axis, which stays as 1."""
    node = producer(value, "ReduceMean")
    if node is None or not attribute(node, "keepdims", 1) or len(node.inputs) < 2 or node.inputs[0] is None:
        return None
    return node.inputs[0] if ints(node.inputs[1]) in ([-1], [len(dims(node.inputs[0])) - 1]) else None


def is_square(value: ir.Value | None, x: ir.Value | None) -> bool:
    node = producer(value, "Pow", "Mul")
    if node is None or node.inputs[0] is not x:
        return False
    return number(node.inputs[1]) == 2 if node.op_type == "Pow" else node.inputs[1] is x
