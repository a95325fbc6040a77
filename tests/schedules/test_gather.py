"""Rows of tables, by number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llmc import schedules
from llmc.compiler.kernel import Call, DType, TensorType, numpy_dtype
from llmc.compiler.target import Target
from llmc.schedules.cpu import gather

Array = np.ndarray[Any, Any]
Run = Callable[..., list[Array]]


def gather_call(n: int, table: TensorType, index: DType = "i32") -> Call:
    return Call("Gather", (table, TensorType((n,), index)), (TensorType((n, *table.shape[1:]), "f32"),), (("axis", 0),))


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("columns", [64, 80, 101])
def test_a_table_gives_its_rows_widened(run: Run, target: Target, dtype: DType, columns: int) -> None:
    call = gather_call(6, TensorType((9, columns), dtype, constant=True))
    assert schedules.implement(call, target).rule == "gather"
    table = np.random.default_rng(0).standard_normal((9, columns)).astype(numpy_dtype(dtype))
    index = np.array([8, 0, 3, 3, 7, 1], np.int32)
    (rows,) = run(call, table, index, target=target, n_tasks=3)
    np.testing.assert_array_equal(rows, table[index].astype(np.float32))


@pytest.mark.parametrize("index", ["i32", "i64"])
def test_a_number_out_of_range_takes_the_nearest_row(run: Run, host: Target, index: DType) -> None:
    call = gather_call(4, TensorType((5, 16), "f32"), index)
    table = np.arange(80, dtype=np.float32).reshape(5, 16)
    numbers = np.array([-1, 5, 2**31 - 1, -(2**31)], numpy_dtype(index))
    (rows,) = run(call, table, numbers, target=host)
    np.testing.assert_array_equal(rows, table[[0, 4, 4, 0]])


def test_a_table_of_more_axes_gives_slices(run: Run, host: Target) -> None:
    call = gather_call(2, TensorType((3, 2, 4), "f32"))
    table = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
    (slices,) = run(call, table, np.array([2, 1], np.int32), target=host)
    np.testing.assert_array_equal(slices, table[[2, 1]])


def test_other_axes_and_types_are_left_to_others(host: Target) -> None:
    table, index = TensorType((3, 4), "f32"), TensorType((2,), "i32")
    other_axis = Call("Gather", (table, index), (TensorType((3, 2), "f32"),), (("axis", 1),))
    integers = Call("Gather", (TensorType((3, 4), "i64"), index), (TensorType((2, 4), "i64"),))
    assert gather.match(other_axis, host) is None
    assert gather.match(integers, host) is None
