"""GEMVs that multiply int4 codes as they are, by x in two digits of 8 bits, on the emulator."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.compiler.kernel import DType
from llmc.schedules.cuda.linear import rule as linear
from llmc.schedules.cuda.linear.gemv_params import Gemv
from tests.schedules.cuda.test_deferred_norm import (
    HOPPER,
    Define,
    check_quantised,
    close,
    deferred_call,
    defined,
    moments_call,
    quantised_inputs,
    run,
    stored_as,
)

DIGITS = 2e-5
"""Of x in digits: numbers of it are multiples of 2^-15 of the largest in a column."""


@pytest.mark.parametrize(
    "params",
    [
        Gemv(6, 2, 2, 2, 1, shared_x=True, digits=True),
        Gemv(9, 3, 1, 2, 0, shared_x=True, digits=True),  # warps with a column less
        Gemv(3, 2, 4, 1, 0, shared_x=True, digits=True),  # many columns for a warp
        Gemv(7, 3, 2, 2, 1, shared_x=True, digits=True, bulk=True),
        Gemv(5, 2, 4, 2, 1, shared_x=True, digits=True, bulk=True, split=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("m", [1, 3, 4])
def test_x_may_be_multiplied_in_digits(define: Define, m: int, params: Gemv) -> None:
    check_quantised(define, moments_call(m, 192, 1000, columns=16), "i4", DIGITS, params)
    check_quantised(define, deferred_call("LayerNormLinearBias", m, 200, 640, columns=16), "i4", DIGITS, params)
    gated = deferred_call("RMSNormGatedLinearSilu", m, 72, 640, tiled_y=True, columns=16)
    check_quantised(define, gated, "i4", DIGITS, params)


def test_digits_hold_every_size_of_x(define: Define) -> None:
    check_every_size(define, Gemv(6, 2, 1, 2, 0, shared_x=True, digits=True), 2 * DIGITS)


def check_every_size(define: Define, params: Gemv, tolerance: float) -> None:
    """The largest significand, which has a bit more than two digits; none; and what is too small for either."""
    call = moments_call(4, 64, 128, columns=16)
    stored, plain = quantised_inputs(call, "i4")
    x = np.zeros_like(stored[0])
    x[0, :64], x[1, 64:] = 1.9921875, -1.9921875 * 2.0**90
    x[2, :64], x[3, ::2] = 2.0**-126, 3 * 2.0**-20
    x[2, 64:], x[3, 1::2] = np.linspace(-1, 1, 64), 1
    for inputs in (stored, plain):
        inputs[0] = x
        inputs[2] = np.zeros_like(inputs[2])
    found, expected = run(stored_as(call, "i4"), stored, HOPPER, params)[0], defined(define, call, plain)[0]
    for row in range(4):
        close(found[row], expected[row], tolerance)


def test_what_is_no_number_stays_none() -> None:
    check_no_number(Gemv(6, 2, 1, 2, 0, shared_x=True, digits=True))


def check_no_number(params: Gemv) -> None:
    call = moments_call(2, 64, 128, columns=16)
    stored, _ = quantised_inputs(call, "i4")
    stored[0] = np.ones_like(stored[0])
    stored[0][0, 3], stored[0][1, 100] = np.inf, np.nan
    found = run(stored_as(call, "i4"), stored, HOPPER, params)[0]
    assert not np.isfinite(found).any()


@pytest.mark.parametrize(("weight", "m", "some"), [("i8", 1, False), ("i4", 4, True), ("i4", 5, False)])
def test_whole_numbers_are_multiplied_only_where_widening_takes_long(weight: DType, m: int, some: bool) -> None:
    call = stored_as(deferred_call("RMSNormLinear", m, 4096, 4096, columns=16), weight)
    assert any(isinstance(params, Gemv) and params.digits for params in linear.space(call, HOPPER)) == some
