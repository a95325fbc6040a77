"""Compute logits for every row of a step.

rewrite:
    Gather(h, rows, axis=0)                     h [M, …], rows i64[R]
    -->
    h                                           R becomes M, and the input `rows` is gone
refuses: nothing; a graph without `rows` is left as it is.

For GPUs.  A decode step wants the logits of all its tokens, so that a launch which picks rows would pick all of them.
Without it the last norm lies between two products, as others do, and can be deferred as they are.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.graph import replace
from llmc.compiler.graph.shapes import dims
from llmc.passes.gather_rows import M, R


def take_all_rows(model: ir.Model) -> int:
    """Assumes a step graph; leaves one whose results have M rows.  Returns the number of values that have M rows
    now."""
    graph = model.graph
    rows = next((value for value in graph.inputs if value.name == "rows"), None)
    if rows is None:
        return 0
    for node in [use.node for use in rows.uses()]:
        above = node.inputs[0]
        assert node.op_type == "Gather"
        assert above is not None
        replace(node.outputs[0], above)
    graph.inputs.remove(rows)
    behind = [value for node in graph for value in node.outputs if R in dims(value)]
    for value in behind:
        value.shape = ir.Shape([M if size == R else size for size in dims(value)])
    return len(behind)
