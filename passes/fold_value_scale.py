"""Scale what attention gives, rather than the values before it.

rewrite:
    llmc.CausalAttention(q, k, Mul(v, c))
    -->
    Mul(llmc.CausalAttention(q, k, v), c)
refuses: a c that is not one number; scaled values with another user.

A result is a weighted sum of values, so a factor of them all is one of it.  Reshape may stand between.  Queries, keys
and values then come from one product (merge_qkv); the stored weights are left alone, as scaling would round them again.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.graph import emit, number, op_name, producer, replace, used_once
from llmc.compiler.graph.shapes import attributes_of
from llmc.compiler.ops import SEQUENCE_ATTENTION


def fold_value_scale(model: ir.Model) -> int:
    """Assumes and leaves a graph over M tokens with CausalAttention.  Returns the number of rewrites."""
    n_rewrites = 0
    for node in list(model.graph):
        found = scaled(node.inputs[2]) if op_name(node) in SEQUENCE_ATTENTION else None
        if found is None:
            continue
        value, x, factor = found
        (result,) = emit(node, op_name(node), list(node.inputs), like=node, **attributes_of(node))
        replace(node.outputs[0], emit(node, "Mul", [result, factor])[0])
        replace(value, x)
        n_rewrites += 1
    return n_rewrites


def scaled(v: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """The Mul that makes the values, looking through reshapes; its operand that is scaled, and the number."""
    while v is not None and used_once(v) and (reshape := producer(v, "Reshape")) is not None:
        v = reshape.inputs[0]
    node = producer(v, "Mul")
    if node is None or v is None or not used_once(v):
        return None
    pairs = (tuple(node.inputs), tuple(reversed(node.inputs)))
    return next(((v, x, c) for x, c in pairs if x is not None and c is not None and number(c) is not None), None)
