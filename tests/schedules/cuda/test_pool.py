"""One vector of a text out of those of its tokens, emulated, against its definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llmc import schedules
from llmc.compiler.kernel import Call, TensorType
from llmc.compiler.target import Target
from tests.emulator.emulate import EmulatedExecutable

Array = np.ndarray[Any, Any]
HOPPER = Target("cuda", "sm_90a")


def pooled(op: str, x: Array, positions: Array, rows: Array) -> tuple[Call, Array]:
    """The call, and what the kernel makes of these."""
    kinds = TensorType(x.shape, "f32"), TensorType(positions.shape, "i32"), TensorType(rows.shape, "i32")
    call = Call(op, kinds, (TensorType((len(rows), x.shape[1]), "f32"),), ())
    implementation = schedules.implement(call, HOPPER)
    assert implementation.rule == "pool"
    return call, EmulatedExecutable(call, implementation, HOPPER).run(x, positions, rows)[0]


@pytest.mark.parametrize("columns", [1, 32, 100])
@pytest.mark.parametrize("op", ["llmc.PoolMeanRows", "llmc.PoolFirstRows"])
def test_rows_are_pooled_over_their_own_text(define: Callable[..., list[Array]], op: str, columns: int) -> None:
    lengths = [5, 1, 200]
    positions = np.concatenate([*(np.arange(n) for n in lengths), [-1, -1]]).astype(np.int32)
    rows = np.array([205, 5, 4, 2, 0, 20], np.int32)
    x = np.random.default_rng(0).standard_normal((len(positions), columns)).astype(np.float32)
    x[-2:] = np.nan
    call, found = pooled(op, x, positions, rows)
    wanted = define(call, np.nan_to_num(x), positions.astype(np.int64), rows.astype(np.int64))[0]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    moved = pooled(op, np.concatenate([x[5:206], x[:1]]), np.append(positions[5:206], 0), np.array([200], np.int32))[1]
    np.testing.assert_array_equal(moved[0], found[0])
