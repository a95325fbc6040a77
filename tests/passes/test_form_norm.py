"""passes/form_norm.py"""

from typing import Any

import pytest

from llmc.passes.form_norm import form_norm


def norm(build: Any, x: Any, how: str, axis: int = -1) -> Any:
    square = build.op("Mul", x, x) if how == "square" else build.op("Pow", x, build.constant(2.0))
    mean = build.op("Add", build.op("ReduceMean", square, build.constant([axis])), build.constant(1e-6))
    if how == "power":
        return build.op("Mul", x, build.op("Pow", mean, build.constant(-0.5)))
    root = build.op("Sqrt", mean)
    if how == "quotient":
        return build.op("Div", x, root)
    return build.op(
        "Mul", x, build.op("Div", build.constant(1.0), root) if how == "inverse" else build.op("Reciprocal", root)
    )


@pytest.mark.parametrize("how", ["reciprocal", "inverse", "quotient", "power", "square"])
def test_a_norm_that_is_spelled_out_becomes_one(build: Any, check: Any, how: str) -> None:
    x = norm(build, build.input("x", "M", 8), how)
    check(build.model(build.op("Mul", build.weight("w", 8), x)), form_norm, 1)


def test_a_mean_over_another_axis_stays(build: Any, refused: Any) -> None:
    x = norm(build, build.input("x", "M", 8), "inverse", axis=0)
    refused(build.model(build.op("Mul", build.weight("w", 8), x)), form_norm)


def test_a_norm_without_a_weight_has_ones(build: Any, check: Any) -> None:
    """What it is multiplied by, which is no weight, stays."""
    x = build.input("x", "M", 8)
    check(build.model(build.op("Mul", x, norm(build, x, "inverse"))), form_norm, 1)


def test_a_norm_without_an_epsilon_becomes_one(build: Any, check: Any) -> None:
    x = build.input("x", "M", 8)
    root = build.op("Sqrt", build.op("ReduceMean", build.op("Mul", x, x), build.constant([-1])))
    check(build.model(build.op("Mul", build.op("Div", x, root), build.weight("w", 8))), form_norm, 1)


def centred(build: Any, axis: int, other: Any = None) -> Any:
    x = build.input("x", "M", 8)
    mean = build.op("ReduceMean", x if other is None else other, build.constant([axis]))
    normed = build.op("RMSNormalization", build.op("Sub", x, mean), build.weight("w", 8), axis=-1, epsilon=1e-4)
    return build.model(normed)


def test_a_norm_of_what_is_left_without_the_mean_is_a_layer_norm(build: Any, check: Any) -> None:
    check(centred(build, -1), form_norm, 1)


def test_the_mean_over_tokens_is_none(build: Any, refused: Any) -> None:
    refused(centred(build, 0), form_norm)


def test_the_mean_of_another_value_is_none(build: Any, refused: Any) -> None:
    refused(centred(build, -1, build.input("y", "M", 8)), form_norm)
