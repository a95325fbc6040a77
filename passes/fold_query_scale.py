"""Let attention scale its scores, rather than scale the queries before it.

rewrite:
    llmc.CausalAttention(Mul(q, c), k, v, scale=s)
    -->
    llmc.CausalAttention(q, k, v, scale=s·c)
refuses: a c that is not one number; scaled queries with another user.

Rotary and Reshape may stand between: scaling passes through them. The stored weights are left alone: scaling those
would round them once more.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.graph import number, op_name, producer, replace, used_once
from llmc.compiler.ops import SEQUENCE_ATTENTION

TRANSPARENT = ("llmc.Rotary", "Reshape")


def fold_query_scale(model: ir.Model) -> int:
    """Assumes and leaves a graph over M tokens with CausalAttention. Returns the number of rewrites."""
    n_rewrites = 0
    for node in list(model.graph):
        if op_name(node) in SEQUENCE_ATTENTION:
            while fold_one(node):
                n_rewrites += 1
    return n_rewrites


def fold_one(attention: ir.Node) -> bool:
    value = attention.inputs[0]
    above = producer(value, *TRANSPARENT)
    while above is not None and value is not None and used_once(value):
        value = above.inputs[0]
        above = producer(value, *TRANSPARENT)
    scaled = producer(value, "Mul")
    if scaled is None or value is None or not used_once(value):
        return False
    for x, factor in (scaled.inputs, reversed(scaled.inputs)):
        c = number(factor)
        if x is not None and c is not None:
            scale = attention.attributes["scale"].as_float() * c
            attention.attributes["scale"] = ir.AttrFloat32("scale", scale)
            replace(value, x)
            return True
    return False
