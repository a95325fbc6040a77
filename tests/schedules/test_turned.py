"""Angles of positions in three directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llmc.compiler.kernel import Call, TensorType
from llmc.compiler.target import Target

Array = np.ndarray[Any, Any]
IN_TURNS = [0, 1, 2]


@pytest.mark.parametrize(
    ("rows", "directions"),
    [
        (1, [0]),
        (3, IN_TURNS * 5),
        (7, [0] * 16 + [1] * 24 + [2] * 24),
        (2, [2] * 3 + [0] * 17),
        (33, IN_TURNS * 2 + [0]),
    ],
)
def test_each_column_is_looked_up_in_its_direction(
    run: Callable[..., list[Array]],
    define: Callable[..., list[Array]],
    target: Target,
    rows: int,
    directions: list[int],
) -> None:
    random, n = np.random.default_rng(rows), len(directions)
    table = random.standard_normal((50, n)).astype(np.float32)
    turns = random.integers(0, 50, (rows, 3)).astype(np.int32)
    kinds = TensorType(table.shape, "f32", constant=True), TensorType(turns.shape, "i32")
    call = Call("llmc.GatherTurned", kinds, (TensorType((rows, n), "f32"),), (("directions", tuple(directions)),))
    wanted = define(call, table, turns.astype(np.int64))[0]
    np.testing.assert_array_equal(run(call, table, turns, target=target)[0], wanted)
    np.testing.assert_array_equal(run(call, table, turns, target=target, n_tasks=3)[0], wanted)


def test_a_number_out_of_range_takes_the_nearest_row(run: Callable[..., list[Array]], target: Target) -> None:
    table, turns = np.arange(12, dtype=np.float32).reshape(4, 3), np.array([[-1, 4, 2**31 - 1]], np.int32)
    kinds = TensorType(table.shape, "f32", constant=True), TensorType(turns.shape, "i32")
    call = Call("llmc.GatherTurned", kinds, (TensorType((1, 3), "f32"),), (("directions", (0, 1, 2)),))
    assert run(call, table, turns, target=target)[0].tolist() == [[0, 10, 11]]
