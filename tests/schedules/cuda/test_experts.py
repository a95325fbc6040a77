"""Mixtures of experts on the emulator, against their ONNX definition; and what they read on paper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from llmc.compiler.kernel import Call
from llmc.compiler.quantization.quantize import Quantized
from llmc.compiler.target import Target
from llmc.schedules.cuda.experts import rule as experts
from llmc.schedules.cuda.experts.call import parse
from llmc.schedules.cuda.experts.gemm import Grouped, Table
from llmc.schedules.cuda.experts.gemv import Streamed
from llmc.schedules.cuda.linear.gemm_tiles import MMA_TOKENS
from llmc.schedules.cuda.linear.gemv_params import Gemv
from tests.emulator.emulate import EmulatedExecutable
from tests.schedules.test_experts import experts_call, random_inputs

Array = np.ndarray[Any, Any]
Define = Callable[..., list[Array]]

HOPPER, AMPERE = Target("cuda", "sm_90a"), Target("cuda", "sm_80")
STREAMED = Streamed(Gemv(2, 3, 1, 3, 0, shared_x=True), Gemv(1, 2, 2, 2, 0, shared_x=False))
CODES = Streamed(Gemv(2, 2, 2, 5, 0, shared_x=True, bulk=True), Gemv(2, 3, 4, 2, 0, shared_x=False, bulk=True))
MXFP4 = Streamed(Gemv(2, 2, 4, 3, 0, shared_x=True, bulk=True), Gemv(1, 3, 2, 2, 0, shared_x=False))
CASES: dict[str, tuple[tuple[Any, ...], experts.Params, Target]] = {
    "few tokens": ((5, 2, 3, 40, 136, "bf16", "ClampedSwishBias"), STREAMED, HOPPER),
    "few, codes": ((9, 3, 4, 72, 128, "i8"), CODES, HOPPER),
    "many tokens": ((21, 2, 5, 40, 100, "bf16", "ClampedSwishBias"), Grouped(16, (3, 2)), HOPPER),
    "many, codes": ((19, 3, 4, 72, 128, "i8"), Grouped(32, (2, 3)), AMPERE),
    "few, mxfp4": ((3, 2, 3, 40, 136, "m4", "ClampedSwishBias"), MXFP4, HOPPER),
    "few, zeros": ((6, 2, 3, 72, 128, "z4"), CODES, HOPPER),
    "many, zeros": ((18, 2, 3, 40, 136, "z4"), Grouped(24, (2, 3)), HOPPER),
    "many, zeros, Ampere": ((17, 2, 3, 72, 136, "z4"), Grouped(16, (2, 2)), AMPERE),
    "many, mxfp4": ((18, 2, 3, 40, 136, "m4", "ClampedSwishBias"), Grouped(24, (2, 3)), HOPPER),
}


RESIDUAL = ("few, codes", "many tokens")
WIDE_DOWN = ("few, zeros", "many, zeros")
"""Whose second weight is int8, as checkpoints in 4 bits may have it."""


def call_of(case: str) -> Call:
    call = experts_call(*CASES[case][0])
    if case not in WIDE_DOWN:
        return call
    *others, down = call.inputs
    assert down
    return replace(call, inputs=(*others, replace(down, dtype="i8", group=0)))


@cache
def compiled(case: str) -> tuple[Call, EmulatedExecutable]:
    _, params, target = CASES[case]
    call = call_of(case)
    if case in RESIDUAL:
        call = replace(call, op=f"{call.op}Residual", inputs=(*call.inputs, call.outputs[0]))
    return call, EmulatedExecutable(call, experts.implement(call, params, target), target)


def inputs_of(case: str) -> list[Any]:
    """x, index, share, both weights as they are stored, and the residual."""
    call = call_of(case)
    added = np.random.default_rng(1).standard_normal(call.outputs[0].shape).astype(np.float32)
    return [*random_inputs(call), *[added] * (case in RESIDUAL)]


def plain(weight: Any) -> Array:
    """As float32 [E, rows, K]."""
    if isinstance(weight, np.ndarray):
        return np.asarray(weight, np.float32)
    stored = Quantized(weight.codes, weight.scales, weight.scheme, zeros=weight.zeros)
    return stored.values().reshape(weight.shape)


def check(case: str, define: Define, index: Array | None = None) -> None:
    call, executable = compiled(case)
    x, chosen, share, *rest = inputs_of(case)
    (y,) = executable.run(x, chosen if index is None else index, share, *rest)
    inside = np.clip(chosen if index is None else index, 0, CASES[case][0][2] - 1)
    (wanted,) = define(
        call, x, inside, share, *map(plain, rest[:2]), *(np.asarray(each, np.float32) for each in rest[2:])
    )
    np.testing.assert_allclose(y, wanted, rtol=0, atol=2**-7 * np.abs(wanted).max())


@pytest.mark.parametrize("case", CASES)
def test_odd_shapes_are_what_the_definition_says(define: Define, case: str) -> None:
    check(case, define)


@pytest.mark.parametrize("case", ["few tokens", "many tokens"])
def test_any_choice_stays_within_memory(define: Define, case: str) -> None:
    """One expert for all; one twice for a token; numbers of no expert, which count as the nearest."""
    n_tokens = CASES[case][0][0]
    for numbers in ([2, 1], [1, 1], [-3, 1 << 40]):
        check(case, define, np.tile(np.array(numbers), (n_tokens, 1)))


@pytest.mark.parametrize("case", ["few tokens", "few, codes", "many tokens"])
def test_a_token_has_the_same_bits_whoever_its_neighbours_are(case: str) -> None:
    _, executable = compiled(case)
    x, index, share, *weights = inputs_of(case)
    (expected,) = executable.run(x, index, share, *weights)
    others = np.roll(index, 1, axis=0)
    others[0], x[1:] = index[0], x[1:][::-1].copy()
    (y,) = executable.run(x, others, share, *weights)
    np.testing.assert_array_equal(y[0].view(np.uint32), expected[0].view(np.uint32))


@pytest.mark.parametrize("dtype", ["bf16", "i8", "i4"])
@pytest.mark.parametrize(("chosen", "n_experts", "n", "k"), [(2, 8, 14336, 4096), (8, 128, 768, 2048)])
def test_a_step_reads_the_weights_of_its_experts_alone(dtype: str, chosen: int, n_experts: int, n: int, k: int) -> None:
    """Of one token k experts in two launches; of more those that are expected, and of 64 their rows, sorted."""
    for m in (1, 8, 64):
        call = experts_call(m, chosen, n_experts, n, k, dtype)
        params = experts.match(call, HOPPER)
        assert isinstance(params, Streamed if m <= 8 else Grouped)
        implementation = experts.implement(call, params, HOPPER)
        assert len(implementation.launches) == (2 if m <= 8 else 5)
        each = {"bf16": 2, "i8": 1 + 4 / k, "i4": 0.5625}[dtype] * 3 * n * k
        expected = n_experts * (1 - (1 - chosen / n_experts) ** m) * each
        assert sum(launch.n_bytes for launch in implementation.launches) == pytest.approx(
            expected, rel=0.02 if m <= 8 else 0.07
        )


def test_weights_are_stored_alike_or_in_codes_both() -> None:
    call = experts_call(1, 2, 3, 72, 128, "bf16")
    *others, down = call.inputs
    assert down
    assert parse(replace(call, inputs=(*others, replace(down, dtype="i8")))) is None
    mixed = parse(call_of("few, zeros"))
    assert mixed is not None
    assert (mixed.gate_up(1).weight, mixed.down(1).weight) == ("z4", "i8")


@pytest.mark.parametrize(("tokens", "chosen", "n_experts", "rows"), [(1, 8, 64, 16), (9, 2, 5, 24), (512, 8, 64, 128)])
def test_there_is_room_for_the_tiles_of_every_choice(tokens: int, chosen: int, n_experts: int, rows: int) -> None:
    op = parse(experts_call(tokens, chosen, n_experts, 64, 64, "bf16"))
    assert op
    table, generator = Table(op, rows), np.random.default_rng(0)
    for spread in (1, 2, n_experts):
        counts = np.bincount(generator.integers(0, spread, op.pairs), minlength=n_experts)
        assert (-(-counts // rows)).sum() <= table.tiles


def test_what_there_are_no_kernels_for_is_left_to_others() -> None:
    assert experts.match(experts_call(4, 2, 4, 64, 64, "f32"), HOPPER) is None


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_100a", "sm_120"])
@pytest.mark.parametrize("dtype", ["bf16", "i4"])
def test_tiles_of_mma_are_no_higher_than_it_takes(arch: str, dtype: str) -> None:
    target = Target("cuda", arch)
    for m in (64, 2048):
        call = experts_call(m, 8, 128, 768, 2048, dtype)
        cuts = [cut for cut in experts.space(call, target) if isinstance(cut, Grouped)]
        assert cuts
        assert all(cut.rows in MMA_TOKENS for cut in cuts)
        assert experts.match(call, target) == cuts[0]
