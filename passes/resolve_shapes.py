"""Write sizes as numbers, and as the batch and the sequence, however an exporter worked them out.

rewrite:
    Reshape(x, Concat(Gather(Shape(y), 0), Mul(Gather(Shape(z), 1), 1), [4], [Div(64, 4)]))
    -->
    Reshape(x, Concat(Shape(input_ids, start=0, end=1), Shape(input_ids, start=1, end=2), [4], [16]))

    Concat(nothing [batch, 4, 0, 16], k)
    -->
    k
refuses: an operator that has no rule for its shape and whose result depends on the tokens; sizes that depend on them;
shapes of activations that change where sequences get long.  A mere number of that kind is left as it is written, for a
mask may be made of it.

Equal sizes are written equally, so that equal parts, say the masks of all layers, become one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass

from llmc.compiler.graph import add_constant, attribute, constant, emit, ints_constant, producer, prune, replace
from llmc.compiler.graph.probe import FEW, Probe, settle_shapes
from llmc.compiler.graph.shapes import dims
from llmc.compiler.weights import Array, Weight

AXES = ("batch", "sequence")


def resolve_shapes(model: ir.Model, *, n_context: int) -> int:
    """Assumes inputs `input_ids` and `position_ids` [batch, sequence]. Leaves a shape and a type on every value, and
    sizes that are so for 1 to n_context tokens. Returns the number of values that are written otherwise."""
    graph = model.graph
    probes = settle_shapes(graph, n_context)
    plain = plain_values(graph, probes[0])
    found = {value: [probe.contents(value) for probe in probes] for value in plain if value.uses()}
    axes = {tuple(probe.sizes[name] for probe in probes): axis for axis, name in enumerate(AXES)}
    n_rewrites = 0
    for node in list(graph):
        if node.op_type == "Concat":
            n_rewrites += drop_nothing(node)
        for value in node.outputs:
            if value in found and len(value.uses()) and not is_written(value, graph):
                n_rewrites += write(node, value, found[value], axes)
    prune(reversed(graph))
    CommonSubexpressionEliminationPass()(model)
    return n_rewrites


def plain_values(graph: ir.Graph, probe: Probe) -> set[ir.Value]:
    """Small values that follow from numbers and sizes alone: from no weight, and from no token's position."""
    follows = {value for value in graph.initializers.values() if not isinstance(value.const_value, Weight)}
    plain: set[ir.Value] = set()
    for node in graph:
        if node.op_type == "Shape" or all(value is None or value in follows for value in node.inputs):
            follows.update(node.outputs)
            plain.update(value for value in node.outputs if value.shape is not None and len(value.shape) < 2)
    return {value for value in plain if np.prod(probe.shapes[value], dtype=int) <= FEW}


def is_written(value: ir.Value, graph: ir.Graph) -> bool:
    """Whether the node is one that `write` has made, of sizes that are not all numbers."""
    node = value.producer()
    if node is None:
        return constant(value) is not None
    if node.op_type == "Shape":
        ends = attribute(node, "start", 0), attribute(node, "end", 0)
        return node.inputs[0] is graph.inputs[0] and ends in ((0, 1), (1, 2))
    return node.op_type in ("Concat", "Squeeze") and all(
        operand is not None and (constant(operand) is not None or producer(operand, "Shape") is not None)
        for operand in node.inputs
    )


def write(node: ir.Node, value: ir.Value, found: Sequence[Array], axes: Mapping[tuple[int, ...], int]) -> bool:
    """Replace a result of the node.  found: what it holds at the probes.  axes: what batch and sequence are there."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    if len({array.shape for array in found}) > 1:
        return False
    if all(np.array_equal(found[0], array) for array in found):
        name = f"sizes.{found[0].dtype}.{'_'.join(map(str, found[0].reshape(-1)))}{'.0' * (found[0].ndim == 0)}"
        replace(value, add_constant(graph, found[0].copy(order="C"), name.replace("-", "m")))
        return True
    if found[0].dtype != np.int64:
        return False
    parts: list[int | ir.Value] = []
    for sizes in zip(*(array.reshape(-1).tolist() for array in found), strict=True):
        if len(set(sizes)) > 1 and sizes not in axes:
            return False
        parts.append(size(node, axes[sizes]) if sizes in axes else sizes[0])
    joined = [part if isinstance(part, ir.Value) else ints_constant(graph, [part]) for part in parts]
    if found[0].ndim == 0:
        replace(value, emit(node, "Squeeze", [joined[0]])[0])
    else:
        replace(value, joined[0] if len(joined) == 1 else emit(node, "Concat", joined, axis=0)[0])
    return True


def drop_nothing(node: ir.Node) -> bool:
    """Leave out of a Concat what has no element along its axis."""
    axis = attribute(node, "axis")
    parts = [value for value in node.inputs if dims(value)[axis] != 0]
    if not parts or len(parts) == len(node.inputs) or node.graph is None:
        return False
    whole = parts[0] if len(parts) == 1 else emit(node, "Concat", parts, axis=axis)[0]
    assert whole is not None
    replace(node.outputs[0], whole)
    return True


def size(before: ir.Node, axis: int) -> ir.Value:
    """The batch or the sequence, as a vector of one number."""
    graph = before.graph
    assert isinstance(graph, ir.Graph)
    return emit(before, "Shape", [graph.inputs[0]], start=axis, end=axis + 1)[0]
