"""Rows in the place of tokens' embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llmc.compiler.kernel import Call, TensorType
from llmc.compiler.target import Target

Array = np.ndarray[Any, Any]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 64), (3, 20), (7, 100), (33, 48)])
def test_rows_that_are_given_take_the_place_of_others(
    run: Callable[..., list[Array]], define: Callable[..., list[Array]], target: Target, rows: int, columns: int
) -> None:
    random = np.random.default_rng(rows)
    x, given = (random.standard_normal((rows, columns)).astype(np.float32) for _ in range(2))
    is_given = random.integers(0, 2, rows).astype(np.int32)
    given[is_given == 0] = np.nan
    kinds = TensorType(x.shape, "f32"), TensorType((rows,), "i32"), TensorType(x.shape, "f32")
    call = Call("llmc.TakeGiven", kinds, (kinds[0],), ())
    wanted = define(call, x, is_given.astype(np.int64), given)[0]
    np.testing.assert_array_equal(run(call, x, is_given, given, target=target)[0], wanted)
    np.testing.assert_array_equal(run(call, x, is_given, given, target=target, n_tasks=3)[0], wanted)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 20), (7, 100), (33, 48)])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_part_of_rows_is_taken_or_added(
    run: Callable[..., list[Array]],
    define: Callable[..., list[Array]],
    target: Target,
    rows: int,
    columns: int,
    part: int,
) -> None:
    random = np.random.default_rng(rows)
    x, given = (random.standard_normal((rows, n * columns)).astype(np.float32) for n in (1, 3))
    is_given = random.integers(0, 2, rows).astype(np.int32)
    given[is_given == 0] = np.nan
    kinds = TensorType(x.shape, "f32"), TensorType((rows,), "i32"), TensorType(given.shape, "f32")
    op, attributes = ("llmc.AddGiven", (("part", part),)) if part else ("llmc.TakeFirst", ())
    call = Call(op, kinds, (kinds[0],), attributes)
    wanted = define(call, x, is_given.astype(np.int64), given)[0]
    np.testing.assert_array_equal(run(call, x, is_given, given, target=target)[0], wanted)
    np.testing.assert_array_equal(run(call, x, is_given, given, target=target, n_tasks=3)[0], wanted)
