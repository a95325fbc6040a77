"""passes/fuse_epilogue.py"""

from typing import Any

import pytest

from llmc.passes.fuse_epilogue import fuse_epilogue

ACTIVATIONS = {
    "relu": ("Relu", {}),
    "gelu": ("Gelu", {"approximate": "none"}),
    "gelu_tanh": ("Gelu", {"approximate": "tanh"}),
    "silu": ("llmc.Silu", {}),
}


def linear(build: Any, bias: Any = False, name: Any = "w") -> Any:
    x = next(iter(build.inputs), None) or build.input("x", "M", 8)
    more = [build.weight(f"{name}.bias", 8)] if bias else []
    return build.op("llmc.LinearBias" if bias else "llmc.Linear", x, build.weight(name, 8, 8), *more)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_moves_into_the_product(build: Any, check: Any, activation: Any) -> None:
    op, attributes = ACTIVATIONS[activation]
    check(build.model(build.op(op, linear(build, bias=True), **attributes)), fuse_epilogue, 1)


def test_activation_then_residual_move_into_the_product(build: Any, check: Any) -> None:
    y = build.op("Relu", linear(build))
    check(build.model(build.op("Add", build.input("r", "M", 8), y)), fuse_epilogue, 2)


def test_of_two_products_added_one_takes_the_other(build: Any, check: Any) -> None:
    check(build.model(build.op("Add", linear(build, True, "a"), linear(build, True, "b"))), fuse_epilogue, 1)


def test_activation_of_a_sum_is_left(build: Any, check: Any) -> None:
    y = build.op("Add", linear(build), build.input("r", "M", 8))
    check(build.model(build.op("Relu", y)), fuse_epilogue, 1)


def test_product_with_another_user_is_refused(build: Any, refused: Any) -> None:
    y = linear(build)
    refused(build.model(build.op("Mul", build.op("Relu", y), y)), fuse_epilogue)


def test_product_that_is_a_result_is_refused(build: Any, refused: Any) -> None:
    y = linear(build)
    refused(build.model(y, build.op("Relu", y)), fuse_epilogue)


def test_residual_of_another_shape_is_refused(build: Any, refused: Any) -> None:
    refused(build.model(build.op("Add", linear(build), build.input("r", "M", 1))), fuse_epilogue)


def test_constant_residual_is_refused(build: Any, refused: Any) -> None:
    refused(build.model(build.op("Add", linear(build), build.weight("c", 8))), fuse_epilogue)


def test_other_activations_are_refused(build: Any, refused: Any) -> None:
    refused(build.model(build.op("Tanh", linear(build))), fuse_epilogue)
