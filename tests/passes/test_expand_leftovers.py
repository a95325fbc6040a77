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


def test_operators_with_kernels_are_left(build: Any, refused: Any) -> None:
    refused(build.model(build.op("llmc.Linear", build.input("x", "M", 8), build.weight("w", 4, 8))), expand_leftovers)
