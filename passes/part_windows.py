"""Tell attention within windows whom its patches see: other positions and pages than those of the whole picture.

rewrite:
    llmc.[Rotary]BidirectionalPagedAttention(…, positions, page_table, k_cache.i, v_cache.i)
    -->
    llmc.[Rotary]BidirectionalPagedAttention(…, window_positions, window_page_table, k_cache.i, v_cache.i)
where the graph's metadata says that the i-th attention is within windows.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.graph import op_name
from llmc.compiler.graph.check import WHOLE
from llmc.compiler.ops import IN_WINDOWS, window_name

TOLD = ("positions", "page_table")


def part_windows(model: ir.Model) -> int:
    """Assumes `positions` [N] and `page_table` [N, P]; leaves inputs like them of the other name, where a window is.
    Returns the number of attentions within windows."""
    graph = model.graph
    numbers = {int(number) for number in model.metadata_props.get(IN_WINDOWS, "").split()}
    by_name = {value.name: value for value in graph.inputs}
    if not numbers or window_name(TOLD[0]) in by_name:
        return 0
    attentions = [node for node in graph if op_name(node) in WHOLE]
    for name in TOLD:
        old = by_name[name]
        new = ir.Value(name=window_name(name), shape=old.shape, type=old.type)
        graph.inputs.insert(graph.inputs.index(old) + 1, new)
        for number in numbers:
            node = attentions[number]
            node.replace_input_with(list(node.inputs).index(old), new)
    return len(numbers)
