"""Rows of tables, by number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llmc import schedules
from llmc.compiler.kernel import Call, DType, TensorType, numpy_dtype
from llmc.compiler.quantization.quantize import Scheme, quantize
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


def panels_call(n: int, weight: TensorType, index: DType = "i64") -> Call:
    result = TensorType((n, weight.shape[1]), "f32")
    return Call("llmc.WeightRows", (weight, TensorType((n,), index)), (result,))


@pytest.mark.parametrize("dtype", ["f32", "bf16", "i8"])
@pytest.mark.parametrize(("entries", "columns"), [(9, 64), (70, 132), (16, 300), (101, 4)])
def test_rows_come_out_of_the_panels_of_a_product(
    run: Run, target: Target, dtype: DType, entries: int, columns: int
) -> None:
    weight = TensorType((entries, columns), dtype, constant=True)
    call = panels_call(6, weight)
    found = schedules.implement(call, target)
    assert found.rule == "gather_panels"
    product = Call("llmc.Linear", (TensorType((1, columns), "f32"), weight), (TensorType((1, entries), "f32"),), ())
    assert found.layouts[0] == schedules.implement(product, target).layouts[1]
    table = np.random.default_rng(0).standard_normal((entries, columns)).astype(np.float32)
    stored: Any = quantize(table, Scheme(8)) if dtype == "i8" else table.astype(numpy_dtype(dtype))
    values = stored.values() if dtype == "i8" else stored.astype(np.float32)
    index = np.array([entries - 1, 0, 3, -1, entries, 2**40], np.int64)
    (rows,) = run(call, stored, index, target=target, n_tasks=4)
    np.testing.assert_array_equal(rows, values[np.clip(index, 0, entries - 1)])


def test_other_codes_have_no_rows(host: Target) -> None:
    assert gather.match_panels(panels_call(2, TensorType((16, 64), "i4", constant=True, group=32)), host) is None


def test_other_axes_and_types_are_left_to_others(host: Target) -> None:
    table, index = TensorType((3, 4), "f32"), TensorType((2,), "i32")
    other_axis = Call("Gather", (table, index), (TensorType((3, 2), "f32"),), (("axis", 1),))
    integers = Call("Gather", (TensorType((3, 4), "i64"), index), (TensorType((2, 4), "i64"),))
    assert gather.match(other_axis, host) is None
    assert gather.match(integers, host) is None
