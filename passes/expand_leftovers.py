"""Spell out what only the passes know: operators that no kernel is written for and that were not fused.

rewrite:
    llmc.Silu(x)
    -->
    Mul(x, Sigmoid(x))
likewise llmc.Rotary.
refuses: nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from llmc.compiler import ops
from llmc.compiler.graph import add_constant, emit, ints_constant, op_name, replace
from llmc.compiler.graph_shapes import attributes_of

DEFINITIONS: dict[str, Callable[..., Any]] = {"llmc.Silu": ops.Silu, "llmc.Rotary": ops.Rotary}


class Emitter:
    """What a definition in compiler/ops.py is given to put its nodes into the graph, in front of one node."""

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
        definition = DEFINITIONS.get(op_name(node))
        if definition is not None:
            replace(node.outputs[0], definition(Emitter(node), *node.inputs, **attributes_of(node)))
            n_rewrites += 1
    return n_rewrites
