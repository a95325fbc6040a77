"""Look up the angles of positions in three directions, each in the direction that it is of.

rewrite:
    c = Cos(Mul(Cast(Unsqueeze(turns)), inv_freq))                             turns [batch, sequence, 3]
    Concat(c[…, 0, :2], c[…, 1, 2:5], c[…, 2, 5:])
    -->
    llmc.GatherTurned(table.cos [n_context, RD/2], turns, directions=(0, 0, 1, 1, 1, 2, 2, 2))
refuses: a value that depends on more than one direction, in one of its columns; one that is no row of columns; one that
depends on the positions of other tokens (found when the table is read).

How the directions are mixed, in sections or in turns, is not recognised but tried: a column is of the direction whose
position alone gives its value, at many positions drawn at random.  Where all three are a text's place, the table has
what `tabulate_positions` would have.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from llmc.compiler.graph import add_constant, emit, replace, unused_name
from llmc.compiler.graph.run import Arrays, extract, runner
from llmc.compiler.graph.shapes import dims
from llmc.compiler.ops import DOMAIN, GATHER_TURNED, N_TURNS
from llmc.compiler.weights import Array, Weight
from llmc.passes.tabulate_positions import at_each, frontier
from llmc.runtime.errors import LlmcError

MOST_TRIED = 4096
"""Positions at which a value is worked out to find its directions."""


def tabulate_turns(model: ir.Model, *, n_context: int) -> int:
    """Assumes inputs `input_ids` [batch, sequence] and `turns` [batch, sequence, 3]; leaves no other use of `turns`
    than GatherTurned from a table of n_context rows (and Shape).  Returns the number of tables."""
    turns = next((value for value in model.graph.inputs if value.name == "turns"), None)
    if turns is None:
        return 0
    n_rewrites = 0
    for value in frontier(model.graph, turns):
        node = value.producer()
        assert node is not None
        if node.op_type == GATHER_TURNED:
            continue
        if len(dims(value)) != 3:
            raise refusal(value, f"has the shape {value.shape}")
        part = extract(value, [model.graph.inputs[0], turns])
        directions = directions_of(part, value, n_context)
        table = table_of(part, node.op_type, n_context, len(directions))
        constant = add_constant(model.graph, table, unused_name(model.graph, str(table.name)))
        operands = [constant, turns]
        replace(value, emit(node, f"{DOMAIN}.{GATHER_TURNED}", operands, directions=directions)[0])
        n_rewrites += 1
    return n_rewrites


def table_of(part: ir.Model, made_by: str, n_context: int, n_columns: int) -> Weight:
    """The value at each place of a text, worked out when it is read."""

    def run(feeds: Arrays) -> dict[str, Array]:
        places = feeds["input_ids"]
        return inner({"input_ids": places, "turns": np.repeat(places[..., None], N_TURNS, axis=-1)})

    def read() -> Array:
        return at_each(part, n_context, run=run)

    inner = runner(part)
    return Weight.computed(f"table.{made_by.lower()}", (n_context, n_columns), read)


def directions_of(part: ir.Model, value: ir.Value, n_context: int) -> list[int]:
    """For each column the direction whose position it is of.  Raises LlmcError where there is none."""
    random = np.random.default_rng(0)
    turns = random.integers(0, n_context, (min(n_context, MOST_TRIED), N_TURNS))
    run = runner(part)

    def at(positions: Array) -> Array:
        found: Array = next(iter(run({"input_ids": positions[None, :, 0], "turns": positions[None]}).values()))[0]
        return found

    mixed = at(turns)
    alone = [at(np.repeat(turns[:, [direction]], N_TURNS, axis=1)) for direction in range(N_TURNS)]
    of = np.array([(one == mixed).all(axis=0) for one in alone])  # [3, C]
    if not of.any(axis=0).all():
        raise refusal(value, f"has columns of several directions: {np.flatnonzero(~of.any(axis=0)).tolist()}")
    return [int(direction) for direction in of.argmax(axis=0)]


def refusal(value: ir.Value, why: str) -> LlmcError:
    return LlmcError(
        f"tabulate_turns: a value that depends on positions in three directions {why}", place=f"value {value.name}"
    )
