"""passes/defer_norm.py"""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llmc.compiler.quantization.quantize import Scheme
from llmc.compiler.weights import FoldedNorm, Weight
from llmc.passes.defer_norm import defer_norm
from llmc.passes.quantize_weights import quantize_weights


def sum_of(build: Any, n: int = 64, name: str = "LinearResidual", rows: int | str = "M") -> Any:
    """y [M, n]: a product and a residual."""
    x, residual = build.input("x", rows, 16), build.input("residual", rows, n)
    bias = [build.weight("c", n)] if "Bias" in name else []
    return build.op(f"llmc.{name}", x, build.weight("W", n, 16), *bias, residual)


def normed(build: Any, y: Any, name: str = "RMSNormLinear", n: int = 24, which: str = "") -> Any:
    """A product of y's norm."""
    k = y.shape[-1]
    vectors = [build.weight(f"{which}g", k)] + [build.weight(f"{which}b", k)] * name.startswith("Layer")
    rows = 2 * n if "Gated" in name else n
    bias = [build.weight(f"{which}bias", rows)] if name.endswith(("Bias", "Relu")) else []
    return build.op(f"llmc.{name}", y, *vectors, build.weight(f"{which}V", rows, k), *bias, epsilon=1e-5)


def test_rms_norm_is_prepared_in_front_and_applied_behind(build: Any, check: Any) -> None:
    check(build.model(normed(build, sum_of(build, 128))), defer_norm, 1)


def test_layer_norm_brings_the_mean_and_the_bias_along(build: Any, check: Any) -> None:
    check(
        build.model(normed(build, sum_of(build, name="LinearBiasResidual"), "LayerNormLinearBiasRelu")), defer_norm, 1
    )


def test_layer_norm_before_a_product_without_bias(build: Any, check: Any) -> None:
    check(build.model(normed(build, sum_of(build), "LayerNormLinear")), defer_norm, 1)


def test_gated_product_takes_its_norm_too(build: Any, check: Any) -> None:
    check(build.model(normed(build, sum_of(build), "RMSNormGatedLinearSilu")), defer_norm, 1)


def test_the_sum_goes_on_as_a_residual(build: Any, check: Any) -> None:
    """A layer's way: y is normalised and multiplied, and added to what comes of that, which is normalised next."""
    y = sum_of(build)
    inner = normed(build, y, "LayerNormLinearBiasRelu", 32)
    total = build.op("llmc.LinearBiasResidual", inner, build.weight("D", 64, 32), build.weight("d", 64), y)
    check(build.model(normed(build, total, "LayerNormLinearBias", which="next.")), defer_norm, 2)


def test_quantised_weights_are_folded_as_they_are_stored(build: Any) -> None:
    """Products behind a norm alone are quantised before they take it: here both are named as they would be."""
    y = sum_of(build)
    g, b, v = build.weight("g", 64), build.weight("b", 64), build.weight("V", 24, 64)
    linear = build.op("llmc.Linear", build.op("Relu", y), v)
    model = build.model(linear)
    quantize_weights(model, Scheme(8, lm_head=True))
    stored = linear.producer().inputs[1].const_value
    folded = FoldedNorm(stored, g.const_value, b.const_value).stored()
    wanted = stored.stored().astype(np.float64) @ np.stack([g.const_value.numpy(), b.const_value.numpy()], 1)
    np.testing.assert_allclose(folded, wanted.T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [8, 72, 100])
def test_a_width_that_is_no_multiple_of_64_is_left(build: Any, refused: Any, n: int) -> None:
    refused(build.model(normed(build, sum_of(build, n))), defer_norm)


def test_a_sum_that_two_products_normalise_is_left(build: Any, refused: Any) -> None:
    y = sum_of(build)
    refused(build.model(build.op("Add", normed(build, y), normed(build, y, which="other."))), defer_norm)


def test_an_activation_in_front_is_left(build: Any, refused: Any) -> None:
    refused(build.model(normed(build, sum_of(build, name="LinearBiasReluResidual"))), defer_norm)


def test_a_product_behind_that_adds_a_residual_is_left(build: Any, refused: Any) -> None:
    y = sum_of(build)
    product = build.op(
        "llmc.RMSNormLinearResidual", y, build.weight("g", 64), build.weight("V", 64, 64), y, epsilon=1e-5
    )
    refused(build.model(product), defer_norm)


def test_a_norm_behind_anything_but_a_sum_is_left(build: Any, refused: Any) -> None:
    table, tokens = build.weight("table", 11, 64), build.token_inputs()[0]
    refused(build.model(normed(build, build.op("Gather", table, tokens))), defer_norm)


def test_weights_that_are_stored_differently_are_left(build: Any, refused: Any) -> None:
    y = sum_of(build)
    bf16 = build.constant(Weight.of_array("V", np.ones((24, 64), np.float32)).stored_as("bf16"), "V")
    refused(build.model(build.op("llmc.RMSNormLinear", y, build.weight("g", 64), bf16, epsilon=1e-5)), defer_norm)


def test_a_sum_of_more_dimensions_is_left(build: Any, refused: Any) -> None:
    x, residual = build.input("x", "M", 2, 16), build.input("residual", "M", 2, 64)
    y = build.op("llmc.LinearResidual", x, build.weight("W", 64, 16), residual)
    refused(build.model(normed(build, y)), defer_norm)


def test_what_is_folded_is_summed_as_in_float64() -> None:
    random = np.random.default_rng(0)
    weight = random.normal(0, 1, (300, 512)).astype(np.float32)
    g, b = random.normal(100, 1, (2, 512)).astype(np.float32)
    bias = random.normal(0, 1, 300).astype(np.float32)
    parts = [Weight.of_array(name, array) for name, array in (("W", weight), ("g", g), ("b", b), ("c", bias))]
    found = FoldedNorm(*parts)
    assert (found.dims, found.stored_dtype, found.dtype) == ((2, 300), "f32", ir.DataType.FLOAT)
    wide = weight.astype(np.float64)
    np.testing.assert_array_equal(found.stored(), np.stack([wide @ g, wide @ b + bias]).astype(np.float32))
