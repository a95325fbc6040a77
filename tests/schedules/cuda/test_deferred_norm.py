"""A norm between two products and deferred, on the emulator: each product against its ONNX definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmc import schedules
from llmc.compiler.fold_norm import fold_norm
from llmc.compiler.kernel import Call, DType, TensorType
from llmc.compiler.quantization.quantize import Scheme, quantize
from llmc.compiler.target import Target
from llmc.schedules.cuda.deferred_norm import settled
from llmc.schedules.cuda.linear import rule as linear
from llmc.schedules.cuda.linear.call import parse
from llmc.schedules.cuda.linear.gemm_tiles import DEVICES, Tiling
from llmc.schedules.cuda.linear.gemv_params import Gemv, leaves_room
from tests.emulator.emulate import EmulatedExecutable
from tests.schedules.cuda.test_gemm import random_inputs as product_inputs
from tests.schedules.cuda.test_linear import as_float, linear_call

Array = np.ndarray[Any, Any]
Define = Callable[..., list[Array]]

HOPPER, AMPERE = Target("cuda", "sm_90a"), Target("cuda", "sm_80")
EXACT, ROUNDED = 1e-5, 2**-8
"""Errors as a share of the largest result: sums are in f32, a tiled result is rounded once."""

SCHEMES: dict[DType, Scheme] = {"i8": Scheme(8), "i4": Scheme(4, 32), "f8": Scheme(8, number="fp")}


def moments_call(
    m: int, n: int, k: int, dtype: DType = "bf16", *, bias: bool = False, tiled_x: bool = True, columns: int = 64
) -> Call:
    """The product in front of a norm.  columns: of a part of its result."""
    plain = linear_call(f"Linear{'Bias' * bias}Residual", m, n, k, dtype, tiled_x=tiled_x)
    scaled = TensorType((m, n), dtype, tiled=dtype != "f32")
    outputs = (*plain.outputs, scaled, TensorType((n // columns, m, 2), "f32"))
    weight = TensorType((n,), dtype, constant=True)
    return replace(plain, op=f"{plain.op}Moments", inputs=(*plain.inputs, weight), outputs=outputs)


def deferred_call(
    name: str, m: int, n: int, k: int, dtype: DType = "bf16", *, tiled_y: bool = False, columns: int = 64
) -> Call:
    """The product behind a norm; name: without "Deferred"; columns: of a part of x."""
    plain = linear_call(name, m, n, k, dtype, tiled_y=tiled_y)
    rows = 2 * n if "Gated" in name else n
    more = [TensorType((m, k), dtype, tiled=dtype != "f32"), TensorType((k // columns, m, 2), "f32")]
    more += [TensorType((2, rows), "f32", constant=True)] * name.startswith("Layer")
    return replace(plain, op=f"llmc.Deferred{name}", inputs=(*plain.inputs, *more))


def stored_as(call: Call, weight: DType) -> Call:
    """Of few tokens, with a weight in 8 or 4 bits."""
    kinds, at = list(call.inputs), weight_at(call)
    kinds[at] = TensorType(as_float(kinds[at]).shape, weight, constant=True, group=32 if weight == "i4" else 0)
    return replace(call, inputs=tuple(kinds))


def weight_at(call: Call) -> int:
    return next(i for i, kind in enumerate(call.inputs) if kind and kind.constant and len(kind.shape) == 2)


def moments_of(y: Array, columns: int) -> Array:
    parts = y.astype(np.float64).reshape(len(y), -1, columns)
    mean = parts.mean(-1)
    return np.stack([mean, ((parts - mean[..., None]) ** 2).sum(-1)], -1).swapaxes(0, 1).astype(np.float32)


def random_inputs(call: Call, mean: float = 0.5) -> list[Array]:
    """Inputs of either call, with what the product in front would have handed on.  mean: of x, whose deviation is 1."""
    inputs = product_inputs(call)
    if "Deferred" in call.op:
        x = inputs[0] = inputs[0] + np.float32(mean)
        first = len(inputs) - 2 - ("LayerNorm" in call.op)
        inputs[first] = (x * inputs[1].astype(np.float32)).astype(inputs[first].dtype)
        inputs[first + 1] = moments_of(x, x.shape[1] // len(inputs[first + 1]))
        if "LayerNorm" in call.op:
            inputs[first + 2] = fold_norm(inputs[3], *inputs[1:3], *inputs[4:first])
    return inputs


def close(found: Array, expected: Array, tolerance: float) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def run(call: Call, inputs: list[Any], target: Target = HOPPER, params: linear.Params | None = None) -> list[Array]:
    chosen = linear.implement(call, params, target) if params else schedules.implement(call, target)
    return EmulatedExecutable(call, chosen, target).run(*inputs)


def defined(define: Define, call: Call, inputs: list[Array]) -> list[Array]:
    """A GEMM's moments are those of four of the operator's parts."""
    kinds, results = (tuple(map(as_float, types)) for types in (call.inputs, call.outputs))
    if not call.op.endswith("Moments") or call.op.endswith("TileMoments"):
        return define(replace(call, inputs=kinds, outputs=results), *inputs)
    m, n = call.outputs[0].shape
    fine = (*results[:2], TensorType((n // 16, m, 2), "f32"))
    y, scaled, moments = define(replace(call, inputs=kinds, outputs=fine), *inputs)
    columns = n // as_float(call.outputs[2]).shape[0]
    return [y, scaled, moments if columns == 16 else moments_of(y, columns)]


def check_moments(define: Define, call: Call, target: Target = HOPPER, params: linear.Params | None = None) -> None:
    inputs = random_inputs(call)
    for found, expected, tolerance in zip(
        run(call, inputs, target, params), defined(define, call, inputs), (EXACT, ROUNDED, EXACT), strict=True
    ):
        close(found, expected, tolerance)


def check_deferred(define: Define, call: Call, target: Target = HOPPER, params: linear.Params | None = None) -> None:
    inputs = random_inputs(call)
    (found,), (expected,) = run(call, inputs, target, params), defined(define, call, inputs)
    close(found, expected, ROUNDED if call.outputs[0].tiled else EXACT)


@pytest.mark.parametrize("target", [HOPPER, AMPERE], ids=str)
@pytest.mark.parametrize("shape", [(9, 64, 72), (16, 192, 100), (33, 128, 200), (64, 192, 64)], ids=str)
def test_the_product_in_front_hands_on_what_the_norm_needs(
    define: Define, shape: tuple[int, int, int], target: Target
) -> None:
    check_moments(define, moments_call(*shape, bias=shape[0] % 2 == 1), target)


BEHIND = [
    ("RMSNormLinear", (9, 100, 64)),
    ("RMSNormLinearBias", (64, 203, 192)),
    ("RMSNormGatedLinearSilu", (33, 72, 128)),
    ("RMSNormGatedLinearGeluBias", (17, 100, 320)),
    ("LayerNormLinear", (16, 65, 128)),
    ("LayerNormLinearBiasRelu", (33, 136, 320)),
    ("LayerNormGatedLinearGeluTanh", (64, 40, 64)),
]


@pytest.mark.parametrize("target", [HOPPER, AMPERE], ids=str)
@pytest.mark.parametrize(("name", "shape"), BEHIND, ids=str)
def test_the_product_behind_normalises_its_sums(
    define: Define, name: str, shape: tuple[int, int, int], target: Target
) -> None:
    check_deferred(define, deferred_call(name, *shape, tiled_y="Gated" in name or "Relu" in name), target)


@pytest.mark.parametrize(
    ("target", "tiling"),
    [
        (HOPPER, Tiling(24, 3, 3)),  # a tile of 16 steps in three blocks: the last to come hands on
        (HOPPER, Tiling(16, 2, 2)),  # two token tiles
        (HOPPER, Tiling(24, 2, 1, shared=False)),
        (HOPPER, Tiling(24, 2, 2, shared=False, along=True)),
        (AMPERE, Tiling(32, 3, 3)),
    ],
    ids=str,
)
def test_either_product_may_be_cut_in_many_ways(define: Define, target: Target, tiling: Tiling) -> None:
    check_moments(define, moments_call(20, 192, 1000), target, tiling)
    check_deferred(define, deferred_call("LayerNormLinearBias", 20, 200, 640), target, tiling)


@pytest.mark.parametrize("weight", ["i8", "i4"])
def test_quantised_weights_take_part(define: Define, weight: DType) -> None:
    """As what they stand for; their values are rounded to bfloat16."""
    for call in (moments_call(17, 128, 192), deferred_call("LayerNormLinearBiasRelu", 17, 72, 128)):
        check_quantised(define, call, weight, 2 * ROUNDED)


def quantised_inputs(call: Call, weight: DType) -> tuple[list[Any], list[Any]]:
    """Inputs of either call with a weight in codes, and with what they stand for."""
    at = weight_at(call)
    inputs: list[Any] = list(random_inputs(call))
    quantised = quantize(inputs[at].astype(np.float32), SCHEMES[weight])
    if "DeferredLayer" in call.op:
        inputs[-1] = fold_norm(quantised.values(), *inputs[1:3], *inputs[4 : len(inputs) - 3])
    stored, plain = list(inputs), list(inputs)
    stored[at], plain[at] = quantised, quantised.values()
    return stored, plain


def check_quantised(
    define: Define,
    call: Call,
    weight: DType,
    tolerance: float,
    params: linear.Params | None = None,
    target: Target = HOPPER,
) -> None:
    stored, plain = quantised_inputs(call, weight)
    found = run(stored_as(call, weight), stored, target, params)
    for one, other, kind in zip(found, defined(define, call, plain), call.outputs, strict=True):
        close(one, other, max(tolerance, ROUNDED * kind.tiled))


@pytest.mark.parametrize("target", [HOPPER, AMPERE], ids=str)
@pytest.mark.parametrize(
    ("shape", "weight"),
    [((1, 64, 72), "i8"), ((1, 128, 320), "i4"), ((3, 64, 64), "f8"), ((7, 192, 1100), "i8"), ((8, 128, 64), "i4")],
    ids=str,
)
def test_few_tokens_are_the_gemvs_in_front(
    define: Define, shape: tuple[int, int, int], weight: DType, target: Target
) -> None:
    check_quantised(define, moments_call(*shape, bias=shape[0] % 2 == 1, columns=16), weight, EXACT, target=target)


@pytest.mark.parametrize("target", [HOPPER, AMPERE], ids=str)
@pytest.mark.parametrize(
    ("name", "shape", "weight"),
    [
        ("RMSNormLinear", (1, 100, 64), "i8"),
        ("RMSNormGatedLinearSilu", (1, 72, 1088), "i4"),
        ("LayerNormLinearBias", (2, 65, 192), "f8"),
        ("RMSNormLinearBias", (5, 203, 192), "i8"),
        ("RMSNormGatedLinearGeluBias", (7, 100, 320), "f8"),
        ("LayerNormLinear", (6, 65, 128), "i4"),
        ("LayerNormLinearBiasRelu", (8, 136, 320), "i8"),
    ],
    ids=str,
)
def test_few_tokens_are_the_gemvs_behind(
    define: Define, name: str, shape: tuple[int, int, int], weight: DType, target: Target
) -> None:
    call = deferred_call(name, *shape, tiled_y="Gated" in name or "Relu" in name, columns=16)
    check_quantised(define, call, weight, EXACT, target=target)


@pytest.mark.parametrize(
    "params",
    [
        Gemv(6, 2, 1, 1, 1, shared_x=True),  # a block of all bands, x kept
        Gemv(4, 3, 2, 3, 2, shared_x=False),  # two tokens share a warp, twice
        Gemv(9, 2, 2, 2, 0, shared_x=False, early=True),  # a token a warp
        Gemv(6, 3, 2, 2, 2, shared_x=False, bulk=True),
        Gemv(5, 2, 4, 1, 0, shared_x=False, bulk=True),
        Gemv(5, 2, 4, 2, 0, shared_x=False, bulk=True, split=2),  # a block of one band, the other of both
        Gemv(3, 2, 4, 4, 1, shared_x=True, bulk=True, split=2),
        Gemv(6, 2, 2, 2, 1, shared_x=False, split=2),
        Gemv(4, 3, 4, 2, 1, shared_x=False, bulk=True, split=2, depth=2),
        Gemv(2, 2, 4, 1, 1, shared_x=False, depth=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("m", [1, 5, 8])
def test_either_gemv_may_be_cut_in_many_ways(define: Define, m: int, params: Gemv) -> None:
    check_quantised(define, moments_call(m, 192, 1024 if params.depth > 1 else 1000, columns=16), "i8", EXACT, params)
    check_quantised(define, deferred_call("LayerNormLinearBias", m, 200, 640, columns=16), "i8", EXACT, params)
    gated = deferred_call("RMSNormGatedLinearSilu", m, 72, 640, tiled_y=True, columns=16)
    check_quantised(define, gated, "i4", EXACT, params)


# -- when it is done -------------------------------------------------------------------------------------------------


def launches(call: Call) -> int:
    return len(schedules.implement(call, HOPPER).launches)


@pytest.mark.parametrize("m", [1, 8, 9, 16, 64])
def test_a_norm_is_no_launch_of_its_own(m: int) -> None:
    assert launches(moments_call(m, 128, 128)) == 1
    assert launches(deferred_call("RMSNormGatedLinearSilu", m, 128, 128, tiled_y=True)) == 1


@pytest.mark.parametrize("m", [1, 8, 65, 512])
def test_few_and_many_tokens_do_without_what_is_handed_on(m: int) -> None:
    """So that nobody writes it, and nobody reads it."""
    front = moments_call(m, 128, 128, columns=16)
    behind = deferred_call("LayerNormLinearBias", m, 128, 128, columns=16)
    assert settled(front, HOPPER) == linear_call("LinearResidual", m, 128, 128, tiled_x=True)
    assert settled(behind, HOPPER) == linear_call("LayerNormLinearBias", m, 128, 128)
    for call, untouched in ((front, [("output", 1), ("output", 2)]), (behind, [("input", i) for i in (5, 6, 7)])):
        implementation = schedules.implement(call, HOPPER)
        assert implementation.op == settled(call, HOPPER).op
        operands = [(o.kind, o.index) for launch in implementation.launches for o in launch.operands]
        assert not set(untouched) & set(operands)


@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_only_bfloat16_has_the_range_for_sums_that_are_not_normalised(dtype: DType) -> None:
    front, behind = moments_call(16, 128, 128, dtype), deferred_call("RMSNormLinear", 16, 128, 128, dtype)
    assert not settled(front, HOPPER).op.endswith("Moments")
    assert "Deferred" not in settled(behind, HOPPER).op
    assert launches(behind) == 2


@pytest.mark.parametrize("weight", ["i8", "f8", "i4"])
@pytest.mark.parametrize("m", [1, 8, 9, 16, 17, 64, 65])
def test_the_number_of_tokens_says_which_family_takes_quantised_weights(weight: DType, m: int) -> None:
    """To 8 the GEMV; to 16 it as well, with nothing deferred; to 64 the GEMM."""
    deferred = m <= 8 or 17 <= m <= 64
    for call in (moments_call(m, 128, 128, columns=16), deferred_call("RMSNormLinear", m, 128, 128, columns=16)):
        executed = settled(stored_as(call, weight), HOPPER)
        assert (executed.op == call.op) == deferred
        assert isinstance(linear.match(executed, HOPPER), Gemv if m <= 16 else Tiling)
        if deferred:
            moments = executed.inputs[-1] if "Deferred" in call.op else executed.outputs[2]
            assert as_float(moments).shape == (128 // (16 if m <= 8 else 64), m, 2)


def test_candidates_of_a_deferred_norm_are_of_its_family() -> None:
    for call in (moments_call(4, 128, 128), deferred_call("RMSNormLinear", 4, 128, 128)):
        assert all(isinstance(params, Gemv) for params in linear.space(stored_as(call, "i8"), HOPPER))


LLAMA = [
    deferred_call("RMSNormLinear", 8, 12288, 4096),
    moments_call(8, 4096, 4096),
    deferred_call("RMSNormGatedLinearSilu", 8, 11008, 4096, tiled_y=True),
    moments_call(8, 4096, 11008),
]


@pytest.mark.parametrize("call", LLAMA, ids=lambda call: call.op)
@pytest.mark.parametrize("weight", ["i8", "i4"])
def test_first_candidates_read_memory_in_order_with_and_without_room_for_the_next_kernel(
    call: Call, weight: DType
) -> None:
    call = settled(stored_as(call, weight), HOPPER)
    own, *others = [params for params in linear.space(call, HOPPER) if isinstance(params, Gemv)][:9]
    op = parse(call)
    assert op is not None
    assert own == linear.match(call, HOPPER)
    assert (own.side, own.bulk, own.digits) == (4, True, False)
    assert all(params.side == 4 and params.bulk for params in others)
    assert {params.split for params in (own, *others)} == {1, 2}
    assert {leaves_room(op, params, DEVICES[HOPPER.arch]) for params in (own, *others)} == {True, False}


def test_pairs_of_blocks_have_as_many_bands_each() -> None:
    """1, 3 and 6 of 64 rows."""
    for n, blocks in ((4096, 128), (12288, 128), (22016, 116)):
        params = linear.match(stored_as(deferred_call("RMSNormLinear", 1, n, 4096, columns=16), "i8"), HOPPER)
        assert isinstance(params, Gemv)
        assert (params.split, params.blocks) == (2, blocks)


# -- how exact it is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [0.0, 2.0, 6.0])
def test_a_mean_of_many_deviations_costs_what_rounding_before_centring_must(define: Define, mean: float) -> None:
    """x ∘ g is rounded while the mean is in it: by √(1 + mean²) times what the norm would be.  Rounding takes 2⁻⁸/√3 of
    a number in the mean where it is a power of two, and down to half of that just below the next."""
    call = deferred_call("LayerNormLinear", 32, 256, 512)
    inputs = random_inputs(call, mean)
    (found,) = run(call, inputs)
    (exact,) = define(linear_call("LayerNormLinear", 32, 256, 512), *inputs[:4])
    g = inputs[1].astype(np.float64)
    weight = inputs[3].astype(np.float64)
    most = 2**-8 / np.sqrt(3) * np.sqrt((1 + mean**2) * ((weight * g) ** 2).sum(1).mean())
    error = np.sqrt(((found - exact) ** 2).mean())
    assert most / 2 < error < most


def test_moments_are_exact_beside_any_mean(define: Define) -> None:
    call = moments_call(16, 64, 64)
    inputs = random_inputs(call)
    inputs[2] += np.float32(1000)
    _, _, found = run(call, inputs)
    _, _, expected = defined(define, call, inputs)
    np.testing.assert_allclose(found[..., 1], expected[..., 1], rtol=1e-3)


@pytest.mark.parametrize("turns", [0, 1, 2])
def test_a_norm_between_may_be_deferred_where_tiles_end_quickly_or_in_turns(define: Define, turns: int) -> None:
    tiling = Tiling(24, 2, 1, shared=False, turns=turns, quick=True)
    check_moments(define, moments_call(20, 192, 200, bias=True), params=tiling)
    check_deferred(define, deferred_call("LayerNormLinearBias", 20, 200, 128, tiled_y=True), params=tiling)
