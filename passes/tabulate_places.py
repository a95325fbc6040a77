"""Look up what depends on a patch's place in its picture alone, rather than work it out for every picture.

rewrite:
    Cos(Concat(line · f, column · f))                          line, column = place[:, 0], place[:, 1]
    -->
    Add(Gather(table.0 [n, D], line), Gather(table.1 [n, D], column))
where each element depends on one of the two, and the other's table has 0 there: the sum is what it was, to the bit.
refuses: elements that depend on both.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from llmc.compiler.graph import add_constant, emit, replace
from llmc.compiler.graph.run import extract, runner
from llmc.compiler.graph.shapes import dims
from llmc.compiler.weights import Array, Weight
from llmc.runtime.errors import LlmcError

PLACE, AXES = "place", ("line", "column")


def tabulate_places(model: ir.Model, *, n_places: int) -> int:
    """Assumes the input `place` i64 [N, 2], both less than n_places.  Leaves `line` and `column` i64 [N] in its place,
    with no other use than Gather from tables of n_places rows.  Returns the number of values that are looked up."""
    graph = model.graph
    place = next((value for value in graph.inputs if value.name == PLACE), None)
    if place is None:
        return 0
    n = dims(place)[0]
    assert isinstance(n, int)
    found = frontier(graph, place)
    tables = [[table_of(value, place, n, n_places, axis) for axis in range(len(AXES))] for value in found]
    axes = [ir.Value(name=name, shape=ir.Shape([n]), type=ir.TensorType(ir.DataType.INT64)) for name in AXES]
    graph.inputs.extend(axes)
    for number, (value, both) in enumerate(zip(found, tables, strict=True)):
        node = value.producer()
        assert node is not None
        parts = []
        for axis, table in zip(axes, both, strict=True):
            constant = add_constant(graph, table, f"table.{axis.name}.{number}")
            parts.append(emit(node, "Gather", [constant, axis], axis=0)[0])
        replace(value, emit(node, "Add", parts)[0])
    graph.inputs.remove(place)
    return len(found)


def frontier(graph: ir.Graph, place: ir.Value) -> list[ir.Value]:
    """The last values on each path that depend on places alone: rows [N, …] of two axes."""
    alone = {place}
    for node in graph:
        inputs = {value for value in node.inputs if value is not None and not value.is_initializer()}
        if inputs and inputs <= alone:
            alone.update(node.outputs)
    found = [
        value
        for node in graph
        for value in node.outputs
        if value in alone and any(use.node.outputs[0] not in alone for use in value.uses())
    ]
    for value in found:
        if len(dims(value)) != 2 or dims(value)[0] != dims(place)[0]:
            raise LlmcError("tabulate_places: what places are made into is not a row for each", place=str(value.name))
    return found


def table_of(value: ir.Value, place: ir.Value, n: int, n_places: int, axis: int) -> Weight:
    """What the value is at each number along one axis, in the elements that depend on it; 0 in the others.  Those that
    depend on neither are in the first one's table."""
    part = extract(value, [place])
    shape = (n_places, *(size for size in dims(value)[1:] if isinstance(size, int)))

    def read() -> Array:
        run = runner(part)

        def at(places: Array) -> Array:
            """The value at places [k, 2]; n at a time, since so many are what the graph is of."""
            rows = [places[i : i + n] for i in range(0, len(places), n)]
            filled = [np.concatenate([some, np.zeros((n - len(some), 2), np.int64)]) for some in rows]
            made = [next(iter(run({PLACE: some}).values())) for some in filled]
            return np.concatenate(made)[: len(places)]

        numbers = np.arange(n_places)
        along = [np.stack([numbers * (axis == 0), numbers * (axis == 1)], 1) for axis in range(2)]
        lines, columns = (at(places) for places in along)
        by_line, by_column = ((rows != rows[:1]).any(0) for rows in (lines, columns))
        tables = np.where(by_column, 0, lines), np.where(by_column, columns, 0)
        both = np.stack([numbers, numbers[::-1]], 1)
        if (by_line & by_column).any() or not np.array_equal(at(both), tables[0] + tables[1][::-1]):
            raise LlmcError("tabulate_places: an element depends on a patch's line and on its column")
        return tables[axis].astype(np.float32)

    return Weight.computed(f"table.{AXES[axis]}", shape, read)
