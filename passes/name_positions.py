"""Take tokens' positions from an input, where the graph counts them itself.

rewrite:
    Unsqueeze(Range(0, sequence, 1), [0])
    -->
    position_ids

    Add(Sub(CumSum(mask), 1), 2)
    -->
    Add(position_ids, 2)
refuses: anything else that depends on how long the sequence is, and reaches the tokens.

Such values are found by what they hold (0, 1, 2, …, or that plus a constant), not by how they are made.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from llmc.compiler.graph import add_constant, attribute, constant, emit, ints_constant, producer, prune, replace
from llmc.compiler.graph.probe import SHAPE_OPERANDS, Probe, settle_shapes
from llmc.compiler.graph.shapes import dims
from llmc.runtime.errors import LlmcError

MOST_OFFSET = 1024
"""The largest constant that may be added to positions: OPT's rows begin at 2."""


def name_positions(model: ir.Model, *, n_context: int) -> int:
    """Assumes inputs `input_ids` and `position_ids` [batch, sequence], shapes, and attention without masks. Leaves no
    value over tokens that depends on sizes. Returns the number of values that are now made of position_ids."""
    graph = model.graph
    positions = graph.inputs[1]
    probes = settle_shapes(graph, n_context)
    counted = lengths(graph)
    n_rewrites = 0
    for node in list(graph):
        for value in node.outputs:
            if value not in counted or node.graph is None:
                continue
            offset = counts(value, probes) if value.uses() else None
            if offset is not None and len(dims(value)) > 1:
                replace(value, like(value, shifted(node, positions, offset, value.dtype)))
                n_rewrites += 1
            elif offset is not None:
                n_rewrites += look_up(value, positions, offset)
    prune(reversed(graph))
    if n_rewrites:
        settle_shapes(graph)
    refuse_lengths(graph)
    return n_rewrites


def lengths(graph: ir.Graph) -> set[ir.Value]:
    """Values that depend on sizes, and on no token and no position."""
    sizes = {value for node in graph if node.op_type == "Shape" for value in node.outputs}
    for node in graph:
        varying = [value for value in node.inputs if value is not None and not value.is_initializer()]
        if varying and all(value in sizes for value in varying):
            sizes.update(node.outputs)
    return sizes


def counts(value: ir.Value, probes: Sequence[Probe]) -> int | None:
    """c, if the value is c, c + 1, c + 2, … along the sequence: [sequence], [1, sequence], [batch, sequence, 1], …"""
    shape = [str(size) for size in dims(value)]
    if "sequence" not in (shape[:1] if len(shape) == 1 else shape[1:]) or not set(shape) <= {"1", "batch", "sequence"}:
        return None
    if shape.count("sequence") > 1 or "batch" in shape[1:]:
        return None
    offset = int(probes[0].contents(value).reshape(-1)[0])
    for probe in probes:
        found = probe.contents(value)
        rows = found.reshape(-1, probe.sizes["sequence"])
        if not 0 <= offset <= MOST_OFFSET or (rows != np.arange(rows.shape[1]) + offset).any():
            return None
    return offset


def like(value: ir.Value, positions: ir.Value) -> ir.Value:
    """Positions [batch, sequence], with as many more axes of 1 as the value has."""
    axes = [axis for axis, size in enumerate(dims(value)) if axis and str(size) != "sequence"]
    node, graph = value.producer(), value.graph
    assert node is not None
    assert isinstance(graph, ir.Graph)
    return emit(node, "Unsqueeze", [positions, ints_constant(graph, axes)])[0] if axes else positions


def shifted(before: ir.Node, positions: ir.Value, offset: int, dtype: ir.DataType | None) -> ir.Value:
    graph = before.graph
    assert isinstance(graph, ir.Graph)
    value = positions
    if offset:
        value = emit(before, "Add", [value, add_constant(graph, np.array(offset), f"position.{offset}")])[0]
    return value if dtype in (None, ir.DataType.INT64) else emit(before, "Cast", [value], to=int(str(dtype.value)))[0]


def look_up(value: ir.Value, positions: ir.Value, offset: int) -> int:
    """Tables of positions that are read for one sequence, [sequence, …], are read for each of the batch."""
    n_rewrites = 0
    for use in list(value.uses()):
        node = use.node
        looks_up = node.op_type == "Gather" and use.idx == 1 and attribute(node, "axis", 0) == 0
        if looks_up and constant(node.inputs[0]) is not None:
            at = shifted(node, positions, offset, ir.DataType.INT64)
            replace(node.outputs[0], emit(node, "Gather", [node.inputs[0], at], axis=0)[0])
            n_rewrites += 1
    return n_rewrites


def refuse_lengths(graph: ir.Graph) -> None:
    """Refuse sizes that reach tokens.  Values made of positions alone may use them: tabulate_positions checks whether
    they depend on them."""
    sizes = lengths(graph)
    alone = sizes | {graph.inputs[1]}
    for node in graph:
        if all(value is None or value in alone or value.is_initializer() for value in node.inputs):
            alone.update(node.outputs)
        if node.op_type == "Shape" or set(node.outputs) <= alone:
            continue
        for index, value in enumerate(node.inputs):
            if value is None or value not in sizes or index in SHAPE_OPERANDS.get(node.op_type, ()):
                continue
            maker = producer(value)
            raise LlmcError(
                f"a {node.op_type} takes a value of shape {value.shape} that depends on how long the sequence is, and "
                "is neither its positions nor a causal mask",
                place=f"node {maker.name if maker else node.name}",
                hint="export the decoder with position_ids as an input",
            )
