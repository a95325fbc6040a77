"""passes/expand_leftovers.py"""

from typing import Any

from llmc.passes.expand_leftovers import expand_leftovers


def test_silu_is_spelled_out(build: Any, check: Any) -> None:
    check(build.model(build.op("llmc.Silu", build.input("x", "M", 8))), expand_leftovers, 1)


def test_rotary_is_spelled_out(build: Any, check: Any) -> None:
    x, cos, sin = build.input("x", "M", 8), build.input("cos", "M", 1), build.input("sin", "M", 1)
    turned = build.op("llmc.Rotary", x, cos, sin, num_heads=2, rotary_dim=2, interleaved=1)
    check(build.model(turned), expand_leftovers, 1)


def test_operators_with_kernels_are_left(build: Any, refused: Any) -> None:
    refused(build.model(build.op("llmc.Linear", build.input("x", "M", 8), build.weight("w", 4, 8))), expand_leftovers)
