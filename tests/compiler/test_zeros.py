"""Codes of 4 bits with a zero for each group: found where values are such numbers, fitted where they are not."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from llmc.compiler.quantization.quantize import Quantized, QuantizedWeight, Scheme, quantize
from llmc.compiler.weights import Weight

Array = np.ndarray[Any, Any]
ZEROS = [Scheme(4, 32, zeros=True), Scheme(4, 128, zeros=True)]
ROWS, K = 40, 256


def normal(seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(0, 0.02, (ROWS, K)).astype(np.float32)


def codes_of(levels: int, group: int) -> tuple[Array, Any]:
    """Random codes [rows, groups, group], and the generator."""
    random = np.random.default_rng(levels)
    spread = random.normal(levels / 2, levels / 4, (ROWS, K // group, group))
    return np.clip(np.rint(spread), 0, levels - 1).astype(np.float32), random


def off_by(values: Array, found: Quantized) -> Array:
    """How far the codes' numbers are from the values, in steps."""
    steps = np.repeat(found.scales.astype(np.float32), found.scheme.group, axis=1)
    return np.asarray(np.abs(found.values() - values) / np.abs(steps))


@pytest.mark.parametrize("scheme", ZEROS, ids=str)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("levels", [16, 9, 4])
def test_whole_zeros_are_met_exactly(scheme: Scheme, dtype: Any, levels: int) -> None:
    """AWQ, GPTQ with zeros, and compressed-tensors': from the first code on to one behind the last."""
    codes, random = codes_of(levels, 128)
    shape = (*codes.shape[:2], 1)
    scales = random.uniform(0.001, 0.02, shape).astype(dtype).astype(np.float32)
    values = ((codes - random.integers(0, 17, shape)) * scales).reshape(ROWS, K).astype(np.float32)
    found = quantize(values, scheme)
    np.testing.assert_array_equal(found.values(), values)
    assert found.kept == 1
    assert -8 <= found.codes.min() <= found.codes.max() <= 7
    assert found.zeros is not None
    assert (found.scales.dtype, found.zeros.dtype) == (np.float16, np.float16)
    assert found.scales.shape == found.zeros.shape == (ROWS, K // scheme.group)


def test_minima_are_met_up_to_the_rounding_of_scales_and_zeros() -> None:
    """d q + m of Q4_1, and d s q - e m of Q4_K, where both are rounded: less than a hundredth of a step."""
    codes, random = codes_of(16, 32)
    shape = (*codes.shape[:2], 1)
    d = random.uniform(0.001, 0.02, shape).astype(np.float16).astype(np.float32)
    m = (d * random.uniform(-15, 0, shape)).astype(np.float16).astype(np.float32)
    of_q4_1 = (d * codes + m).reshape(ROWS, K)
    small, minima = random.integers(20, 64, shape), random.integers(0, 64, shape)
    of_q4_k = np.float32(np.float16(1.7e-4)) * small.astype(np.float32) * codes
    of_q4_k -= np.float32(np.float16(9.1e-4)) * minima.astype(np.float32)
    for values in (of_q4_1, of_q4_k.reshape(ROWS, K)):
        found = quantize(values, ZEROS[0])
        assert found.kept == 1
        assert off_by(values, found).max() < 2**-6.5
        assert np.sqrt((off_by(values, found) ** 2).mean()) < 0.002


@pytest.mark.parametrize(("scheme", "bar"), [(ZEROS[0], 0.84), (ZEROS[1], 0.95)], ids=str)
def test_other_weights_lose_less_than_without_zeros(scheme: Scheme, bar: float) -> None:
    values = normal()
    found, plain = quantize(values, scheme), quantize(values, Scheme(4, scheme.group))
    assert found.kept == 0
    lost, plainly = (float(((each.values() - values) ** 2).sum()) for each in (found, plain))
    assert lost < bar * plainly


def test_groups_of_both_kinds_stand_side_by_side() -> None:
    codes, _ = codes_of(16, 32)
    values = ((codes - 3) * np.float32(2.0**-9)).reshape(ROWS, K)
    values[::2, 32:64] = normal()[::2, 32:64]
    found = quantize(values, ZEROS[0])
    assert found.kept == 1 - 1 / 16
    own = np.ones((ROWS, K), bool)
    own[::2, 32:64] = False
    np.testing.assert_array_equal(found.values()[own], values[own])
    assert 0 < off_by(values, found)[~own].max() < 1.5


@pytest.mark.parametrize("value", [0.0, 0.0123, -7.0, 1e-30, 4e5])
def test_groups_of_one_number_are_near_it(value: float) -> None:
    values = np.full((2, 64), value, np.float32)
    wanted = values if abs(value) > 1e-7 else 0
    np.testing.assert_allclose(quantize(values, ZEROS[0]).values(), wanted, rtol=1e-6)


@pytest.mark.parametrize("offset", [1.0, -30.0])
def test_a_zero_far_away_costs_no_more_than_its_rounding(offset: float) -> None:
    values = normal() + np.float32(offset)
    assert np.abs(quantize(values, ZEROS[0]).values() - values).max() < abs(offset) / 64


@pytest.mark.parametrize("scale", [1e-44, 1e-20, 1e38])
def test_weights_far_from_one_do_not_become_infinite(scale: float) -> None:
    values = np.clip(normal() * np.float64(50 * scale), -3e38, 3e38).astype(np.float32)
    found = quantize(values, ZEROS[0])
    assert np.isfinite(found.values()).all()


def test_the_last_group_of_a_row_may_be_short() -> None:
    values = normal()[:, :100]
    found = quantize(values, ZEROS[0])
    assert found.codes.shape == (ROWS, 100)
    assert found.scales.shape == (ROWS, 4)
    assert ((found.values() - values) ** 2).sum() < 0.01 * (values**2).sum()


def test_a_weight_with_zeros_is_int4_by_name_and_its_bytes_count_them() -> None:
    weight = QuantizedWeight(Weight.of_array("w", normal()), ZEROS[0])
    assert (weight.name, weight.stored_dtype, weight.group) == ("w.int4", "z4", 32)
    assert weight.stored_bytes == ROWS * K // 2 + ROWS * K // 32 * 4
    part = weight.quantized().rows(slice(3, 7))
    np.testing.assert_array_equal(part.values(), weight.numpy()[3:7])
