"""One vector of a text out of those of its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llmc.compiler.kernel import Call, TensorType
from llmc.compiler.target import Target

Array = np.ndarray[Any, Any]
Run = Callable[..., list[Array]]


@pytest.mark.parametrize("columns", [1, 20, 64, 100])
@pytest.mark.parametrize("op", ["llmc.PoolMeanRows", "llmc.PoolFirstRows"])
def test_rows_are_pooled_over_their_own_text(run: Run, define: Run, target: Target, op: str, columns: int) -> None:
    lengths = [5, 1, 30]
    positions = np.concatenate([*(np.arange(n) for n in lengths), [-1, -1]]).astype(np.int32)
    rows = np.array([35, 5, 4, 2, 0, 20], np.int32)
    x = np.random.default_rng(0).standard_normal((len(positions), columns)).astype(np.float32)
    x[-2:] = np.nan
    kinds = TensorType(x.shape, "f32"), TensorType(positions.shape, "i32"), TensorType(rows.shape, "i32")
    call = Call(op, kinds, (TensorType((len(rows), columns), "f32"),), ())
    found = run(call, x, positions, rows, target=target)[0]
    wanted = define(call, np.nan_to_num(x), positions.astype(np.int64), rows.astype(np.int64))[0]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(run(call, x, positions, rows, target=target, n_tasks=3)[0], found)
    np.testing.assert_array_equal(found[4], x[0])
    one = Call(op, (*kinds[:2], TensorType((1,), "i32")), (TensorType((1, columns), "f32"),), ())
    np.testing.assert_array_equal(run(one, x, positions, rows[:1], target=target)[0], found[:1])
