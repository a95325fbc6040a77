"""passes/expand_leftovers.py"""

from typing import Any

import pytest

from llmc.passes.expand_leftovers import expand_leftovers


def test_silu_is_spelled_out(build: Any, check: Any) -> None:
    check(build.model(build.op("llmc.Silu", build.input("x", "M", 8))), expand_leftovers, 1)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("rotary_dim", [2, 4])
def test_rotary_is_spelled_out(build: Any, check: Any, rotary_dim: int, interleaved: int) -> None:
    x, *waves = build.input("x", "M", 8), *(build.input(name, "M", rotary_dim // 2) for name in ("cos", "sin"))
    turned = build.op("llmc.Rotary", x, *waves, num_heads=2, rotary_dim=rotary_dim, interleaved=interleaved)
    check(build.model(turned), expand_leftovers, 1)


def test_a_mean_of_squares_and_a_root_need_no_power(build: Any, check: Any) -> None:
    mean = build.op("ReduceMean", build.op("Pow", build.input("x", "M", 8), build.constant(2.0)), build.constant([1]))
    check(build.model(build.op("Pow", mean, build.constant(0.5))), expand_leftovers, 2)


def test_other_powers_and_squares_are_left(build: Any, refused: Any) -> None:
    x = build.input("x", "M", 8)
    cube = build.op("ReduceMean", build.op("Pow", x, build.constant(3.0)), build.constant([1]))
    refused(build.model(build.op("Add", cube, build.op("Pow", x, build.constant(2.0)))), expand_leftovers)


def test_operators_with_kernels_are_left(build: Any, refused: Any) -> None:
    refused(build.model(build.op("llmc.Linear", build.input("x", "M", 8), build.weight("w", 4, 8))), expand_leftovers)
