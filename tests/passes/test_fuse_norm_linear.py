"""passes/fuse_norm_linear.py"""

from typing import Any

import pytest

from llmc.passes.fuse_norm_linear import fuse_norm_linear


def test_rms_norm_moves_into_the_product(build: Any, check: Any) -> None:
    normed = build.op("RMSNormalization", build.input("x", "M", 8), build.weight("w", 8), axis=-1, epsilon=1e-6)
    check(build.model(build.op("llmc.Linear", normed, build.weight("W", 16, 8))), fuse_norm_linear, 1)


def test_layer_norm_moves_into_the_product_with_its_epilogue(build: Any, check: Any) -> None:
    x, w, b = build.input("x", "M", 8), build.weight("w", 8), build.weight("b", 8)
    normed = build.op("LayerNormalization", x, w, b, epsilon=1e-5)
    weights = build.weight("W", 8, 8), build.weight("c", 8)
    check(build.model(build.op("llmc.LinearBiasReluResidual", normed, *weights, x)), fuse_norm_linear, 1)


def test_gated_product_normalises_its_operand(build: Any, check: Any) -> None:
    normed = build.op("RMSNormalization", build.input("x", "M", 8), build.weight("w", 8), epsilon=1e-6)
    check(build.model(build.op("llmc.GatedLinearSilu", normed, build.weight("W", 12, 8))), fuse_norm_linear, 1)


def test_norm_with_another_user_is_left(build: Any, refused: Any) -> None:
    normed = build.op("RMSNormalization", build.input("x", "M", 8), build.weight("w", 8), epsilon=1e-6)
    product = build.op("llmc.Linear", normed, build.weight("W", 8, 8))
    refused(build.model(build.op("Add", product, normed)), fuse_norm_linear)


@pytest.mark.parametrize("axis", [1])
def test_norm_over_more_than_the_last_axis_is_left(build: Any, refused: Any, axis: int) -> None:
    x = build.input("x", "M", 4, 8)
    normed = build.op("RMSNormalization", x, build.weight("w", 4, 8), axis=axis)
    refused(build.model(build.op("llmc.Linear", normed, build.weight("W", 8, 8))), fuse_norm_linear)


def test_layer_norm_without_bias_is_left(build: Any, refused: Any) -> None:
    normed = build.op("LayerNormalization", build.input("x", "M", 8), build.weight("w", 8))
    refused(build.model(build.op("llmc.Linear", normed, build.weight("W", 8, 8))), fuse_norm_linear)
