"""Look up all rows that a step's tokens and positions choose with one node.

rewrite:
    x = Gather(embedding, tokens, axis=0)
    c = Gather(table.cos, positions, axis=0)
    s = Gather(table.sin, positions, axis=0)
    -->
    x, c, s = llmc.Gather3(embedding, tokens, table.cos, positions, table.sin, positions)
refuses: tables that are no constants of floats, or rows along another axis; indices that are no input of the step; rows
that only products read, which are written in the order that these want; a single lookup.

For GPUs, where each would be a launch; those of angles would stand between the first product and attention, while
memory has nothing to do.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.bind import STEP_INPUTS, multiplied
from llmc.compiler.graph import attribute, constant, emit, replace
from llmc.compiler.ops import MOST_TABLES, gathers_name


def gather_together(model: ir.Model) -> int:
    """Assumes a step graph; leaves no two lookups by its inputs that could be one.  Returns the number of lookups that
    were joined."""
    n_rewrites = 0
    found = [node for node in model.graph if is_lookup(node)]
    for start in range(0, len(found), MOST_TABLES):
        some = found[start : start + MOST_TABLES]
        if len(some) < 2:
            break
        inputs = [value for node in some for value in node.inputs]
        results = emit(some[0], f"llmc.{gathers_name(len(some))}", inputs, n_results=len(some))
        for node, result in zip(some, results, strict=True):
            replace(node.outputs[0], result)
        n_rewrites += len(some)
    return n_rewrites


def is_lookup(node: ir.Node) -> bool:
    """Rows of a constant, by an input of the step."""
    if (node.domain, node.op_type) != ("", "Gather") or attribute(node, "axis", 0) != 0:
        return False
    table, index = node.inputs
    by_step = index is not None and index.is_graph_input() and index.name in STEP_INPUTS
    rows = constant(table)
    return by_step and rows is not None and rows.dtype == ir.DataType.FLOAT and not is_multiplied(node.outputs[0])


def is_multiplied(value: ir.Value) -> bool:
    """Whether all that reads it are products that round it."""
    return not value.is_graph_output() and all(use.idx == multiplied(use.node) for use in value.uses())
