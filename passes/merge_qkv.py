"""Compute queries, keys and values in one product, so that x is read once.

rewrite:
    llmc.CausalAttention(… llmc.Linear(x, Wq), … llmc.Linear(x, Wk), … llmc.Linear(x, Wv))
    -->
    q, k, v = Split(llmc.Linear(x, [Wq; Wk; Wv]))
    llmc.CausalAttention(… q, … k, … v)

    llmc.CausalAttention(… llmc.Linear(x, Wq), … llmc.Linear(x, Wk), … the same)
    -->
    q, k = Split(llmc.Linear(x, [Wq; Wk]))
    llmc.CausalAttention(… q, … k, … k)
refuses: products of different x, or with a user that is no attention.

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
    weight_of,
)
from llmc.compiler.graph.shapes import dims
from llmc.compiler.ops import SEQUENCE_ATTENTION
from llmc.compiler.weights import Weight

BETWEEN = ("llmc.Rotary", "Reshape", "RMSNormalization", "LayerNormalization")


def merge_qkv(model: ir.Model) -> int:
    """Assumes Linear and LinearBias nodes; leaves one of them, and a Split, before attention. Returns the number of
    merges."""
    n_rewrites = 0
    for node in list(model.graph):
        if op_name(node) not in SEQUENCE_ATTENTION:
            continue
        linears = [projection(value) for value in node.inputs[:3]]
        found = [linear for linear in linears if linear is not None]
        if len(found) == 3 and len(set(found)) > 1 and len({linear.inputs[0] for linear in found}) == 1:
            merge(model.graph, list(dict.fromkeys(found)))
            n_rewrites += 1
    return n_rewrites


def projection(value: ir.Value | None) -> ir.Node | None:
    """The Linear at the top of a chain that leads to attention alone."""
    while value is not None and is_attended(value):
        linear = producer(value, "llmc.Linear", "llmc.LinearBias")
        if linear is not None:
            return linear
        between = producer(value, *BETWEEN)
        value = between.inputs[0] if between is not None else None
    return None


def is_attended(value: ir.Value) -> bool:
    """Whether all uses of the value are attention's: of one, of several that share it, as keys and as values."""
    nodes = [use.node for use in value.uses()]
    others = [node for node in nodes if op_name(node) not in SEQUENCE_ATTENTION]
    through = all(op_name(node) in BETWEEN and is_attended(node.outputs[0]) for node in others)
    return bool(nodes) and through and not value.is_graph_output()


def merge(graph: ir.Graph, linears: list[ir.Node]) -> None:
    first = min(linears, key=list(graph).index)
    operands = [first.inputs[0], joined(graph, [weight_of(linear.inputs[1]) for linear in linears])]
    if any(op_name(linear) == "llmc.LinearBias" for linear in linears):
        operands.append(joined(graph, biases(linears)))
    product = emit(first, "llmc.LinearBias" if len(operands) == 3 else "llmc.Linear", operands)[0]
    sizes = [size for linear in linears if isinstance(size := dims(linear.outputs[0])[1], int)]
    parts = emit(first, "Split", [product, ints_constant(graph, sizes)], n_results=len(sizes), axis=1)
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
