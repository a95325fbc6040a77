"""passes/form_activation.py"""

from typing import Any

import pytest

from llmc.passes.form_activation import form_activation


def gelu_tanh(build: Any, x: Any, cubic: Any = 0.044715) -> Any:
    cube = build.op("Mul", build.op("Pow", x, build.constant(3.0)), build.constant(cubic))
    inner = build.op("Mul", build.op("Add", x, cube), build.constant(0.7978845608))
    gate = build.op("Add", build.op("Tanh", inner), build.constant(1.0))
    return build.op("Mul", build.op("Mul", x, build.constant(0.5)), gate)


def test_silu_becomes_one_operator(build: Any, check: Any) -> None:
    x = build.input("x", "M", 8)
    check(build.model(build.op("Mul", x, build.op("Sigmoid", x))), form_activation, 1)


def test_gelu_spelled_out_with_tanh_becomes_one_operator(build: Any, check: Any) -> None:
    check(build.model(gelu_tanh(build, build.input("x", "M", 8))), form_activation, 1)


def test_gelu_with_other_products_becomes_one_operator(build: Any, check: Any) -> None:
    x = build.input("x", "M", 8)
    cube = build.op("Mul", build.constant(0.044715), build.op("Mul", x, build.op("Mul", x, x)))
    wave = build.op("Tanh", build.op("Mul", build.constant(0.7978845608), build.op("Add", x, cube)))
    gated = build.op("Mul", x, build.op("Add", build.constant(1.0), wave))
    check(build.model(build.op("Mul", build.constant(0.5), gated)), form_activation, 1)


def test_gelu_with_x_set_apart_becomes_one_operator(build: Any, check: Any) -> None:
    """As BLOOM has it."""
    x = build.input("x", "M", 8)
    square = build.op("Mul", build.op("Mul", x, build.constant(0.044715)), x)
    bent = build.op("Mul", build.op("Mul", x, build.constant(0.79788456)), build.op("Add", square, build.constant(1.0)))
    gate = build.op("Add", build.op("Tanh", bent), build.constant(1.0))
    check(build.model(build.op("Mul", build.op("Mul", x, build.constant(0.5)), gate)), form_activation, 1)


@pytest.mark.parametrize(("op", "factor"), [("Div", 2**0.5), ("Mul", 2**-0.5)], ids=["quotient", "product"])
def test_gelu_spelled_out_with_erf_becomes_one_operator(build: Any, check: Any, op: str, factor: float) -> None:
    x = build.input("x", "M", 8)
    wave = build.op("Erf", build.op(op, x, build.constant(factor)))
    gated = build.op("Mul", x, build.op("Add", wave, build.constant(1.0)))
    check(build.model(build.op("Mul", gated, build.constant(0.5))), form_activation, 1)


def test_a_cube_of_another_value_is_refused(build: Any, refused: Any) -> None:
    x, y = build.input("x", "M", 8), build.input("y", "M", 8)
    cube = build.op("Mul", build.constant(0.044715), build.op("Mul", x, build.op("Mul", x, y)))
    wave = build.op("Tanh", build.op("Mul", build.constant(0.7978845608), build.op("Add", x, cube)))
    gated = build.op("Mul", x, build.op("Add", build.constant(1.0), wave))
    refused(build.model(build.op("Mul", build.constant(0.5), gated)), form_activation)


def test_gate_of_another_value_is_refused(build: Any, refused: Any) -> None:
    x, y = build.input("x", "M", 8), build.input("y", "M", 8)
    refused(build.model(build.op("Mul", x, build.op("Sigmoid", y))), form_activation)


@pytest.mark.parametrize("cubic", [0.0447, 0.5])
def test_other_numbers_are_refused(build: Any, refused: Any, cubic: Any) -> None:
    refused(build.model(gelu_tanh(build, build.input("x", "M", 8), cubic)), form_activation)
