"""Norms on the emulator, against their ONNX definitions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmc.compiler.kernel import Call, TensorType, numpy_dtype
from llmc.compiler.target import Target
from llmc.schedules.cuda import gated_norm, norm, query_key_norm
from llmc.schedules.norm_call import OPERATORS
from tests.emulator.emulate import EmulatedExecutable
from tests.schedules.test_norm import query_key_norm_call, random_inputs

Array = np.ndarray[Any, Any]
Define = Callable[..., list[Array]]

TARGET = Target("cuda", "sm_90a")


def norm_call(op: str, rows: int, columns: int, *, bias: bool = True, tiled: bool = False) -> Call:
    centred, adds = OPERATORS[op]
    x, vector = TensorType((rows, columns), "f32"), TensorType((columns,), "bf16", constant=True)
    y = TensorType((rows, columns), "bf16", tiled=True) if tiled else x
    inputs = (x, *[x] * adds, vector, *[vector] * (centred and bias))
    return Call(op, inputs, (*[x] * adds, y), (("axis", -1), ("epsilon", 1e-5)))


def results(call: Call, define: Define, mean: float = 0.0) -> tuple[list[Array], list[Array]]:
    """What the kernel gives, and what the definition does, for rows around a mean."""
    generator = np.random.default_rng(0)
    inputs = []
    for kind in call.inputs:
        assert kind is not None
        centre = 0 if kind.constant else mean
        inputs.append((generator.standard_normal(kind.shape) + centre).astype(numpy_dtype(kind.dtype)))
    params = norm.match(call, TARGET)
    assert params is not None
    got = EmulatedExecutable(call, norm.implement(call, params, TARGET), TARGET).run(*inputs)
    attributes = () if call.op.startswith("llmc.") else (("axis", -1),)
    plain = replace(
        call,
        outputs=tuple(replace(kind, dtype="f32", tiled=False) for kind in call.outputs),
        attributes=(*attributes, ("epsilon", 1e-5)),
    )
    return got, define(plain, *inputs)


@pytest.mark.parametrize("op", ["RMSNormalization", "LayerNormalization"])
@pytest.mark.parametrize(("rows", "columns", "tiled"), [(265, 4104, True), (2113, 200, True), (2200, 520, False)])
def test_rows_of_a_prompt_share_a_block(define: Define, op: str, rows: int, columns: int, tiled: bool) -> None:
    """The last block has one, threads have a chunk less than others, or none."""
    call = norm_call(op, rows, columns, tiled=tiled)
    params = norm.match(call, TARGET)
    assert params is not None
    assert params.each == 2
    (got,), (expected,) = results(call, define, mean=3.0)
    tolerance = 2**-7 if tiled else 1e-5
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


def test_a_block_has_a_row_where_registers_would_not_hold_it_and_in_decode() -> None:
    for call in (
        norm_call("RMSNormalization", 264, 4096),
        norm_call("RMSNormalization", 2048, 8256),
        norm_call("RMSNormalization", 2048, 4095),
        norm_call("llmc.AddRMSNorm", 2048, 4096),
    ):
        params = norm.match(call, TARGET)
        assert params is not None
        assert (params.each, params.warps) == (1, norm.WARPS)


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("columns", [96, 101, 2304])
def test_every_norm_is_what_its_definition_says(define: Define, op: str, columns: int) -> None:
    got, expected = results(norm_call(op, 3, columns), define)
    for y, there in zip(got, expected, strict=True):
        np.testing.assert_allclose(y, there, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("op", OPERATORS)
def test_a_norm_for_products_is_rounded_and_tiled(define: Define, op: str) -> None:
    got, expected = results(norm_call(op, 9, 200, tiled=True), define)
    np.testing.assert_allclose(got[-1], expected[-1], rtol=2**-8, atol=1e-5)


def test_a_mean_far_from_zero_costs_no_precision(define: Define) -> None:
    got, expected = results(norm_call("LayerNormalization", 2, 300), define, mean=1000.0)
    np.testing.assert_allclose(got[0], expected[0], rtol=3e-4, atol=3e-4)


def test_a_layer_norm_may_have_no_bias(define: Define) -> None:
    got, expected = results(norm_call("LayerNormalization", 2, 64, bias=False), define)
    np.testing.assert_allclose(got[0], expected[0], rtol=3e-6, atol=3e-6)


def test_a_norm_over_another_axis_is_not_ours() -> None:
    call = norm_call("RMSNormalization", 4, 64)
    assert norm.match(replace(call, attributes=(("axis", 0),)), TARGET) is None


@pytest.mark.parametrize(("queries", "keys"), [(96, 48), (2304, 256)])
def test_queries_and_keys_are_normalised_beside_values(define: Define, queries: int, keys: int) -> None:
    call = query_key_norm_call(3, queries, keys, keys)
    inputs = random_inputs(call)
    params = query_key_norm.match(call, TARGET)
    assert params is not None
    (y,) = EmulatedExecutable(call, query_key_norm.implement(call, params, TARGET), TARGET).run(*inputs)
    np.testing.assert_allclose(y, define(call, *inputs)[0], rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("shape", [(3, 2, 128), (5, 1, 130), (1, 7, 24)])
def test_rows_are_multiplied_by_their_gates(define: Define, shape: tuple[int, ...]) -> None:
    x, weight = TensorType(shape, "f32"), TensorType(shape[-1:], "bf16", constant=True)
    call = Call("llmc.GatedRMSNorm", (x, x, weight), (x,), (("epsilon", 1e-6),))
    inputs = random_inputs(call)
    params = gated_norm.match(call, TARGET)
    assert params is not None
    (y,) = EmulatedExecutable(call, gated_norm.implement(call, params, TARGET), TARGET).run(*inputs)
    np.testing.assert_allclose(y, define(call, *inputs)[0], rtol=3e-6, atol=3e-6)
