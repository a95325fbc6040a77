"""Elementwise operations against ONNX Runtime, with NumPy's broadcasting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llmc import schedules
from llmc.compiler.kernel import Call, DType, TensorType, numpy_dtype
from llmc.compiler.target import Target
from llmc.schedules.cpu import elementwise

Array = np.ndarray[Any, Any]
Run = Callable[..., list[Array]]

UNARY = [name for name, operands in elementwise.OPERATORS.items() if operands == 1]
BINARY = [name for name, operands in elementwise.OPERATORS.items() if operands == 2]
BROADCASTS = [((3, 64), (64,)), ((3, 1), (3, 80)), ((5, 2, 7), (1, 2, 1)), ((4, 16), ()), ((1, 6), (5, 1))]
BROADCASTS += [((9,), (1,))]


def element_call(op: str, *shapes: tuple[int, ...], **attributes: Any) -> Call:
    result = TensorType(np.broadcast_shapes(*shapes), "f32")
    return Call(op, tuple(TensorType(shape, "f32") for shape in shapes), (result,), tuple(attributes.items()))


def positive(*shapes: tuple[int, ...]) -> list[Array]:
    generator = np.random.default_rng(0)
    return [generator.uniform(0.5, 2.0, shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("op", UNARY)
def test_one_operand(run: Run, define: Run, target: Target, op: str) -> None:
    call = element_call(op, (3, 80))
    (x,) = positive((3, 80))
    if op not in ("Sqrt", "Reciprocal"):
        x = ((x - 1.2) * 8).astype(np.float32)
    assert schedules.implement(call, target).rule == "elementwise"
    (y,) = run(call, x, target=target, n_tasks=2)
    np.testing.assert_allclose(y, define(call, x)[0], rtol=2e-6, atol=5e-7)


def test_gelu_in_its_other_form(run: Run, define: Run, host: Target) -> None:
    call = element_call("Gelu", (2, 64), approximate="tanh")
    x = np.linspace(-6, 6, 128, dtype=np.float32).reshape(2, 64)
    np.testing.assert_allclose(run(call, x, target=host)[0], define(call, x)[0], rtol=2e-6, atol=5e-7)


@pytest.mark.parametrize("shapes", BROADCASTS, ids=str)
@pytest.mark.parametrize("op", BINARY)
def test_two_operands_broadcast(run: Run, define: Run, host: Target, op: str, shapes: Any) -> None:
    for pair in (shapes, shapes[::-1]):
        call, inputs = element_call(op, *pair), positive(*pair)
        np.testing.assert_allclose(run(call, *inputs, target=host, n_tasks=3)[0], define(call, *inputs)[0], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_constants_are_widened(run: Run, host: Target, dtype: DType) -> None:
    x = TensorType((3, 64), "f32")
    call = Call("Mul", (x, TensorType((64,), dtype, constant=True)), (x,))
    a, b = positive((3, 64), (64,))
    b = b.astype(numpy_dtype(dtype))
    np.testing.assert_array_equal(run(call, a, b, target=host)[0], a * b.astype(np.float32))


def test_integers_are_left_to_others(host: Target) -> None:
    i64 = TensorType((4,), "i64")
    assert elementwise.match(Call("Add", (i64, i64), (i64,)), host) is None
