"""Slices along the last axis, as the passes around rotary embedding read and write them."""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.graph import constant, emit, ints_constant, is_last_axis, producer
from llmc.compiler.graph.shapes import dims, ints


def part_of(value: ir.Value | None, step: int = 1) -> tuple[ir.Value, int, int] | None:
    """x, start and stop, if the value is x[…, start:stop:step]."""
    node = producer(value, "Slice")
    if node is None or node.inputs[0] is None or any(constant(operand) is None for operand in node.inputs[1:]):
        return None
    starts, ends, axes = (ints(operand) for operand in node.inputs[1:4])
    steps = ints(node.inputs[4]) if len(node.inputs) > 4 else [1]
    if steps != [step] or not axes or len(axes) != 1 or not is_last_axis(node, axes[0]) or not starts or not ends:
        return None
    x = node.inputs[0]
    start, stop, _ = slice(starts[0], ends[0]).indices(size_of(x))
    return x, start, stop


def paired(a: ir.Value | None, b: ir.Value | None) -> ir.Value | None:
    """x, if the values are x[…, ::2] and x[…, 1::2]: the first and the second of each pair."""
    evens, odds = part_of(a, 2), part_of(b, 2)
    if evens is None or odds is None or evens[0] is not odds[0]:
        return None
    x, size = evens[0], size_of(evens[0])
    return x if size % 2 == 0 and (evens[1:], odds[1:]) == ((0, size), (1, size)) else None


def first_part(before: ir.Node, value: ir.Value, stop: int) -> ir.Value:
    """value[…, :stop], as a node in front of `before`."""
    graph = before.graph
    assert isinstance(graph, ir.Graph)
    bounds = [ints_constant(graph, [number]) for number in (0, stop, len(dims(value)) - 1, 1)]
    return emit(before, "Slice", [value, *bounds])[0]


def size_of(value: ir.Value) -> int:
    """The size of the last axis."""
    size = dims(value)[-1]
    assert isinstance(size, int)
    return size
