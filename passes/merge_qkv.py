"""Compute queries, keys and values in one product, so that x is read once.

rewrite:
    llmc.CausalAttention(… llmc.Linear(x, Wq), … llmc.Linear(x, Wk), … llmc.Linear(x, Wv))
    -->
    q, k, v = Split(llmc.Linear(x, [Wq; Wk; Wv]))
    llmc.CausalAttention(… q, … k, … v)
refuses: products of different x, or with another user.

Rotary, Reshape and norms may stand between. Where only some have a bias, the others get zeros.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from llmc.compiler.graph import (
    add_constant,
    emit,
    family_name,
    ints_constant,
    op_name,
    producer,
    replace,
    used_once,
    weight_of,
)
from llmc.compiler.graph_shapes import dims
from llmc.compiler.ops import CAUSAL_ATTENTION
from llmc.compiler.weights import Weight

BETWEEN = ("llmc.Rotary", "Reshape", "RMSNormalization", "LayerNormalization")


def merge_qkv(model: ir.Model) -> int:
    """Assumes Linear and LinearBias nodes; leaves one of them, and a Split, before attention. Returns the number of
    merges."""
    n_rewrites = 0
    for node in list(model.graph):
        if op_name(node) not in CAUSAL_ATTENTION:
            continue
        linears = [projection(value) for value in node.inputs[:3]]
        found = [linear for linear in linears if linear is not None]
        if len(set(found)) == 3 and len({linear.inputs[0] for linear in found}) == 1:
            merge(model.graph, found)
            n_rewrites += 1
    return n_rewrites


def projection(value: ir.Value | None) -> ir.Node | None:
    """The Linear at the top of a chain that nothing else uses."""
    while value is not None and used_once(value):
        linear = producer(value, "llmc.Linear", "llmc.LinearBias")
        if linear is not None:
            return linear
        between = producer(value, *BETWEEN)
        value = between.inputs[0] if between is not None else None
    return None


def merge(graph: ir.Graph, linears: list[ir.Node]) -> None:
    first = min(linears, key=list(graph).index)
    operands = [first.inputs[0], joined(graph, [weight_of(linear.inputs[1]) for linear in linears])]
    if any(op_name(linear) == "llmc.LinearBias" for linear in linears):
        operands.append(joined(graph, biases(linears)))
    product = emit(first, "llmc.LinearBias" if len(operands) == 3 else "llmc.Linear", operands)[0]
    sizes = [size for linear in linears if isinstance(size := dims(linear.outputs[0])[1], int)]
    parts = emit(first, "Split", [product, ints_constant(graph, sizes)], n_results=3, axis=1)
    for linear, part in zip(linears, parts, strict=True):
        replace(linear.outputs[0], part)


def biases(linears: list[ir.Node]) -> list[Weight | None]:
    """The bias of each, zeros for one that has none."""
    known = [weight_of(linear.inputs[2]) if len(linear.inputs) == 3 else None for linear in linears]
    stored = next(bias.stored_dtype for bias in known if bias is not None)
    result: list[Weight | None] = []
    for linear, bias in zip(linears, known, strict=True):
        size = dims(linear.outputs[0])[1]
        assert isinstance(size, int)
        name = f"{str(linear.inputs[1] and linear.inputs[1].name).removesuffix('weight')}bias"
        result.append(bias if bias is not None else Weight(name, (size,), partial(np.zeros, size), stored))
    return result


def joined(graph: ir.Graph, parts: list[Weight | None]) -> ir.Value:
    """The weights' rows, one after the other."""
    weights = [part for part in parts if part is not None]
    name = family_name([str(weight.name) for weight in weights])
    return add_constant(graph, Weight.concat(weights, axis=0, name=name), name)
