"""Cut a value into its parts with one Split, where it is cut slice by slice.

rewrite:
    x[…, :64], x[…, 64:96], x[…, 96:]                                    x [batch, sequence, 128]
    -->
    Split(x, [64, 32, 32], axis=2)
refuses: slices that overlap, leave something out or repeat; heads that are cut, which rotary embedding does.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.graph import constant, emit, ints_constant, replace
from llmc.compiler.graph.shapes import dims, ints

RANK = 3
"""The rank of a value whose heads are not told apart yet."""
Cut = tuple[int, int, ir.Node]


def form_split(model: ir.Model) -> int:
    """Assumes and leaves a graph with shapes. Returns the number of values that are now split."""
    slices: dict[ir.Value, list[Cut]] = {}
    for node in model.graph:
        found = cut(node) if node.op_type == "Slice" else None
        if found is not None and node.inputs[0] is not None:
            slices.setdefault(node.inputs[0], []).append((*found, node))
    return sum(split(model.graph, x, cuts) for x, cuts in slices.items())


def cut(node: ir.Node) -> tuple[int, int] | None:
    """Where a slice of the last axis begins and ends."""
    x, *operands = node.inputs
    if len(dims(x)) != RANK or len(operands) < 3 or any(constant(value) is None for value in operands):
        return None
    starts, ends, axes, *steps = (ints(value) for value in operands)
    size = dims(x)[-1]
    if (
        axes not in ([-1], [RANK - 1])
        or steps not in ([], [[1]])
        or not isinstance(size, int)
        or not starts
        or not ends
    ):
        return None
    start, stop, _ = slice(starts[0], ends[0]).indices(size)
    return start, stop


def split(graph: ir.Graph, x: ir.Value, cuts: list[Cut]) -> bool:
    ordered = sorted(cuts, key=lambda cut: cut[:2])
    ends = [0, *(stop for _, stop, _ in ordered)]
    if len(cuts) < 2 or ends[:-1] != [start for start, _, _ in ordered] or ends[-1] != dims(x)[-1]:
        return False
    sizes = ints_constant(graph, [stop - start for start, stop, _ in ordered])
    parts = emit(cuts[0][2], "Split", [x, sizes], n_results=len(cuts), axis=RANK - 1)
    for part, (_, _, node) in zip(parts, ordered, strict=True):
        replace(node.outputs[0], part)
    return True
