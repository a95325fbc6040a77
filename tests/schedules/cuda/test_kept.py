"""GEMVs of int4 whose warps keep x of their own columns, in digits or in f16, on the emulator."""

from __future__ import annotations

import pytest

from llmc.compiler.kernel import Call, DType
from llmc.schedules.cuda.deferred_norm import settled
from llmc.schedules.cuda.linear import rule as linear
from llmc.schedules.cuda.linear.call import parse
from llmc.schedules.cuda.linear.gemm_tiles import DEVICES
from llmc.schedules.cuda.linear.gemv_params import Gemv, is_resident, leaves_room, ring_bytes
from tests.schedules.cuda.test_deferred_norm import (
    HOPPER,
    Define,
    check_quantised,
    deferred_call,
    moments_call,
    stored_as,
)
from tests.schedules.cuda.test_digits import DIGITS, check_every_size, check_no_number
from tests.schedules.cuda.test_linear import check_quantised as check_product
from tests.schedules.cuda.test_linear import linear_call, quantised
from tests.schedules.cuda.test_mutants import Case, is_noticed, norm_case, unnoticed

HIGH = 5e-5
"""Of x in f16: codes are multiplied raised by 1032, which takes eight bits of a sum in f32."""


def kept(
    warps: int, stages: int, blocks: int, *, digits: bool = False, split: int = 1, depth: int = 1, side: int = 4
) -> Gemv:
    return Gemv(warps, stages, side, blocks, 1, digits, digits=digits, bulk=True, split=split, depth=depth, kept=True)


def check_both(define: Define, m: int, params: Gemv, tolerance: float) -> None:
    """In front of a norm: 16 columns; behind one: 10, of gate and up."""
    check_quantised(define, moments_call(m, 192, 1000, columns=16), "i4", tolerance, params)
    gated = deferred_call("RMSNormGatedLinearSilu", m, 72, 640, tiled_y=True, columns=16)
    check_quantised(define, gated, "i4", tolerance, params)


@pytest.mark.parametrize(
    ("params", "m"),
    [
        (kept(5, 2, 2, digits=True, split=2), 1),  # warps with a column less
        (kept(3, 2, 2, digits=True, split=2, depth=2), 3),  # a warp with none of ten
        (kept(2, 3, 1, digits=True, depth=2), 4),  # many columns for a warp
        (kept(8, 1, 2, digits=True, split=2), 2),  # a column of each band for a warp, and a stage
        (Gemv(3, 2, 4, 2, 1, shared_x=True, digits=True, bulk=True, split=2, depth=2), 3),  # of all columns
    ],
    ids=str,
)
def test_x_is_kept_in_digits(define: Define, params: Gemv, m: int) -> None:
    check_both(define, m, params, DIGITS)


@pytest.mark.parametrize(
    ("params", "m"),
    [
        (kept(5, 2, 2, split=2), 1),
        (kept(6, 2, 2, split=2, depth=2), 5),  # warps without a column
        (kept(2, 3, 1, depth=2), 8),
        (kept(3, 2, 2, side=2), 8),
    ],
    ids=str,
)
def test_x_is_kept_in_f16(define: Define, params: Gemv, m: int) -> None:
    check_both(define, m, params, HIGH)


def test_tokens_beyond_eight_are_kept_too(define: Define) -> None:
    call, inputs = quantised(linear_call("LinearBiasResidual", 13, 101, 704, tiled_x=True), "i4", 32)
    check_product(call, inputs, define, kept(4, 2, 2, split=2))


def test_groups_of_128_are_multiplied_so_too(define: Define) -> None:
    call, inputs = quantised(linear_call("Linear", 6, 64, 384, tiled_x=True), "i4", 128)
    check_product(call, inputs, define, kept(2, 2, 1, depth=2))


@pytest.mark.parametrize(("digits", "tolerance"), [(True, 2 * DIGITS), (False, 2 * HIGH)])
def test_every_size_of_x_is_held_and_what_is_no_number_stays_none(
    define: Define, digits: bool, tolerance: float
) -> None:
    params = kept(2, 2, 1, digits=digits)
    check_every_size(define, params, tolerance)
    check_no_number(params)


# -- that each line of it is needed ----------------------------------------------------------------------------------


def case(params: Gemv, headers: tuple[str, ...] = ()) -> Case:
    call = deferred_call("RMSNormLinear", 3, 200, 640, columns=16)
    spare = ("__syncwarp",)  # lanes read by ldmatrix, together; those that store for others are the emulator's first
    return norm_case(call, params, weight="i4", headers=headers, spare=spare)


IN_DIGITS, IN_F16 = kept(2, 2, 2, digits=True, split=2, depth=2), kept(2, 2, 2, split=2, depth=2)


def test_no_wait_can_be_left_out() -> None:
    assert unnoticed(case(IN_F16, ("gemv_kept.cuh",))) == []


OFFSETS = [
    (IN_DIGITS, "gemv_digits.cuh", "G::kKept ? item.own :", "0 ? 0 :"),
    (IN_DIGITS, "gemv_kept.cuh", "+ j % G::kDepth;", ";"),
    (IN_F16, "gemv.cuh", "shared + warp * kOwnBytes", "shared"),
    (IN_F16, "gemv.cuh", "sum[3] *= unit.y", "sum[3] *= unit.x"),
    (IN_F16, "gemv_kept.cuh", "high = low / 16", "high = low"),
    (IN_F16, "gemv_kept.cuh", "kMinusHighOffset = 0xe480e480", "kMinusHighOffset = 0xe408e408"),
    (IN_F16, "gemv_kept.cuh", "unit, 8 * t + 4)", "unit, 8 * t)"),
    (IN_F16, "gemv_quant.cuh", "rows[row] >> 8 * i", "rows[row] >> 4 * i"),
]


@pytest.mark.parametrize(("params", "header", "old", "new"), OFFSETS)
def test_no_offset_can_be_another(params: Gemv, header: str, old: str, new: str) -> None:
    assert is_noticed(case(params), header, old, new)


# -- what is worth measuring -----------------------------------------------------------------------------------------

CALLS = {
    "qkv": lambda m: deferred_call("RMSNormLinear", m, 12288, 4096, columns=16),
    "output": lambda m: moments_call(m, 4096, 4096, columns=16),
    "gate and up": lambda m: deferred_call("RMSNormGatedLinearSilu", m, 11008, 4096, tiled_y=True, columns=16),
    "down": lambda m: moments_call(m, 4096, 11008, columns=16),
}


def offered(call: Call) -> list[Gemv]:
    return [params for params in linear.space(call, HOPPER) if isinstance(params, Gemv) and params.kept]


@pytest.mark.parametrize("name", CALLS)
def test_what_keeps_x_is_chosen_as_it_was_fastest_and_measured_beside_what_does_not(name: str) -> None:
    call = settled(stored_as(CALLS[name](1), "i4"), HOPPER)
    op, found, device = parse(call), offered(call), DEVICES[HOPPER.arch]
    assert op is not None
    own = linear.match(call, HOPPER)
    assert isinstance(own, Gemv)
    assert (own.kept, own.warps, own.depth) == (True, 16, 2)
    assert any(isinstance(each, Gemv) and not each.kept for each in list(linear.space(call, HOPPER))[:6])
    assert all(each.digits and each.early and is_resident(op, each, device, 1) for each in found)
    assert {leaves_room(op, each, device) for each in found} == {True, False}
    assert max(ring_bytes(op, each) for each in found) > 128 << 10 or name == "output"
    assert all(ring_bytes(op, each) < 110 << 10 for each in found if leaves_room(op, each, device))


@pytest.mark.parametrize("name", CALLS)
def test_x_in_f16_is_offered_where_it_is_used_more_than_once(name: str) -> None:
    found = offered(settled(stored_as(CALLS[name](8), "i4"), HOPPER))
    assert bool(found) == (name in ("qkv", "gate and up"))
    assert not any(each.digits for each in found)


def test_other_weights_keep_nothing() -> None:
    weights: list[DType] = ["i8", "f8"]
    for weight in weights:
        assert offered(settled(stored_as(CALLS["qkv"](1), weight), HOPPER)) == []
