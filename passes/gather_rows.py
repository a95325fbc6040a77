"""Compute logits only for the rows that are asked for.

rewrite:
    llmc.Linear(RMSNormalization(h, w), W)                              h [M, K]
    -->
    llmc.Linear(RMSNormalization(Gather(h, rows), w), W)                rows i64[R]

    llmc.Linear(llmc.PoolMean(h), W)
    -->
    llmc.Linear(llmc.PoolMeanRows(h, positions, rows), W)               likewise of llmc.PoolFirst
refuses: to go above an operator with two operands that depend on tokens, or whose result has another user.

The rows are gathered as early as that allows: before the last norm when it stands alone, after it when it also makes
the residual sum.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.graph import attribute, constant, emit, is_last_axis, prune, used_once
from llmc.compiler.graph.shapes import BROADCAST, SAME_AS_FIRST, attributes_of, dims, ints
from llmc.compiler.graph.text import op_name
from llmc.compiler.ops import DOMAIN, POOLS

M, R = ir.SymbolicDim("M"), ir.SymbolicDim("R")
NORMS = ("RMSNormalization", "LayerNormalization", "Softmax", "LogSoftmax")


def gather_rows(model: ir.Model) -> int:
    """Assumes the result `logits` [M, V]; leaves `logits` [R, V] and the input `rows` i64[R]. Returns the number of
    nodes that now see R rows."""
    graph = model.graph
    if any(value.name == "rows" for value in graph.inputs):
        return 0
    logits = graph.outputs[0]
    chain: list[tuple[ir.Node, int]] = []
    value = logits
    while (step := row_wise(value)) is not None and (value is logits or used_once(value)):
        chain.append(step)
        above = step[0].inputs[step[1]]
        assert above is not None
        value = above
    rows = ir.Value(name="rows", shape=ir.Shape([R]), type=ir.TensorType(ir.DataType.INT64))
    graph.inputs.insert([value.name for value in graph.inputs].index("page_table") + 1, rows)
    gathered = taken(graph, chain[-1][0] if chain else None, value, rows)
    for node, operand in reversed(chain):
        inputs = [gathered if i == operand else value for i, value in enumerate(node.inputs)]
        gathered = emit(node, op_name(node), inputs, **attributes_of(node))[0]
    maker = logits.producer()
    assert maker is not None
    gathered.name, logits.name = logits.name, None
    graph.outputs[0] = gathered
    prune([maker])
    return len(chain)


def taken(graph: ir.Graph, before: ir.Node | None, value: ir.Value, rows: ir.Value) -> ir.Value:
    """The rows of a value that `rows` asks for, emitted in front of `before`; None: at the end, as the graph's
    result."""
    node = value.producer()
    if node is not None and node.op_type in POOLS:
        positions = next(value for value in graph.inputs if value.name == "positions")
        return emit(node, f"{op_name(node)}Rows", [node.inputs[0], positions, rows])[0]
    if before is not None:
        return emit(before, "Gather", [value, rows], axis=0)[0]
    end = ir.Node("", "Identity", [value])
    graph.append(end)
    gathered = emit(end, "Gather", [value, rows], axis=0)[0]
    graph.remove(end, safe=True)
    return gathered


def row_wise(value: ir.Value) -> tuple[ir.Node, int] | None:
    """The node that makes this value row by row from one of its operands, the rest being constants; and which."""
    node = value.producer()
    if node is None or len(node.outputs) != 1 or dims(value)[:1] != (M,):
        return None
    varying = [i for i, operand in enumerate(node.inputs) if operand is not None and constant(operand) is None]
    if len(varying) != 1 or len(dims(node.inputs[varying[0]])) != len(dims(value)):
        return None
    if node.domain == DOMAIN:
        known = "Linear" in node.op_type or node.op_type == "Silu"
    elif node.op_type in NORMS:
        known = is_last_axis(node, attribute(node, "axis", -1))
    elif node.op_type == "Pad":
        known = len(node.inputs) == 4 and ints(node.inputs[3]) == [-1]
    else:
        known = node.op_type in (SAME_AS_FIRST | BROADCAST) - {"Trilu", "RotaryEmbedding"}
    return (node, varying[0]) if known else None
