"""passes/merge_gate_up.py"""

from typing import Any

import pytest

from llmc.passes.merge_gate_up import merge_gate_up


def linear(build: Any, x: Any, name: Any, bias: Any = False) -> Any:
    inputs = [x, build.weight(f"mlp.{name}_proj.weight", 6, 8)]
    if bias:
        inputs.append(build.weight(f"mlp.{name}_proj.bias", 6))
    return build.op("llmc.LinearBias" if bias else "llmc.Linear", *inputs)


def act(build: Any, x: Any, activation: Any = "llmc.Silu") -> Any:
    return build.op("Gelu", x, approximate=activation) if activation in ("none", "tanh") else build.op(activation, x)


@pytest.mark.parametrize("activation", ["llmc.Silu", "none", "tanh"])
def test_gate_and_up_become_one_product(build: Any, check: Any, activation: Any) -> None:
    x = build.input("x", "M", 8)
    gate = act(build, linear(build, x, "gate"), activation)
    check(build.model(build.op("Mul", gate, linear(build, x, "up"))), merge_gate_up, 1)


def test_biases_are_joined(build: Any, check: Any) -> None:
    x = build.input("x", "M", 8)
    gate, up = (linear(build, x, name, bias=True) for name in ("gate", "up"))
    check(build.model(build.op("Mul", up, act(build, gate))), merge_gate_up, 1)


def test_product_that_is_joined_already_is_taken(build: Any, check: Any) -> None:
    both = build.op("llmc.Linear", build.input("x", "M", 8), build.weight("gate_up", 12, 8))
    gate, up = build.op("Split", both, axis=-1, num_outputs=2, n_results=2)
    check(build.model(build.op("Mul", up, act(build, gate))), merge_gate_up, 1)


def test_joined_product_with_up_first_is_refused(build: Any, refused: Any) -> None:
    both = build.op("llmc.Linear", build.input("x", "M", 8), build.weight("up_gate", 12, 8))
    up, gate = build.op("Split", both, axis=-1, num_outputs=2, n_results=2)
    refused(build.model(build.op("Mul", up, act(build, gate))), merge_gate_up)


def test_products_of_different_inputs_are_refused(build: Any, refused: Any) -> None:
    x, y = build.input("x", "M", 8), build.input("y", "M", 8)
    refused(build.model(build.op("Mul", act(build, linear(build, x, "gate")), linear(build, y, "up"))), merge_gate_up)


def test_up_product_with_another_user_is_refused(build: Any, refused: Any) -> None:
    x = build.input("x", "M", 8)
    up = linear(build, x, "up")
    product = build.op("Mul", act(build, linear(build, x, "gate")), up)
    refused(build.model(build.op("Add", product, up)), merge_gate_up)


def test_bias_for_one_of_the_two_is_refused(build: Any, refused: Any) -> None:
    x = build.input("x", "M", 8)
    gate, up = linear(build, x, "gate", bias=True), linear(build, x, "up")
    refused(build.model(build.op("Mul", act(build, gate), up)), merge_gate_up)
