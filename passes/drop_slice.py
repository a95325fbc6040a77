"""Take a piece from where it came, when it is cut from what it was joined into.

rewrite:
    Slice(Concat(a, b, axis=3), 0, size of a, axis 3)
    -->
    a
refuses: a slice of more or less than one piece, or along another axis.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.graph import attribute, constant, producer, replace
from llmc.compiler.graph.shapes import dims, ints


def drop_slice(model: ir.Model) -> int:
    """Assumes and leaves any graph with shapes.  Returns the number of slices dropped."""
    n_rewrites = 0
    for node in list(model.graph):
        piece = sliced_piece(node) if node.op_type == "Slice" else None
        if piece is not None:
            replace(node.outputs[0], piece)
            n_rewrites += 1
    return n_rewrites


def sliced_piece(node: ir.Node) -> ir.Value | None:
    x, *operands = node.inputs
    concat = producer(x, "Concat")
    if concat is None or len(operands) < 3 or any(constant(value) is None for value in operands):
        return None
    rank = len(dims(x))
    starts, ends, axes, *steps = (ints(value) for value in operands)
    axis = attribute(concat, "axis") % rank
    if not starts or not ends or axes not in ([axis], [axis - rank]) or steps not in ([], [[1]]):
        return None
    return piece_between(concat, axis, slice(starts[0], ends[0]))


def piece_between(concat: ir.Node, axis: int, wanted: slice) -> ir.Value | None:
    whole = dims(concat.outputs[0])[axis]
    if not isinstance(whole, int):
        return None
    first, last, _ = wanted.indices(whole)
    start = 0
    for piece in concat.inputs:
        size = dims(piece)[axis]
        if not isinstance(size, int):
            return None
        if (start, start + size) == (first, last):
            return piece
        start += size
    return None
