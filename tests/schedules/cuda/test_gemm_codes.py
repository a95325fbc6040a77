"""Products of more than 16 tokens with quantised weights on the emulator, against their ONNX definitions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmc.compiler.kernel import DType, TensorType, numpy_dtype
from llmc.compiler.target import Target
from llmc.schedules.cuda.linear import gemm, gemm_tiles
from llmc.schedules.cuda.linear import rule as linear
from llmc.schedules.cuda.linear.call import LinearOp, parse
from llmc.schedules.cuda.linear.gemm_tiles import Tiling
from llmc.schedules.cuda.linear.gemv_weight import weight_format
from tests.emulator.emulate import EmulatedExecutable
from tests.schedules.cuda.test_gemm import EXACT, LAYERS, ROUNDING
from tests.schedules.cuda.test_linear import as_float, found, linear_call, quantised

Array = np.ndarray[Any, Any]
Define = Callable[..., list[Array]]
Weight = tuple[DType, int]

HOPPER, AMPERE, ADA = Target("cuda", "sm_90a"), Target("cuda", "sm_80"), Target("cuda", "sm_89")
INT8: Weight = ("i8", 0)
FP8: Weight = ("f8", 0)
INT4: Weight = ("i4", 32)
INT4_128: Weight = ("i4", 128)
ZEROS: Weight = ("z4", 32)
ZEROS_128: Weight = ("z4", 128)


def check(
    define: Define,
    name: str,
    shape: tuple[int, int, int],
    weight: Weight,
    element: DType = "bf16",
    *,
    params: Tiling | None = None,
    target: Target = HOPPER,
) -> None:
    """The call gives what its definition does with the weight as it is multiplied: codes of 8 bits exactly, int4 codes
    less whole zeros, if they have some, times their scales rounded to `element`, once."""
    call, inputs = quantised(linear_call(name, *shape, element, tiled_x=True, tiled_y="Gated" in name), *weight)
    op = parse(call)
    assert op is not None
    if weight[0] == "z4":
        inputs[op.weight_input] = replace(inputs[op.weight_input], zeros=np.rint(inputs[op.weight_input].zeros))
    implementation = linear.implement(call, params or found(call, target), target)
    assert len(implementation.launches) == 1
    (y,) = EmulatedExecutable(call, implementation, target).run(*inputs)
    values = inputs[op.weight_input].values()
    if weight[0] in ("i4", "z4"):
        values = values.astype(numpy_dtype(element)).astype(np.float32)
    inputs[op.weight_input] = values
    plain = replace(call, inputs=tuple(map(as_float, call.inputs)), outputs=(as_float(call.outputs[0]),))
    (expected,) = define(plain, *inputs)
    tolerance = ROUNDING[element] if op.tiled_y else EXACT
    np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("target", [HOPPER, AMPERE], ids=str)
@pytest.mark.parametrize(
    ("name", "shape", "weight", "element"),
    [
        ("LinearBiasGeluResidual", (17, 101, 100), INT8, "bf16"),
        ("GatedLinearSilu", (33, 72, 200), INT8, "f16"),
        ("LinearResidual", (64, 130, 72), INT8, "bf16"),
        ("LinearBias", (200, 65, 136), INT8, "f16"),
        ("LinearBias", (33, 65, 136), FP8, "bf16"),
        ("GatedLinearSilu", (64, 40, 100), FP8, "f16"),
        ("LinearBiasResidual", (17, 65, 200), INT4, "bf16"),
        ("GatedLinearSiluBias", (33, 40, 100), INT4, "f16"),
        ("Linear", (200, 130, 72), INT4, "bf16"),
        ("GatedLinearGeluTanh", (64, 100, 264), INT4_128, "bf16"),
        ("LinearBiasRelu", (40, 66, 328), INT4_128, "f16"),
        ("LinearBiasResidual", (17, 65, 200), ZEROS, "bf16"),
        ("GatedLinearSiluBias", (33, 40, 100), ZEROS, "f16"),
        ("LinearBias", (64, 130, 264), ZEROS_128, "bf16"),
    ],
    ids=str,
)
def test_codes_are_multiplied_from_registers_in_one_launch(
    define: Define, target: Target, name: str, shape: tuple[int, int, int], weight: Weight, element: DType
) -> None:
    check(define, name, shape, weight, element, target=target)


@pytest.mark.parametrize(
    ("shape", "weight", "tiling", "target"),
    [
        ((20, 130, 1000), INT8, Tiling(24, 3, 3), HOPPER),  # two tiles of 16 steps in three blocks
        ((32, 64, 640), INT4, Tiling(32, 2, 10), HOPPER),  # one tile, a step a block
        ((200, 130, 200), INT4_128, Tiling(48, 3, 3, band=3), HOPPER),  # bands of 3 and 2 token tiles
        ((260, 100, 130), INT8, Tiling(256, 2, 2, band=2), HOPPER),
        ((64, 200, 500), INT8, Tiling(64, 3, 2, cluster=2, shared=False), HOPPER),
        ((40, 130, 500), INT4, Tiling(40, 2, 4, cluster=2), HOPPER),  # the second block's second 64 rows are not there
        ((8, 130, 640), INT8, Tiling(16, 3, 3, shared=False, along=True), HOPPER),
        ((17, 130, 256), INT4, Tiling(24, 2, 2, shared=False, along=True), HOPPER),
        ((40, 260, 200), INT8, Tiling(40, 3, 2, shared=False, turns=1, quick=True), HOPPER),
        ((70, 300, 200), INT8, Tiling(40, 2, 4, turns=2), HOPPER),  # three row tiles, the last half there
        ((70, 200, 330), INT4, Tiling(80, 2, 2, shared=False, cluster=2, turns=2, quick=True), HOPPER),
        ((20, 130, 1000), INT8, Tiling(32, 3, 3), ADA),
        ((200, 130, 200), INT4, Tiling(48, 4, 3, band=3), ADA),
        ((40, 260, 200), ZEROS, Tiling(40, 3, 2, shared=False, turns=1, quick=True), HOPPER),
    ],
    ids=str,
)
def test_they_may_be_cut_in_many_ways(
    define: Define, shape: tuple[int, int, int], weight: Weight, tiling: Tiling, target: Target
) -> None:
    check(define, "LinearBias", shape, weight, params=tiling, target=target)


def test_few_tokens_may_be_the_gemms_too(define: Define) -> None:
    call, _ = quantised(linear_call("LinearResidual", 8, 72, 200), *INT8)
    tilings = [params for params in linear.space(call, HOPPER) if isinstance(params, Tiling)]
    assert tilings
    check(define, "LinearResidual", (8, 72, 200), INT8, params=tilings[0])


def layer(m: int, shape: tuple[int, int, bool], weight: Weight) -> LinearOp:
    n, k, gated = shape
    return LinearOp(m, n, k, "bf16", *weight, gated=gated, tiled_x=True)


WEIGHTS = [INT8, FP8, INT4, INT4_128]


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
@pytest.mark.parametrize("m", [17, 64, 512])
def test_rings_of_codes_fit_the_machine(m: int, weight: Weight) -> None:
    for target in (HOPPER, AMPERE):
        device = gemm_tiles.DEVICES[target.arch]
        for shape in LAYERS:
            op = layer(m, shape, weight)
            for tiling in gemm.space(op, target):
                assert tiling.shared_bytes(op) <= device.shared_bytes
                if m <= gemm_tiles.FLAT_TOKENS and target == HOPPER:
                    assert tiling.stages * gemm_tiles.step_bytes(op) >= gemm_tiles.FLIGHT_BYTES


def costs_us(m: int, shape: tuple[int, int, bool], weight: Weight) -> tuple[float, float]:
    """On paper: of the choice, and of the weight's bytes alone."""
    op, device = layer(m, shape, weight), gemm_tiles.DEVICES[HOPPER.arch]
    choice = gemm_tiles.cost_us(op, gemm.default_params(op, HOPPER), device)
    return choice, gemm_tiles.weight_bytes(op) / device.memory


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_few_tokens_take_about_as_long_as_their_bytes_on_paper(weight: Weight) -> None:
    """int4 needs as many instructions as there are cycles while its bytes come: up to a third longer."""
    fixed_us = 3 * gemm_tiles.DEVICES[HOPPER.arch].fixed_us
    for shape in LAYERS:
        choice_us, memory_us = costs_us(32, shape, weight)
        assert choice_us < (1.35 if weight[0] == "i4" else 1.2) * memory_us + fixed_us


@pytest.mark.parametrize(("m", "share"), [(17, 0.75), (64, 0.8), (512, 1.05), (2048, 1.05)])
def test_codes_take_less_than_bf16_for_few_tokens_and_about_as_long_for_many_on_paper(m: int, share: float) -> None:
    """Bringing the weight back to memory first would add a tenth at 2048 tokens, and more to fewer."""
    for shape in LAYERS:
        bf16_us, _ = costs_us(m, shape, ("bf16", 0))
        assert all(costs_us(m, shape, weight)[0] < share * bf16_us for weight in WEIGHTS)


@pytest.mark.parametrize(
    ("weight", "row_bytes", "stored"),
    [(INT8, 128 + 4, 128 + 4), (INT4, 64 + 8, 64 + 8), (INT4_128, 64 + 2, 64 + 4)],  # a long group's scale: every 64
)
def test_a_launch_moves_the_codes_alone(weight: Weight, row_bytes: int, stored: int) -> None:
    call, _ = quantised(linear_call("GatedLinearSilu", 64, 96, 128, tiled_x=True, tiled_y=True), *weight)
    op = parse(call)
    assert op is not None
    assert weight_format(op).n_bytes == 192 * row_bytes
    (launch,) = gemm.implement(call, op, Tiling(64, 4, 2), HOPPER).launches
    assert launch.n_bytes == 256 * stored + 2 * 64 * (128 + 96)
    assert launch.kernel.dependent


def test_a_weight_of_codes_is_one_constant_for_both_families() -> None:
    few, _ = quantised(linear_call("Linear", 4, 128, 256), *INT8)
    many = replace(few, inputs=(TensorType((40, 256), "f32"), few.inputs[1]), outputs=(TensorType((40, 128), "f32"),))
    layouts = [linear.implement(call, found(call), HOPPER).layouts[1] for call in (few, many)]
    assert layouts[0] == layouts[1]
