"""Let the rows of a picture see all of it.

rewrite:
    llmc.[RMSNorm][Rotary]PagedAttention(…, positions, page_table, k_cache.i, v_cache.i)
    -->
    llmc.[RMSNorm][Rotary]AheadPagedAttention(…, sees, positions, page_table, k_cache.i, v_cache.i)
refuses: attention of other kinds (sinks, biases by distance, latents, keys and values of another layer), and chunks.
States know nothing of what is behind a token: a model with some is refused too.

`sees` says for each row up to which position it sees: its own in a text, in a picture that of the last of its rows.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.graph import emit, op_name, replace
from llmc.compiler.graph.check import APPENDED, ATTENTION, WITH_STATE
from llmc.compiler.graph.shapes import attributes_of
from llmc.compiler.ops import AHEAD_PAGED_ATTENTION, DOMAIN
from llmc.runtime.errors import LlmcError

M = ir.SymbolicDim("M")
PLACES = 4
"""Operands of attention in front of which `sees` stands."""


def look_ahead(model: ir.Model) -> int:
    """Assumes a step graph; leaves attention that looks ahead alone, and the input `sees` i64[M].  Returns the number
    of nodes rewritten."""
    graph = model.graph
    if any(value.name == "sees" for value in graph.inputs):
        return 0
    sees = ir.Value(name="sees", shape=ir.Shape([M]), type=ir.TensorType(ir.DataType.INT64))
    nodes = [node for node in graph if op_name(node) in (*ATTENTION, *APPENDED, *WITH_STATE)]
    for node in nodes:
        if node.op_type not in AHEAD_PAGED_ATTENTION:
            raise refusal(node, f"{node.op_type} lets no row see what is behind it")
        if (window := node.attributes["window"].as_int()) < 0:
            raise refusal(node, f"a picture's rows may be in several chunks of {-window} tokens")
    for node in nodes:
        operands = [*node.inputs[:-PLACES], sees, *node.inputs[-PLACES:]]
        name = f"{DOMAIN}.{AHEAD_PAGED_ATTENTION[node.op_type]}"
        results = emit(node, name, operands, n_results=len(node.outputs), **attributes_of(node))
        for old, new in zip(node.outputs, results, strict=True):
            replace(old, new)
    graph.inputs.append(sees)
    return len(nodes)


def refusal(node: ir.Node, why: str) -> LlmcError:
    return LlmcError(f"look_ahead: {why}", place=f"node {node.name}")
