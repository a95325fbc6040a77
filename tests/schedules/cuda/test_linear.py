"""Linear layers on the emulator, against their ONNX definitions: few tokens, odd shapes, every epilogue and norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from llmc import schedules
from llmc.bench.gpu import bits
from llmc.compiler.kernel import Call, DType, TensorType, numpy_dtype
from llmc.compiler.quantization.quantize import Quantized, Scheme, quantize
from llmc.compiler.target import Target
from llmc.schedules import records
from llmc.schedules.cuda.linear import gemv
from llmc.schedules.cuda.linear import rule as linear
from llmc.schedules.cuda.linear.call import parse
from llmc.schedules.cuda.linear.gemm_tiles import Tiling
from llmc.schedules.cuda.linear.gemv_params import Gemv
from llmc.schedules.cuda.tile_layout import GatedTiles, Tiles
from tests.emulator.emulate import EmulatedExecutable

Array = np.ndarray[Any, Any]
Define = Callable[..., list[Array]]

TARGET = Target("cuda", "sm_90a")
TOLERANCE = {"bf16": 2**-7, "f16": 2**-10, "f32": 1e-5}
"""Of the largest result: x, or its norm, is rounded to the element; a tiled result is too."""


def linear_call(
    name: str, m: int, n: int, k: int, dtype: DType = "bf16", *, tiled_x: bool = False, tiled_y: bool = False
) -> Call:
    """One call of an operator of the family: x [m, k] to y [m, n]."""
    rows = 2 * n if "Gated" in name else n
    vector = TensorType((k,), dtype, constant=True)
    norm = 1 if name.startswith("RMSNorm") else 2 if name.startswith("LayerNorm") else 0
    inputs = [TensorType((m, k), dtype if tiled_x else "f32", tiled=tiled_x), *[vector] * norm]
    inputs.append(TensorType((rows, k), dtype, constant=True))
    if "Bias" in name:
        inputs.append(TensorType((rows,), dtype, constant=True))
    if "Residual" in name:
        inputs.append(TensorType((m, n), "f32"))
    y = TensorType((m, n), dtype if tiled_y else "f32", tiled=tiled_y)
    return Call(f"llmc.{name}", tuple(inputs), (y,), (("epsilon", 1e-5),) if norm else ())


def random_inputs(call: Call, seed: int = 0) -> list[Array]:
    """Inputs whose products are of about the size of 1; x is exact in the weight's type."""
    generator = np.random.default_rng(seed)
    inputs = []
    for kind in call.inputs:
        assert kind is not None
        scale = kind.shape[-1] ** -0.5 if len(kind.shape) == 2 and kind.constant else 1.0
        values = generator.standard_normal(kind.shape) * scale
        inputs.append(values.astype(numpy_dtype(kind.dtype)))
    weight = next(array for array, kind in zip(inputs, call.inputs, strict=True) if kind and kind.constant)
    inputs[0] = inputs[0].astype(weight.dtype).astype(np.float32)
    return inputs


def check(call: Call, define: Define, params: linear.Params | None = None, target: Target = TARGET) -> None:
    """The call's implementation gives what its definition does."""
    inputs = random_inputs(call)
    implementation = linear.implement(call, params or found(call, target), target)
    (y,) = EmulatedExecutable(call, implementation, target).run(*inputs)
    plain = replace(call, inputs=tuple(map(as_float, call.inputs)), outputs=(as_float(call.outputs[0]),))
    (expected,) = define(plain, *inputs)
    weight = next(kind for kind in call.inputs if kind and kind.constant)
    np.testing.assert_allclose(y, expected, rtol=0, atol=TOLERANCE[weight.dtype] * np.abs(expected).max())


def as_float(kind: TensorType | None) -> TensorType:
    assert kind is not None
    return replace(kind, dtype="f32", tiled=False)


def found(call: Call, target: Target = TARGET) -> linear.Params:
    params = linear.match(call, target)
    assert params is not None
    return params


SHAPES = [(1, 101, 64), (2, 192, 96), (3, 64, 200), (5, 688, 64), (8, 101, 200), (9, 192, 96), (16, 40, 136)]
TILED = [(1, 101, 200), (7, 192, 96), (16, 40, 136)]


@pytest.mark.parametrize(
    ("shape", "tiled"), [*((shape, False) for shape in SHAPES), *((shape, True) for shape in TILED)], ids=str
)
def test_every_small_shape_is_right(define: Define, shape: tuple[int, int, int], tiled: bool) -> None:
    check(linear_call("Linear", *shape, tiled_x=tiled, tiled_y=tiled), define)


NAMES = [
    "LinearBias",
    "LinearRelu",
    "LinearBiasGelu",
    "LinearGeluTanhResidual",
    "LinearBiasSiluResidual",
    "GatedLinearSilu",
    "GatedLinearGeluBias",
    "GatedLinearGeluTanh",
]
NORMED = [
    ("RMSNormLinear", 1),
    ("RMSNormLinear", 8),
    ("RMSNormLinear", 11),
    ("LayerNormLinearBiasRelu", 1),
    ("LayerNormLinearBias", 5),
    ("RMSNormGatedLinearSilu", 3),
    ("LayerNormLinearBiasRelu", 16),
]


@pytest.mark.parametrize("name", NAMES)
def test_every_epilogue_is_what_its_definition_says(define: Define, name: str) -> None:
    check(linear_call(name, 3, 40, 64, "f16", tiled_x=True, tiled_y="Residual" not in name), define)


@pytest.mark.parametrize(("name", "m"), NORMED)
def test_a_norm_in_front_is_part_of_the_product_or_a_launch_before_it(define: Define, name: str, m: int) -> None:
    call = linear_call(name, m, 72, 200, tiled_y="Gated" in name)
    check(call, define)
    assert len(linear.implement(call, found(call), TARGET).launches) == (1 if m <= gemv.MOST_NORMED_TOKENS else 2)


@pytest.mark.parametrize(
    ("params", "m"),
    [
        (Gemv(4, 2, 1, 5, 0, True), 2),
        (Gemv(5, 3, 2, 3, 4, True), 13),
        (Gemv(7, 4, 1, 4, 16, False), 13),
        (Gemv(16, 2, 2, 9, 3, False), 2),
        (Gemv(6, 3, 4, 2, 2, True), 13),
        (Gemv(3, 8, 2, 3, 2, False), 2),
        (Gemv(6, 2, 1, 4, 2, False, early=True), 3),
    ],
    ids=str,
)
def test_every_way_to_cut_it_up_gives_the_same(define: Define, params: Gemv, m: int) -> None:
    check(linear_call("LinearBiasResidual", m, 200, 700, tiled_x=True), define, params)


def test_a_long_k_is_summed_to_its_end(define: Define) -> None:
    check(linear_call("LinearResidual", 8, 48, 11008, tiled_x=True), define)


@pytest.mark.parametrize("level", ["sm_80", "sm_100a", "sm_120"])
def test_other_architectures_have_their_own_choice(define: Define, level: str) -> None:
    check(linear_call("RMSNormGatedLinearSilu", 2, 320, 128, tiled_y=True), define, target=Target("cuda", level))


@pytest.mark.parametrize("m", [1, 20])
def test_float32_weights_are_multiplied_in_float32(define: Define, m: int) -> None:
    check(linear_call("RMSNormLinearBiasGelu", m, 40, 100, "f32"), define)


@pytest.mark.parametrize("name", ["LayerNormLinearBiasRelu", "RMSNormGatedLinearSilu", "LinearResidual"])
def test_more_tokens_are_a_matter_for_the_gemm(define: Define, name: str) -> None:
    check(linear_call(name, 33, 72, 200, tiled_y="Residual" not in name), define)


def other_family(call: Call, target: Target = TARGET) -> Tiling:
    """The GEMM's parameters that are best on paper, for a call whose own choice is a GEMV."""
    assert isinstance(found(call, target), Gemv)
    return next(params for params in linear.space(call, target) if isinstance(params, Tiling))


@pytest.mark.parametrize(
    ("name", "m", "level"),
    [
        ("LinearResidual", 1, "sm_90a"),
        ("RMSNormGatedLinearSilu", 3, "sm_90a"),
        ("LayerNormLinearBiasRelu", 16, "sm_90a"),
        ("RMSNormLinear", 8, "sm_80"),
    ],
)
def test_few_tokens_are_either_familys_and_both_are_right(define: Define, name: str, m: int, level: str) -> None:
    call, target = linear_call(name, m, 72, 200, tiled_y="Gated" in name), Target("cuda", level)
    check(call, define, other_family(call, target), target)


@pytest.mark.parametrize("name", ["RMSNormGatedLinearSilu", "LayerNormLinearBias"])
def test_a_norm_may_be_a_launch_of_its_own(define: Define, name: str) -> None:
    call = linear_call(name, 3, 72, 200)
    params = next(params for params in linear.space(call, TARGET) if isinstance(params, Gemv) and params.apart)
    assert len(linear.implement(call, params, TARGET).launches) == 2
    check(call, define, params)


def test_the_next_kernel_is_let_in_at_once_where_each_block_normalises_x() -> None:
    for name, early in (("RMSNormLinear", True), ("LinearResidual", False)):
        params = found(linear_call(name, 1, 2048, 4096, tiled_x=not early))
        assert isinstance(params, Gemv)
        assert params.early == early


def test_a_tuned_record_chooses_the_family() -> None:
    call = linear_call("RMSNormLinear", 8, 128, 256)
    params, signature = other_family(call), records.signature(call, TARGET)
    assert signature
    times = {"time_us": 1.0, "share": 0.9, "limit": "copy bandwidth", "rate": 1.0, "heuristic_us": 2.0, "clean": 1.0}
    words = {"beat": "", "beat_ratio": 0.0, "tried": 2, "date": "2026-01-01", "machine": "invented", "llmc": "0"}
    record = records.Record(signature, "linear", asdict(params), **times, **words)  # type: ignore[arg-type]
    chosen = schedules.implement(call, TARGET, records.Tuned({signature: record}))
    assert (chosen.family, chosen.params, len(chosen.launches)) == ("flat GEMM", str(params), 2)
    assert schedules.implement(call, TARGET).family == "GEMV"


@pytest.mark.parametrize(("m", "dtype", "families"), [(17, "bf16", {Tiling}), (16, "f32", set()), (17, "i8", {Tiling})])
def test_only_families_that_are_worth_measuring_are_offered(m: int, dtype: DType, families: set[type]) -> None:
    space = linear.space(linear_call("Linear", m, 128, 256, dtype), TARGET)
    assert {type(params) for params in space} == families


SCHEMES: dict[str, Callable[[int], Scheme]] = {
    "i8": lambda group: Scheme(8),
    "f8": lambda group: Scheme(8, number="fp"),
    "i4": lambda group: Scheme(4, group),
    "z4": lambda group: Scheme(4, group, zeros=True),
}
QUANTISED = [
    ("LinearBiasResidual", (3, 101, 200), "i8", 0, "bf16"),
    ("RMSNormGatedLinearSilu", (1, 72, 320), "i8", 0, "f16"),
    ("RMSNormGatedLinearSilu", (19, 40, 200), "i8", 0, "bf16"),
    ("LinearBiasResidual", (3, 101, 200), "f8", 0, "bf16"),
    ("RMSNormGatedLinearSilu", (1, 72, 320), "f8", 0, "f16"),
    ("LinearBiasResidual", (8, 40, 11008), "f8", 0, "bf16"),
    ("RMSNormGatedLinearSilu", (19, 40, 200), "f8", 0, "bf16"),
    ("LinearBiasResidual", (17, 101, 70), "f8", 0, "f16"),
    ("LinearBiasResidual", (3, 101, 200), "i4", 128, "bf16"),
    ("Linear", (16, 64, 704), "i4", 32, "bf16"),
    ("RMSNormGatedLinearSilu", (1, 72, 320), "i4", 32, "f16"),
    ("RMSNormGatedLinearSilu", (19, 40, 200), "i4", 32, "bf16"),
    ("LinearBiasResidual", (3, 101, 200), "z4", 128, "bf16"),
    ("Linear", (16, 64, 704), "z4", 32, "bf16"),
    ("RMSNormGatedLinearSilu", (1, 72, 320), "z4", 32, "f16"),
    ("RMSNormGatedLinearSilu", (19, 40, 200), "z4", 32, "bf16"),
    ("LinearBiasResidual", (17, 101, 70), "z4", 32, "f16"),
]


@pytest.mark.parametrize(("name", "shape", "weight", "group", "element"), QUANTISED, ids=str)
def test_quantised_weights_are_multiplied_as_what_they_stand_for(
    define: Define, name: str, shape: tuple[int, int, int], weight: DType, group: int, element: DType
) -> None:
    check_quantised(*quantised(linear_call(name, *shape, element, tiled_y="Gated" in name), weight, group), define)


def quantised(call: Call, weight: DType, group: int) -> tuple[Call, list[Any]]:
    """The call with its weight quantised, and inputs for it."""
    inputs: list[Any] = random_inputs(call)
    op = parse(call)
    assert op is not None
    inputs[op.weight_input] = quantize(inputs[op.weight_input].astype(np.float32), SCHEMES[weight](group))
    return quantised_call(call, weight, group), inputs


def quantised_call(call: Call, weight: DType, group: int = 0) -> Call:
    """The call with its weight stored in `weight`."""
    op = parse(call)
    assert op is not None
    kinds = list(call.inputs)
    kinds[op.weight_input] = TensorType((op.rows, op.k), weight, constant=True, group=group)
    return replace(call, inputs=tuple(kinds))


def check_quantised(
    call: Call,
    inputs: list[Any],
    define: Define,
    params: linear.Params | None = None,
    target: Target = TARGET,
    atol: float | None = None,
) -> None:
    """The call gives what its definition does with the values that the codes stand for, up to `atol` of the largest."""
    op = parse(call)
    assert op is not None
    implementation = linear.implement(call, params or found(call, target), target)
    (y,) = EmulatedExecutable(call, implementation, target).run(*inputs)
    inputs[op.weight_input] = inputs[op.weight_input].values()
    plain = replace(call, inputs=tuple(map(as_float, call.inputs)), outputs=(as_float(call.outputs[0]),))
    (expected,) = define(plain, *inputs)
    np.testing.assert_allclose(y, expected, rtol=0, atol=(atol or TOLERANCE[op.element]) * np.abs(expected).max())


@pytest.mark.parametrize("tiled_x", [False, True])
@pytest.mark.parametrize(
    ("shape", "group", "element"), [((4, 70, 320), 32, "bf16"), ((9, 40, 264), 128, "f16")], ids=str
)
def test_zeros_cost_few_tokens_no_digit(
    define: Define, shape: tuple[int, int, int], group: int, element: DType, tiled_x: bool
) -> None:
    call, inputs = quantised(linear_call("LinearBias", *shape, element, tiled_x=tiled_x), "z4", group)
    zeros = inputs[1].zeros
    assert (zeros != np.rint(zeros)).any()
    assert isinstance(found(call), Gemv)
    check_quantised(call, inputs, define, atol=3e-6 if element == "bf16" else 2e-5)


@pytest.mark.parametrize("element", ["bf16", "f16"])
@pytest.mark.parametrize("m", [16, 64])
def test_every_code_of_fp8_is_multiplied_as_what_it_is(m: int, element: DType) -> None:
    """Rows of x that are one at one k each pick codes out of the weight; sums of one product are exact."""
    codes = np.arange(256, dtype=np.uint8).view(numpy_dtype("f8"))
    codes = codes[np.isfinite(codes)]
    places = np.arange(256)[:, None] + 3 * np.arange(64)
    weight = Quantized(codes[places % len(codes)], np.ones((256, 1), np.float32), SCHEMES["f8"](0))
    tiled = TensorType((m, 64), element, tiled=True)
    call = Call("llmc.Linear", (tiled, TensorType((256, 64), "f8", True)), (TensorType((m, 256), "f32"),))
    picked = np.arange(m) * 64 // m
    inputs: list[Any] = [np.eye(64, dtype=np.float32)[picked], weight]
    (y,) = EmulatedExecutable(call, linear.implement(call, found(call), TARGET), TARGET).run(*inputs)
    np.testing.assert_array_equal(y, weight.values().T[picked])


@pytest.mark.parametrize("layout", [Tiles("bf16"), GatedTiles("bf16"), Tiles("f16"), GatedTiles("f16")], ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (202, 200), (40, 70), (192, 96)], ids=str)
def test_packed_weights_unpack_to_what_they_were(layout: Tiles, shape: tuple[int, int]) -> None:
    weight = np.random.default_rng(0).standard_normal(shape).astype(numpy_dtype(layout.dtype))
    packed = layout.pack(weight)
    assert packed.nbytes == layout.n_bytes(shape)
    np.testing.assert_array_equal(layout.unpack(packed, shape), weight)


@pytest.mark.parametrize("shape", [(1, 64), (5, 100), (16, 200)], ids=str)
def test_tiled_activations_untile_to_what_they_were(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
    tiled = bits.tiled(x, "f16")
    assert tiled.nbytes == TensorType(shape, "f16", tiled=True).n_bytes
    np.testing.assert_array_equal(bits.untiled(tiled, shape, "f16"), x)


def test_a_linear_op_knows_where_its_inputs_are() -> None:
    op = parse(linear_call("LayerNormLinearBiasGeluTanhResidual", 4, 32, 64))
    assert op is not None
    assert (op.norm, op.activation) == ("layer", "gelu_tanh")
    assert (op.weight_input, op.bias_input, op.residual_input) == (3, 4, 5)
