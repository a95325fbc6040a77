"""passes/tabulate_turns.py"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llmc.compiler import graph
from llmc.passes.flatten_tokens import flatten_tokens
from llmc.passes.tabulate_turns import tabulate_turns
from llmc.runtime.errors import LlmcError

tabulate = update_wrapper(partial(tabulate_turns, n_context=16), tabulate_turns)


def turned(build: Any, mix: Callable[[Any, list[Any]], Any]) -> ir.Model:
    """Embeddings times what `mix` makes of the cosines of three directions, [batch, sequence, 5] each."""
    ids, _ = build.sequence_inputs()
    turns = build.input("turns", "batch", "sequence", 3, dtype=ir.DataType.INT64)
    numbers = build.op("Cast", build.op("Unsqueeze", turns, build.constant([3])), to=ir.DataType.FLOAT)
    numbers.dtype = ir.DataType.FLOAT
    cosines = build.op("Cos", build.op("Mul", numbers, build.weight("inv_freq", 5)))
    each = [build.op("Gather", cosines, one(build, direction), axis=2) for direction in range(3)]
    x = build.op("Gather", build.weight("embed", 11, 5), ids)
    model: ir.Model = build.model(build.op("Mul", x, mix(build, each)))
    return model


def one(build: Any, direction: int) -> Any:
    return build.constant(ir.tensor(np.array(direction, np.int64)))


def sections(build: Any, each: list[Any]) -> Any:
    """Columns of time, lines, lines, columns, columns."""
    ends = [build.constant([end]) for end in (0, 1, 3, 5)]
    last = build.constant([2])
    parts = [build.op("Slice", c, a, b, last) for c, a, b in zip(each, ends[:-1], ends[1:], strict=True)]
    return build.op("Concat", *parts, axis=-1)


def in_turns(build: Any, each: list[Any]) -> Any:
    """Columns of time, lines, columns, time, lines."""
    masks = [ir.tensor((np.arange(5) % 3 == direction).astype(np.float32)) for direction in range(3)]
    parts = [build.op("Mul", c, build.constant(mask)) for c, mask in zip(each, masks, strict=True)]
    return build.op("Add", build.op("Add", parts[0], parts[1]), parts[2])


@pytest.mark.parametrize("mix", [sections, in_turns])
def test_columns_are_looked_up_in_their_directions(build: Any, check: Any, mix: Callable[..., Any]) -> None:
    model = turned(build, mix)
    check(model, tabulate, 1)
    (node,) = (node for node in model.graph if node.op_type == "GatherTurned")
    directions = [0, 1, 1, 2, 2] if mix is sections else [0, 1, 2, 0, 1]
    assert list(node.attributes["directions"].as_ints()) == directions


def test_over_tokens_it_is_the_same(build: Any, feeds: Callable[[ir.Model], dict[str, Any]]) -> None:
    model = turned(build, sections)
    (wanted,) = graph.evaluate(model, feeds(model)).values()
    tabulate(model)
    flatten_tokens(model)
    assert [f"{value.name}{value.shape}" for value in model.graph.inputs] == ["tokens[M]", "positions[M]", "turns[M,3]"]
    (found,) = graph.evaluate(model, feeds(model)).values()
    np.testing.assert_allclose(found, wanted[0], rtol=0, atol=1e-6)


def test_a_graph_of_one_direction_is_left_as_it_is(build: Any, refused: Callable[..., None]) -> None:
    ids, positions = build.sequence_inputs()
    x = build.op("Gather", build.weight("embed", 11, 5), ids)
    refused(build.model(build.op("Add", x, build.op("Gather", build.weight("learned", 16, 5), positions))), tabulate)


def test_a_column_of_several_directions_is_refused(build: Any) -> None:
    def sums(build: Any, each: list[Any]) -> Any:
        return build.op("Add", each[0], each[1])

    with pytest.raises(LlmcError, match=r"three directions has columns of several directions: \[0, 1, 2, 3, 4\]"):
        tabulate(turned(build, sums))


def test_what_is_no_row_of_columns_is_refused(build: Any) -> None:
    def with_an_axis_more(build: Any, each: list[Any]) -> Any:
        last = build.constant([3])
        x = build.op("Gather", build.weight("other", 11, 5, 1), build.inputs[0])
        return build.op("Squeeze", build.op("Mul", x, build.op("Unsqueeze", each[0], last)), last)

    with pytest.raises(LlmcError, match=r"three directions has the shape \[batch,sequence,5,1\]"):
        tabulate(turned(build, with_an_axis_more))
