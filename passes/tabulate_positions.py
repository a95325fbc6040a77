"""Look up what depends on a token's position alone, rather than work it out in every step.

rewrite:
    Cos(Mul(Cast(Unsqueeze(position_ids)), inv_freq))
    -->
    Gather(table.cos [n_context, RD/2], position_ids)

    Gather(W, Add(position_ids, 2))
    -->
    Gather(W[positions] [n_context, C], position_ids)

    Expand(Log(Unsqueeze(Cast(Range(1, sequence + 1, 1)))), [batch, sequence, 1])
    -->
    Gather(table.expand [n_context, 1], position_ids)
refuses: a value that depends on the positions of other tokens or on how many they are (of computed tables found when
they are read); learned positions fewer than n_context.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from llmc.compiler.graph import add_constant, attribute, emit, producer, replace, unused_name, weight_of
from llmc.compiler.graph.run import Arrays, extract, runner
from llmc.compiler.graph.shapes import dims
from llmc.compiler.weights import Array, Weight
from llmc.passes.name_positions import lengths
from llmc.runtime.errors import LlmcError


def tabulate_positions(model: ir.Model, *, n_context: int) -> int:
    """Assumes inputs `input_ids` and `position_ids` [batch, sequence]; leaves no other use of position_ids than Gather
    from a table of n_context rows (and Shape). Returns the number of tables."""
    positions = next((value for value in model.graph.inputs if value.name == "position_ids"), None)
    if positions is None:
        return 0
    n_rewrites, counted = 0, lengths(model.graph)
    for value in frontier(model.graph, positions):
        if is_table(value, positions, n_context):
            continue
        table = learned_table(value, positions, n_context)
        table = table or computed_table(value, positions, n_context, counted=value in counted)
        constant = add_constant(model.graph, table, unused_name(model.graph, str(table.name)))
        node = value.producer()
        assert node is not None
        replace(value, emit(node, "Gather", [constant, positions], axis=0)[0])
        n_rewrites += 1
    return n_rewrites


def frontier(graph: ir.Graph, positions: ir.Value) -> list[ir.Value]:
    """The last values [batch, sequence, …] on each path that depend on nothing but positions and their number; or on
    their number alone, where the graph counts tokens itself."""
    alone, sizes = {positions}, lengths(graph)
    for node in graph:
        inputs = {value for value in node.inputs if value is not None and not value.is_initializer()}
        if not set(node.outputs) <= sizes and inputs and inputs <= alone | sizes:
            alone.update(node.outputs)
    found: list[ir.Value] = []
    tokens = dims(positions)[:2]
    for node in reversed(graph):
        for value in node.outputs:
            leaves = value.is_graph_output() or any(use.node.outputs[0] not in alone for use in value.uses())
            if value in alone and leaves:
                if dims(value)[:2] == tokens:
                    found.append(value)
                else:
                    alone.discard(value)
            elif value in sizes and dims(value)[:2] == tokens and leaves_for_good(value, alone | sizes):
                found.append(value)
    return list(reversed(found))


def leaves_for_good(value: ir.Value, known: set[ir.Value]) -> bool:
    return any(use.node.outputs[0] not in known for use in value.uses())


def is_table(value: ir.Value, positions: ir.Value, n_context: int) -> bool:
    """Whether the value is a lookup already, in a weight of n_context rows or more."""
    node = producer(value, "Gather")
    weight = weight_of(node.inputs[0]) if node is not None else None
    if node is None or weight is None or node.inputs[1] is not positions or attribute(node, "axis", 0) != 0:
        return False
    return weight.dims[0] >= n_context


def learned_table(value: ir.Value, positions: ir.Value, n_context: int) -> Weight | None:
    """The rows of a weight that the positions choose, stored as the weight is."""
    node = producer(value, "Gather")
    weight = weight_of(node.inputs[0]) if node is not None else None
    if node is None or weight is None or node.inputs[1] is None or attribute(node, "axis", 0) != 0:
        return None
    part = extract(node.inputs[1], [node.graph.inputs[0], positions])  # type: ignore[union-attr]
    rows = at_each(part, n_context)
    if rows.min() < 0 or rows.max() >= weight.dims[0]:
        raise LlmcError(
            f"the model has learned positions for fewer than {n_context} tokens",
            place=f"weight {weight.name} {list(weight.dims)}",
            hint="ask for a smaller --max-seq",
        )
    shape = (n_context, *weight.dims[1:])
    return Weight.computed(f"{weight.name}[positions]", shape, lambda: weight.stored()[rows], weight.stored_dtype)


def computed_table(value: ir.Value, positions: ir.Value, n_context: int, *, counted: bool) -> Weight:
    """The value at each position, worked out when it is read.  counted: by the graph itself."""
    part = extract(value, [value.graph.inputs[0], positions])  # type: ignore[union-attr]
    node = value.producer()
    assert node is not None
    rest = [size for size in dims(value)[2:] if isinstance(size, int)]

    def read() -> Array:
        return at_each(part, n_context, counted=counted)

    return Weight.computed(f"table.{node.op_type.lower()}", (n_context, *rest), read)


def at_each(
    part: ir.Model, n_context: int, *, counted: bool = False, run: Callable[[Arrays], Arrays] | None = None
) -> Array:
    """What a part of the graph gives at each position.  Raises LlmcError if that depends on the other tokens.
    counted: the part counts tokens itself, from 0, wherever they are.  run: what runs it in place of `runner`."""
    run, place = run or runner(part), f"value {part.graph.outputs[0].name}"
    found = agreed(run, n_context, counted=counted)
    if found is not None:
        return found
    if np.isnan(at_positions(run, np.arange(n_context))).any():
        raise LlmcError("a value that depends on positions alone is not a number", place=place)
    most, limit = 1, n_context  # a rotary embedding may change where a text gets long (LongRoPE)
    while limit - most > 1:
        middle = (most + limit) // 2
        most, limit = (most, middle) if agreed(run, middle, counted=counted) is None else (middle, limit)
    hint = f"up to {most} tokens it does not: --max-seq {most}" if most > 1 else None
    raise LlmcError("a value depends on the positions of several tokens", place=place, hint=hint)


def agreed(run: Callable[[Arrays], Arrays], n_context: int, *, counted: bool) -> Array | None:
    """What a part of the graph gives at each position, if that is the same whatever the other tokens are."""
    positions = np.arange(n_context)
    forwards = at_positions(run, positions)
    backwards = forwards[::-1] if counted else at_positions(run, positions[::-1])
    tolerance = 0.0 if forwards.dtype.kind in "iu" else 1e-5
    last = slice(0, n_context // 2) if counted else slice(-2, None)
    ends = slice(0, 1), slice(0, 2), last  # what looks at a length, the first or last sees another there
    agree = [np.allclose(at_positions(run, positions[end]), forwards[end], tolerance, tolerance) for end in ends]
    return forwards if np.array_equal(forwards, backwards[::-1]) and all(agree) else None


def at_positions(run: Callable[[Arrays], Arrays], positions: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Array:
    """What a part of the graph gives for one sequence with these positions."""
    feeds = {"position_ids": positions[None], "input_ids": positions[None]}  # of the tokens, only how many they are
    result: Array = next(iter(run(feeds).values()))[0]
    return result
