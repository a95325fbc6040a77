"""Let a gated delta rule work out its own gates.

rewrite:
    x = Add(a, bias)
    g = Mul(rate, Where(Greater(x, 20), x, Softplus(x)))
    llmc.StatefulGatedDeltaRule(qkv, g, Sigmoid(b), …)
    -->
    llmc.StatefulGatedDeltaRuleSoftplus(qkv, a, b, bias, rate, …)

    likewise Softplus(x) without the Where, which changes no bit of float32
refuses: gates of another form; a threshold below which softplus(x) is not x; a bias or a rate that is no constant [VH].

For GPUs, where each of these operators would be a launch, for two numbers a head.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.graph import constant, emit, number, op_name, producer, replace
from llmc.compiler.graph.shapes import dims

LINEAR_FROM = 16.0
"""exp(-16) is an eighth of the last bit of 16 in float32: from here on softplus(x) is x."""


def fuse_gates(model: ir.Model) -> int:
    """Assumes a step graph; leaves no gates of a delta rule beside it that it can work out.  Returns their number."""
    n_rewrites = 0
    for node in list(model.graph):
        if op_name(node) != "llmc.StatefulGatedDeltaRule":
            continue
        qkv, g, beta, *rest = node.inputs
        (rate, soft), made = scaled(g), producer(beta, "Sigmoid")
        x, bias = scaled(softplus_of(soft), "Add")[::-1]
        if made is None or rate is None or x is None or bias is None:
            continue
        inputs = [qkv, x, made.inputs[0], bias, rate, *rest]
        settings = {name: attribute.value for name, attribute in node.attributes.items()}
        results = emit(node, "llmc.StatefulGatedDeltaRuleSoftplus", inputs, n_results=2, **settings)
        for old, new in zip(node.outputs, results, strict=True):
            replace(old, new)
        n_rewrites += 1
    return n_rewrites


def scaled(value: ir.Value | None, op_type: str = "Mul") -> tuple[ir.Value | None, ir.Value | None]:
    """The constant [VH] among the two operands of a Mul or an Add, and the other one; None, None for another value."""
    made = producer(value, op_type)
    for vector, other in (made.inputs, made.inputs[::-1]) if made is not None else ():
        if constant(vector) is not None and dims(vector) == dims(other)[-1:]:
            return vector, other
    return None, None


def softplus_of(value: ir.Value | None) -> ir.Value | None:
    """x, if the value is softplus(x)."""
    if (where := producer(value, "Where")) is not None:
        above, x, value = where.inputs
        greater = producer(above, "Greater")
        limit = number(greater.inputs[1]) if greater is not None else None
        if greater is None or greater.inputs[0] is not x or limit is None or limit < LINEAR_FROM:
            return None
        made = producer(value, "Softplus")
        return x if made is not None and made.inputs[0] is x else None
    made = producer(value, "Softplus")
    return made.inputs[0] if made is not None else None
