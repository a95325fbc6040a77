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


def test_a_scale_that_is_no_weight_stays(build: Any, refused: Any) -> None:
    x = build.input("x", "M", 8)
    refused(build.model(build.op("Mul", x, norm(build, x, "inverse"))), form_norm)
