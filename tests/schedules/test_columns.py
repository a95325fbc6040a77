"""Columns that are moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llmc import schedules
from llmc.compiler.kernel import Call, TensorType
from llmc.compiler.target import Target
from llmc.schedules.cpu import columns
from tests.emulator.emulate import EmulatedExecutable

Array = np.ndarray[Any, Any]
Run = Callable[..., list[Array]]
NUMBERS = TensorType((1,), "i64", constant=True)


def call_of(
    op: str, inputs: list[tuple[int, ...]], outputs: list[tuple[int, ...]], n_lists: int = 0, **said: Any
) -> Call:
    """n_lists: operands behind those that are lists of numbers, whose values `said` has as input_1, …"""
    kinds = [*(TensorType(shape, "f32") for shape in inputs), *[NUMBERS] * n_lists]
    attributes = sorted((name.replace("_", "."), value) for name, value in said.items())
    return Call(op, tuple(kinds), tuple(TensorType(shape, "f32") for shape in outputs), tuple(attributes))


CALLS = {
    "split": call_of("Split", [(5, 60)], [(5, 32), (5, 7), (5, 21)], 1, axis=1, input_1=(32, 7, 21)),
    "concat": call_of("Concat", [(5, 3), (5, 16)], [(5, 19)], axis=-1),
    "slice": call_of("Slice", [(5, 40)], [(5, 9)], 4, input_1=(-12,), input_2=(-3,), input_3=(1,), input_4=(1,)),
    "gather": call_of("Gather", [(5, 3, 16)], [(5, 16)], 1, axis=1, input_1=2),
}


def expected(call: Call, x: list[Array]) -> list[Array]:
    if call.op == "Split":
        return np.split(x[0], np.cumsum(call.attribute("input.1"))[:-1], axis=1)
    if call.op == "Concat":
        return [np.concatenate(x, 1)]
    return [x[0][:, -12:-3] if call.op == "Slice" else x[0][:, 2]]


@pytest.mark.parametrize("name", CALLS)
def test_columns_are_those_that_the_operator_names(run: Run, target: Target, name: str) -> None:
    call = CALLS[name]
    assert schedules.implement(call, target).rule == "columns"
    random = np.random.default_rng(0)
    x = [random.standard_normal(kind.shape).astype(np.float32) for kind in call.inputs if kind and not kind.constant]
    numbers = [np.zeros(1, np.int64)] * (len(call.inputs) - len(x))
    for n_tasks in (1, 3):
        found = run(call, *x, *numbers, target=target, n_tasks=n_tasks)
        for one, other in zip(found, expected(call, x), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "call",
    [
        call_of("Split", [(6, 4)], [(3, 4), (3, 4)], 1, axis=0, input_1=(3, 3)),
        call_of("Slice", [(6, 4)], [(6, 2)], 4, input_1=(0,), input_2=(4,), input_3=(1,), input_4=(2,)),
        call_of("Gather", [(5, 3, 2, 4)], [(5, 2, 4)], 1, axis=1, input_1=2),
        Call("Concat", (TensorType((2, 3), "i64"),) * 2, (TensorType((2, 6), "i64"),), (("axis", 1),)),
    ],
    ids=lambda call: call.op,
)
def test_other_axes_steps_and_types_are_left_to_others(host: Target, call: Call) -> None:
    assert columns.match(call, host) is None


@pytest.mark.parametrize("name", CALLS)
def test_a_gpu_moves_the_same(name: str) -> None:
    call, gpu = CALLS[name], Target("cuda", "sm_90a")
    implementation = schedules.implement(call, gpu)
    assert implementation.rule == "columns"
    random = np.random.default_rng(0)
    x = [random.standard_normal(kind.shape).astype(np.float32) for kind in call.inputs if kind and not kind.constant]
    numbers = [np.zeros(1, np.int64)] * (len(call.inputs) - len(x))
    found = EmulatedExecutable(call, implementation, gpu).run(*x, *numbers)
    for one, other in zip(found, expected(call, x), strict=True):
        np.testing.assert_array_equal(one, other)
