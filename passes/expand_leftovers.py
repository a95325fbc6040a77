"""Spell operators out in standard ones again, where they have no kernel and no other pass has fused them.

rewrite:
    llmc.Silu(x)
    -->
    Mul(x, Sigmoid(x))
likewise llmc.Rotary.

    ReduceMean(Pow(x, 2)); Pow(x, 0.5)
    -->
    ReduceMean(Mul(x, x)); Sqrt(x)
refuses: other powers, and squares that no mean is taken of (Nemotron's activation).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from llmc.compiler import ops
from llmc.compiler.graph import add_constant, emit, ints_constant, number, op_name, replace
from llmc.compiler.graph.shapes import attributes_of
from llmc.passes.slices import size_of


def rotary(
    op: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, *, num_heads: int, rotary_dim: int, interleaved: int
) -> Any:
    """llmc.Rotary in plain operators: TVM's importer does not know RotaryEmbedding."""
    half, width, axis = rotary_dim // 2, size_of(x) // num_heads, op.ints(2)
    heads = op.Reshape(x, op.ints(-1, num_heads, width))  # [M, H, D]
    ends, step = (op.ints(rotary_dim), op.ints(2)) if interleaved else (op.ints(half), op.ints(1))
    a = op.Slice(heads, op.ints(0), ends, axis, step)  # [M, H, RD/2]
    b = op.Slice(heads, op.ints(1 if interleaved else half), op.ints(rotary_dim), axis, step)
    cos, sin = (op.Unsqueeze(value, op.ints(1)) for value in (cos, sin))
    parts = [op.Sub(op.Mul(a, cos), op.Mul(b, sin)), op.Add(op.Mul(b, cos), op.Mul(a, sin))]
    if interleaved:
        pairs = op.Concat(*(op.Unsqueeze(part, op.ints(3)) for part in parts), axis=3)
        parts = [op.Reshape(pairs, op.ints(-1, num_heads, rotary_dim))]
    if rotary_dim < width:
        parts.append(op.Slice(heads, op.ints(rotary_dim), op.ints(width), axis, op.ints(1)))
    return op.Reshape(op.Concat(*parts, axis=2), op.ints(-1, size_of(x)))


def power(op: Any, x: ir.Value | None, exponent: ir.Value | None) -> Any:
    """Pow with an exponent for which there is an operator, that costs a tenth of it."""
    return op.Mul(x, x) if number(exponent) == 2 else op.Sqrt(x)


def is_power(node: ir.Node) -> bool:
    if node.op_type != "Pow":
        return False
    of_mean = all(use.node.op_type == "ReduceMean" for use in node.outputs[0].uses())
    return number(node.inputs[1]) == 0.5 or (number(node.inputs[1]) == 2 and of_mean)


DEFINITIONS: dict[str, Callable[..., Any]] = {"llmc.Silu": ops.Silu, "llmc.Rotary": rotary}


class Emitter:
    """Stands in for the `op` of a definition in compiler/ops, and puts its nodes into the graph, in front of a node."""

    def __init__(self, before: ir.Node) -> None:
        self.before = before

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        def node(*inputs: ir.Value, n_results: int = 1, **attributes: Any) -> Any:
            results = emit(self.before, op_type, inputs, n_results=n_results, **attributes)
            return results if n_results > 1 else results[0]

        return node

    def ints(self, *numbers: int) -> ir.Value:
        assert isinstance(self.before.graph, ir.Graph)
        return ints_constant(self.before.graph, numbers)

    def scalar(self, number: int | float) -> ir.Value:
        assert isinstance(self.before.graph, ir.Graph)
        array = np.array(number, dtype=np.int64 if isinstance(number, int) else np.float32)
        return add_constant(self.before.graph, array, f"scalar.{array.dtype}.{number}")


def expand_leftovers(model: ir.Model) -> int:
    """Assumes and leaves any graph with shapes. Returns the number of nodes expanded."""
    n_rewrites = 0
    for node in list(model.graph):
        definition: Callable[..., Any] | None = power if is_power(node) else DEFINITIONS.get(op_name(node))
        if definition is not None:
            replace(node.outputs[0], definition(Emitter(node), *node.inputs, **attributes_of(node)))
            n_rewrites += 1
    return n_rewrites
