"""Codes and scales: what they promise, what they refuse, and that the search is worth it."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from llmc.compiler.quantization import quantize
from llmc.compiler.quantization.quantize import Quantized, QuantizedWeight, Scheme
from llmc.compiler.weights import Weight
from llmc.runtime.errors import LlmcError

Array = np.ndarray[Any, Any]
FP8 = Scheme(8, number="fp")
SCHEMES = [Scheme(8), Scheme(4, 32), Scheme(4, 128), FP8]
E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)


def normal(rows: int, k: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(0, 0.02, (rows, k)).astype(np.float32)


def error(array: Array, quantized: Quantized) -> float:
    """Squared error as a share of the squares."""
    wide = array.astype(np.float64)
    return float(((quantized.values() - wide) ** 2).sum() / (wide**2).sum())


def rounded(array: Array, scheme: Scheme) -> float:
    """The error of plain rounding, where the largest weight of a group decides the scale."""
    groups = array.reshape(-1, scheme.group or array.shape[1]).astype(np.float64)
    scale = np.abs(groups).max(1, keepdims=True) / quantize.LEVELS[scheme.dtype][1]
    codes = (groups / scale).astype(ml_dtypes.float8_e4m3fn).astype(float) if scheme is FP8 else np.rint(groups / scale)
    return float(((codes * scale - groups) ** 2).sum() / (groups**2).sum())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 100), (70, 256), (5, 4100)], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_codes_and_scales_have_their_ranges_and_dtypes(scheme: Scheme, shape: tuple[int, int], dtype: Any) -> None:
    quantized = quantize.quantize(normal(*shape).astype(dtype), scheme)
    low, high = quantize.LEVELS[scheme.dtype]
    groups = -(-shape[1] // scheme.group) if scheme.group else 1
    assert (quantized.codes.dtype, quantized.codes.shape, quantized.shape) == (scheme.numpy_dtype, shape, shape)
    assert low <= quantized.codes.min() <= quantized.codes.max() <= high
    assert quantized.scales.shape == (shape[0], groups)
    assert quantized.scales.dtype == (np.float32 if scheme.bits == 8 else np.float16)
    assert (quantized.values().dtype, quantized.values().shape) == (np.float32, shape)


@pytest.mark.parametrize(
    ("scheme", "bar"), [(Scheme(8), 0.999), (Scheme(4, 32), 0.72), (Scheme(4, 128), 0.71), (FP8, 0.95)], ids=str
)
def test_the_search_beats_rounding_by_the_largest_weight(scheme: Scheme, bar: float) -> None:
    array = normal(64, 1024)
    assert error(array, quantize.quantize(array, scheme)) < bar * rounded(array, scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_codes_can_say_comes_back_exactly(scheme: Scheme) -> None:
    low, high = quantize.LEVELS[scheme.dtype]
    levels = E4M3[np.isfinite(E4M3)].astype(np.float32) if scheme is FP8 else np.arange(low, high + 1)
    codes = np.random.default_rng(0).choice(levels, (16, 256))
    codes[:, ::32] = low
    array = (codes * 2.0**-9).astype(np.float32)
    array[1::2] *= -1  # in int4, where the extreme is positive, its scale is negative
    values = quantize.quantize(array, scheme).values()
    np.testing.assert_allclose(
        values, array, rtol=2e-7 if scheme is FP8 else 0
    )  # sums of squares of floats are rounded


def test_floats_of_8_bits_are_rounded_to_the_nearest_ties_to_even_and_end_at_448() -> None:
    levels = np.unique(E4M3[np.isfinite(E4M3)].astype(np.float32))
    between = (levels[1:] + levels[:-1]) / 2
    around = [np.nextafter(between, np.float32(side)) for side in (-np.inf, np.inf)]
    values = np.concatenate([levels, between, *around, normal(1, 5000)[0], [0.0, 449, 464, 465, 1e30, -1e30]])
    found = values.astype(np.float32)
    quantize.to_levels(found, FP8)
    expected = np.clip(values, -448, 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_floats_of_8_bits_lose_more_than_integers_of_normal_weights_and_less_beside_outliers() -> None:
    array = normal(64, 1024)
    lost = [error(array, quantize.quantize(array, scheme)) for scheme in (Scheme(8), FP8)]
    assert 5 * lost[0] < lost[1] < 1e-3
    array[:, 7] *= 100
    lost = [
        error(array[:, :7], Quantized(found.codes[:, :7], found.scales, scheme))
        for scheme in (Scheme(8), FP8)
        for found in [quantize.quantize(array, scheme)]
    ]
    assert 5 * lost[1] < lost[0]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_zeros_stay_zeros(scheme: Scheme) -> None:
    array = normal(4, 256)
    array[1], array[2, :128] = 0, 0
    values = quantize.quantize(array, scheme).values()
    assert not values[1].any()
    if scheme.group:
        assert not values[2, :128].any()
    assert np.isfinite(values).all()


@pytest.mark.parametrize("scale", [1e-42, 1e-20, 1e20])
def test_weights_far_from_one_do_not_become_infinite(scale: float) -> None:
    array = (normal(4, 256) * np.float64(scale)).astype(np.float32)
    for scheme in SCHEMES:
        assert np.isfinite(quantize.quantize(array, scheme).values()).all()
    if scale > 1e-38:
        assert error(array, quantize.quantize(array, Scheme(8))) < 1e-4


def test_a_weight_is_quantised_the_same_however_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    array = normal(37, 256)
    whole = [quantize.quantize(array, scheme) for scheme in SCHEMES]
    monkeypatch.setattr(quantize, "_BLOCK_BYTES", 4096)
    for scheme, expected in zip(SCHEMES, whole, strict=True):
        again = quantize.quantize(array, scheme)
        np.testing.assert_array_equal(again.codes, expected.codes)
        np.testing.assert_array_equal(again.scales, expected.scales)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    array = normal(4, 64)
    array[3, 5] = value
    with pytest.raises(LlmcError, match="not a finite number") as caught:
        QuantizedWeight(Weight.of_array("w", array), Scheme(8)).quantized()
    assert caught.value.place == "weight w"


def test_a_quantised_weight_is_read_when_it_is_asked_for_and_not_before() -> None:
    reads = []

    def read() -> Array:
        reads.append(1)
        return normal(4, 64)

    weight = QuantizedWeight(Weight("w", (4, 64), read, "bf16"), Scheme(4, 32))
    assert (weight.name, weight.dims, weight.stored_dtype, weight.group) == ("w.int4", (4, 64), "i4", 32)
    assert weight.stored_bytes == 4 * 64 // 2 + 4 * 2 * 2
    assert not reads
    np.testing.assert_array_equal(weight.numpy(), weight.quantized().values())
    assert len(reads) == 2


def test_schemes_are_named_as_on_the_command_line() -> None:
    assert Scheme.parse("none") is None
    assert Scheme.parse("int8") == Scheme(8)
    assert Scheme.parse("int4") == Scheme(4, 32)
    assert Scheme.parse("fp8", lm_head=True) == Scheme(8, 0, True, "fp")
    assert Scheme.parse("mxfp4", lm_head=True) == Scheme(4, 32, True, "mx")
    assert Scheme.parse("int4", 128, lm_head=True) == Scheme(4, 128, lm_head=True)
    assert str(Scheme(4, 128, lm_head=True)) == "int4, groups of 128, lm_head"


@pytest.mark.parametrize(
    ("name", "group", "lm_head", "fact"),
    [
        ("fp4", None, False, "llmc quantises to int8, int4, fp8, mxfp4"),
        ("mxfp4", 32, False, "mxfp4 weights have one scale for each 32"),
        ("fp8", 32, False, "fp8 weights have one scale a row"),
        ("int8", 32, False, "int8 weights have one scale a row"),
        ("int4", 64, False, "groups are of 32 or 128 weights"),
        ("none", 32, False, "--quant-group says how to quantise, but nothing is"),
        ("none", None, True, "--quant-lm-head says how to quantise, but nothing is"),
    ],
)
def test_what_makes_no_sense_is_refused(name: str, group: int | None, lm_head: bool, fact: str) -> None:
    with pytest.raises(LlmcError, match=fact):
        Scheme.parse(name, group, lm_head)


@pytest.mark.parametrize("scale_dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_weights_that_are_codes_and_scales_keep_them(scheme: Scheme, scale_dtype: Any) -> None:
    """With codes of -128 too, extremes at other codes than the last, and float32 products that were rounded."""
    random, low = np.random.default_rng(0), -128 if scheme.bits == 8 else -8
    scales = random.uniform(0.001, 0.02, (40, 2 if scheme.group else 1)).astype(scale_dtype)
    if scheme.group:
        scales = scales.astype(np.float16)
    codes = np.clip(np.rint(random.normal(0, -low / 3, (40, 256))), low, -low - 1).astype(scheme.numpy_dtype)
    codes[::2, 0] = low if scheme is not FP8 else -448
    codes[1] = 0
    values = codes.astype(np.float32) * np.repeat(scales.astype(np.float32), 256 // scales.shape[1], 1)
    values[2::3] = normal(40, 256)[2::3]  # and some that are none
    found = quantize.quantize(values, scheme)
    own = np.arange(40) % 3 != 2
    np.testing.assert_array_equal(found.values()[own], values[own])
    assert found.kept == own.mean()
    assert error(values[~own], Quantized(found.codes[~own], found.scales[~own], scheme)) < 0.02


def test_other_weights_are_fitted_as_if_none_were_kept() -> None:
    values = normal(40, 256)
    assert [quantize.quantize(values, scheme).kept for scheme in SCHEMES] == [0] * len(SCHEMES)
