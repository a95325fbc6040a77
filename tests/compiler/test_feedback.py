"""Codes fitted to inputs: better on those than rounding, and never worse off for inputs that say little."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc.compiler.quantization import feedback, quantize
from llmc.compiler.quantization.quantize import Quantized, Scheme
from llmc.runtime.errors import LlmcError

Array = np.ndarray[Any, Any]
FP8 = Scheme(8, number="fp")
SCHEMES = [Scheme(8), Scheme(4, 32), Scheme(4, 128), FP8]


def weight(rows: int, k: int) -> Array:
    return np.random.default_rng(0).normal(0, 0.02, (rows, k)).astype(np.float32)


def inputs(n: int, k: int) -> Array:
    """Rows of a few directions and some noise, as activations are."""
    random = np.random.default_rng(1)
    x = random.normal(size=(n, k // 8)) @ random.normal(size=(k // 8, k)) + random.normal(size=(n, k))
    return x.astype(np.float32)


def loss(array: Array, found: Quantized, x: Array) -> float:
    """The share of a layer's output that is lost: |X Wᵀ - X Qᵀ|² / |X Wᵀ|²."""
    wide = x.astype(np.float64)
    return float(((wide @ (array - found.values()).T) ** 2).sum() / ((wide @ array.T) ** 2).sum())


@pytest.mark.parametrize(
    ("scheme", "bar"), [(Scheme(8), 0.5), (Scheme(4, 32), 0.6), (Scheme(4, 128), 0.55), (FP8, 0.55)], ids=str
)
@pytest.mark.parametrize("shape", [(24, 256), (40, 416)], ids=str)
def test_fitted_codes_lose_less_of_the_output_than_rounded_ones(
    scheme: Scheme, bar: float, shape: tuple[int, int]
) -> None:
    array, x = weight(*shape), inputs(2000, shape[1])
    seen, unseen = x[:1000], x[1000:]
    fitted, rounded = feedback.fit_to_inputs(array, seen.T @ seen, scheme), quantize.quantize(array, scheme)
    assert loss(array, fitted, seen) < bar * loss(array, rounded, seen)
    assert loss(array, fitted, unseen) < bar * 1.2 * loss(array, rounded, unseen)


def test_an_error_is_made_good_by_the_next_column_that_says_the_same() -> None:
    array = np.array([[0.4, 0.3, 0.4, 8.0]], np.float32)  # 8.0 makes the scale about one
    x = np.array([[1, 1, 1, 0], [0, 0, 0, 1]], np.float32).repeat(9, axis=0)
    found = feedback.fit_to_inputs(array, x.T @ x, Scheme(4, 32))
    assert quantize.quantize(array, Scheme(4, 32)).codes.tolist() == [[0, 0, 0, -8]]
    assert found.codes[0, 3] == -8
    assert found.codes[0, :3].sum() == -1  # of 1.1


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 100), (5, 300)], ids=str)
def test_codes_and_scales_are_as_without_inputs(scheme: Scheme, shape: tuple[int, int]) -> None:
    x = inputs(50, shape[1]) if shape[1] > 8 else np.ones((50, 1), np.float32)
    fitted = feedback.fit_to_inputs(weight(*shape), x.T @ x, scheme)
    rounded = quantize.quantize(weight(*shape), scheme)
    low, high = quantize.LEVELS[scheme.dtype]
    assert low <= fitted.codes.min() <= fitted.codes.max() <= high
    for one, other in ((fitted.codes, rounded.codes), (fitted.scales, rounded.scales)):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_same_inputs_make_the_same_codes(scheme: Scheme) -> None:
    array, x = weight(1100, 256), inputs(300, 256)
    one, other = (feedback.fit_to_inputs(array, x.T @ x, scheme) for _ in range(2))
    np.testing.assert_array_equal(one.codes, other.codes)
    np.testing.assert_array_equal(one.scales, other.scales)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_without_any_input_codes_are_rounded(scheme: Scheme) -> None:
    array = weight(8, 256)
    fitted = feedback.fit_to_inputs(array, np.zeros((256, 256), np.float32), scheme)
    np.testing.assert_array_equal(fitted.codes, quantize.quantize(array, scheme).codes)


def test_columns_that_meet_no_input_are_rounded_and_the_others_are_fitted_all_the_same() -> None:
    scheme, array, x = Scheme(4, 32), weight(24, 256), inputs(1000, 256)
    x[:, 32:64] = 0
    x[:, 100] = 0
    fitted, rounded = feedback.fit_to_inputs(array, x.T @ x, scheme), quantize.quantize(array, scheme)
    np.testing.assert_array_equal(fitted.codes[:, 32:64], rounded.codes[:, 32:64])
    assert np.abs(fitted.values() - array)[:, 100].max() < np.abs(array).max() / 8
    assert loss(array, fitted, x) < 0.6 * loss(array, rounded, x)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_fewer_inputs_than_columns_of_any_size_will_do(scale: float) -> None:
    array, x = weight(8, 256), inputs(2, 256) * np.float32(scale)
    fitted = feedback.fit_to_inputs(array, x.T @ x, Scheme(4, 32))
    assert loss(array, fitted, x) < 0.1 * loss(array, quantize.quantize(array, Scheme(4, 32)), x)


def test_products_that_are_not_quite_positive_definite_are_damped_more() -> None:
    products = np.ones((64, 64), np.float32)
    products[0, 1:] = products[1:, 0] = 1.2
    found = feedback.fit_to_inputs(weight(4, 64), products, Scheme(4, 32))
    assert np.isfinite(found.values()).all()


def test_a_weight_that_is_not_finite_is_refused() -> None:
    array = weight(4, 64)
    array[3, 5] = np.nan
    with pytest.raises(LlmcError, match="not a finite number") as caught:
        feedback.fit_to_inputs(array, np.eye(64, dtype=np.float32), Scheme(4, 32), "w")
    assert caught.value.place == "weight w"
