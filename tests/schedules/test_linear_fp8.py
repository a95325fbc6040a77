"""Linear layers with fp8 weights: exact codes, and the same bits at every M."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from llmc.compiler.kernel import Call, TensorType, numpy_dtype
from llmc.compiler.quantization.quantize import Quantized, Scheme, quantize
from llmc.compiler.target import Target
from llmc.schedules.cpu.linear import rule as linear
from llmc.schedules.cpu.linear.quant_layout import Fp8Panels
from llmc.schedules.execute import Executable
from llmc.schedules.fp8_words import fp8_words
from tests.schedules.test_linear import NAMES, defined, random_inputs
from tests.schedules.test_linear import linear_call as float_call

Array = np.ndarray[Any, Any]
Run = Callable[..., list[Array]]

FP8 = Scheme(8, number="fp")
SHAPES = [(1, 33, 100), (5, 100, 302), (17, 40, 128), (1, 48, 11008), (40, 64, 7)]


def fp8_case(name: str, m: int, n: int, k: int) -> tuple[Call, Array, Quantized, list[Array]]:
    """A call, x, the weight and the rest.  Some weights are small enough for subnormal codes, and some are zero."""
    call = float_call(name, m, n, k)
    x, weight, *rest = random_inputs(call)
    weight[:, ::5] *= 1e-3
    weight[:, 1::17] = 0
    stored = TensorType(weight.shape, "f8", constant=True)
    return Call(call.op, (call.inputs[0], stored, *call.inputs[2:]), call.outputs), x, quantize(weight, FP8), rest


def rounded(x: Array) -> Array:
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_is_right_on_every_level(run: Run, target: Target, shape: tuple[int, int, int]) -> None:
    call, x, weight, _ = fp8_case("Linear", *shape)
    (y,) = run(call, x, weight, target=target, n_tasks=3)
    np.testing.assert_allclose(y, rounded(x).astype(float) @ weight.values().astype(float).T, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_operator_is_what_its_definition_says(run: Run, host: Target, name: str) -> None:
    call, x, weight, rest = fp8_case(name, 3, 40, 66)
    (y,) = run(call, x, weight, *rest, target=host)
    np.testing.assert_allclose(y, defined(call, [rounded(x), weight.values(), *rest]), atol=1e-5)


def test_every_code_is_multiplied_as_what_it_is(run: Run, target: Target) -> None:
    """Rows of x that are one at one k each pick codes out of the weight, subnormal ones alone and beside others."""
    codes = np.arange(256, dtype=np.uint8).view(numpy_dtype("f8"))
    codes = codes[np.isfinite(codes)]
    places = np.arange(256)[:, None] + np.array([0, 3, 64, 130, 7, 8, 1])
    scales = np.float32(2.0) ** np.random.default_rng(0).integers(-30, 100, (256, 1)).astype(np.float32)
    weight = Quantized(codes[places % len(codes)], scales, FP8)
    call = Call(
        "llmc.Linear", (TensorType((7, 7), "f32"), TensorType((256, 7), "f8", True)), (TensorType((7, 256), "f32"),)
    )
    (y,) = run(call, np.eye(7, dtype=np.float32), weight, target=target)
    np.testing.assert_array_equal(y.T, weight.values())


@pytest.mark.parametrize("name", ["LinearBiasGeluResidual", "GatedLinearSilu"])
def test_a_row_has_the_same_bits_whatever_is_computed_beside_it(run: Run, target: Target, name: str) -> None:
    n, k = (100, 2500) if name.startswith("Linear") else (40, 600)
    call, x, weight, rest = fp8_case(name, 128, n, k)
    (expected,) = run(call, x, weight, *rest, target=target)
    for m, first in [(1, 127), (5, 100), (37, 3)]:
        part = [array[first : first + m] if array.shape == (128, n) else array for array in rest]
        some, *_ = fp8_case(name, m, n, k)
        (y,) = run(some, x[first : first + m], weight, *part, target=target, n_tasks=2)
        np.testing.assert_array_equal(y.view(np.uint32), expected[first : first + m].view(np.uint32))


def test_tiles_change_no_bit(host: Target) -> None:
    call, x, weight, rest = fp8_case("LinearBias", 20, 256, 1100)
    inputs: list[Any] = [x, weight, *rest]
    candidates = list(linear.space(call, host))
    assert len(candidates) > 10
    results = {
        Executable(call, linear.implement(call, tiles, host), host).run(*inputs)[0].tobytes()
        for tiles in candidates[:: len(candidates) // 4]
    }
    assert len(results) == 1


def test_a_row_that_is_not_a_number_leaves_the_others_alone(run: Run, target: Target) -> None:
    call, x, weight, _ = fp8_case("Linear", 5, 40, 33)
    x[2, 32] = np.nan
    (y,) = run(call, x, weight, target=target)
    assert np.isnan(y[2]).all()
    assert np.isfinite(np.delete(y, 2, 0)).all()


@pytest.mark.parametrize("shape", [(2, 1), (100, 33), (64, 640)])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_layout_says_how_many_bytes_it_packs(shape: tuple[int, int], parts: int) -> None:
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    layout = Fp8Panels(parts)
    assert layout.pack(quantize(array, FP8)).nbytes == layout.n_bytes(shape)
    assert Fp8Panels().n_bytes((11008, 4096)) == 11008 * 4096 + 4 * 11008


@pytest.mark.parametrize("element", ["bf16", "f16"])
def test_words_hold_every_bit_of_their_codes_once(element: Any) -> None:
    for code in range(4):
        bits = fp8_words(np.uint32(1) << np.arange(8 * code, 8 * code + 8, dtype=np.uint32), element)
        assert all(int(word).bit_count() == 1 for word in bits)
    assert int(fp8_words(np.array([0xFFFFFFFF], np.uint32), element)[0]) == 0xFFFFFFFF
