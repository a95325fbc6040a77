"""Give heads an axis of their own, where a model counts them among the tokens to treat each in the same way.

rewrite:
    h = Reshape(x [batch, sequence, H·D], [-1, D])
    y = Reshape(Mul(RMSNormalization(h, w), g), [batch, sequence, H·D])
    -->
    h = Reshape(x, [0, 0, H, D])
    y = Reshape(Mul(RMSNormalization(h, w), g), [batch, sequence, H·D])
refuses: such heads that reach other operators than elementwise ones and norms of their last axis.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.graph import attribute, emit, ints_constant, is_last_axis, replace
from llmc.compiler.graph.shapes import BROADCAST, SAME_AS_FIRST, dims
from llmc.compiler.ops.define import Dim, Dims

TOKENS = ["batch", "sequence"]
NORMS = ("LayerNormalization", "LogSoftmax", "RMSNormalization", "Softmax")


def unfold_heads(model: ir.Model) -> int:
    """Assumes values over [batch, sequence]; leaves heads an axis of their own. Returns the number of values."""
    graph = model.graph
    folded = {value for node in graph for value in node.outputs if value.shape is not None and n_heads(value)}
    left = {value for value in folded if not all(keeps(node, folded) for node in around(value))}
    while left:  # what is computed with these has to stay too
        folded -= left
        left = {v for v in folded if any(w not in folded and w.shape is not None and n_heads(w) for w in beside(v))}
    for value in [value for node in graph for value in node.outputs if value in folded]:
        unfold(graph, value, n_heads(value))
    return len(folded)


def n_heads(value: ir.Value) -> int:
    """H of a value [H·batch·sequence, …]; 0 for others."""
    factors = str(value.shape[0]).split("*") if value.shape else []
    numbers = [factor for factor in factors if factor.isdigit()]
    return int(numbers[0]) if len(numbers) == 1 and sorted({*factors} - {*numbers}) == TOKENS else 0


def around(value: ir.Value) -> list[ir.Node]:
    node = value.producer()
    return [*([node] if node else []), *(use.node for use in value.uses())]


def beside(value: ir.Value) -> list[ir.Value]:
    """The values that are computed from this one, those that are combined with it, and those it is computed from."""
    found = [v for node in around(value) for v in (*node.inputs, *node.outputs) if v is not None]
    return [v for v in found if v is not value]


def keeps(node: ir.Node, folded: set[ir.Value]) -> bool:
    """Whether the node does the same with heads as an axis, or is where heads join the tokens or leave them."""
    if node.op_type == "Reshape":
        source, result = node.inputs[0], node.outputs[0]
        return (source in folded) != (result in folded) and is_whole(result if source in folded else source)
    others = [value for value in node.inputs if value is not None and value not in folded]
    if any(len(dims(value)) > 1 for value in others):
        return False
    if node.op_type in NORMS:
        return is_last_axis(node, attribute(node, "axis", -1))
    return node.op_type in SAME_AS_FIRST | BROADCAST


def is_whole(value: ir.Value | None) -> bool:
    """[batch, sequence, …]"""
    return value is not None and list(map(str, dims(value)[:2])) == TOKENS and len(dims(value)) > 2


def unfold(graph: ir.Graph, value: ir.Value, heads: int) -> None:
    node = value.producer()
    assert node is not None
    rest: Dims = dims(value)[1:]
    if node.op_type == "Reshape":
        sizes = [size for size in (heads, *rest) if isinstance(size, int)]
        replace(value, emit(node, "Reshape", [node.inputs[0], ints_constant(graph, [0, 0, *sizes])])[0])
        return
    tokens: list[Dim] = [ir.SymbolicDim(name) for name in TOKENS]
    value.shape = ir.Shape([*tokens, heads, *rest])
    if "axis" in node.attributes:
        node.attributes["axis"] = ir.AttrInt64("axis", -1)
