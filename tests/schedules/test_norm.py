"""Norms against their definitions, and the promise of the same bits for every number of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmc import schedules
from llmc.compiler.kernel import Call, DType, TensorType, numpy_dtype
from llmc.compiler.target import Target

Array = np.ndarray[Any, Any]
Run = Callable[..., list[Array]]


def norm_call(op: str, shape: tuple[int, ...], dtype: DType = "f32", bias: bool = False) -> Call:
    x, vector = TensorType(shape, "f32"), TensorType(shape[-1:], dtype, constant=True)
    adds = op.startswith("llmc.Add")
    inputs = (x, *(x,) * adds, vector, *(vector,) * bias)
    attributes: tuple[tuple[str, Any], ...] = (("epsilon", 1e-5),) if adds else (("axis", -1), ("epsilon", 1e-5))
    return Call(op, inputs, (x,) * (2 if adds else 1), attributes)


CALLS = [
    norm_call("RMSNormalization", (3, 64)),
    norm_call("RMSNormalization", (5, 4, 80)),
    norm_call("RMSNormalization", (1, 4096), "bf16"),
    norm_call("RMSNormalization", (7, 101)),
    norm_call("LayerNormalization", (3, 64)),
    norm_call("LayerNormalization", (3, 96), "f16", bias=True),
    norm_call("LayerNormalization", (2, 1), bias=True),
    norm_call("llmc.AddRMSNorm", (3, 100), "bf16"),
    norm_call("llmc.AddLayerNorm", (4, 72), "bf16", bias=True),
]


def random_inputs(call: Call, seed: int = 0) -> list[Array]:
    generator = np.random.default_rng(seed)
    kinds = [kind for kind in call.inputs if kind]
    return [(generator.standard_normal(kind.shape) * 3 + 1).astype(numpy_dtype(kind.dtype)) for kind in kinds]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_a_norm_is_what_its_definition_says_on_every_level(run: Run, define: Run, target: Target, call: Call) -> None:
    assert schedules.implement(call, target).rule == "norm"
    inputs = random_inputs(call)
    results = run(call, *inputs, target=target, n_tasks=2)
    for result, expected in zip(results, define(call, *inputs), strict=True):
        np.testing.assert_allclose(result, expected, rtol=2e-5, atol=2e-6)


def query_key_norm_call(rows: int, queries: int, keys: int, values: int) -> Call:
    qkv = TensorType((rows, queries + keys + values), "f32")
    weights = (TensorType((n,), "bf16", constant=True) for n in (queries, keys))
    return Call("llmc.QueryKeyRMSNorm", (qkv, *weights), (qkv,), (("epsilon", 1e-5),))


@pytest.mark.parametrize("call", [query_key_norm_call(3, 128, 64, 64), query_key_norm_call(2, 70, 14, 14)], ids=str)
def test_queries_and_keys_are_normalised_beside_values(run: Run, define: Run, host: Target, call: Call) -> None:
    inputs = random_inputs(call)
    (result,) = run(call, *inputs, target=host, n_tasks=2)
    np.testing.assert_allclose(result, define(call, *inputs)[0], rtol=2e-5, atol=2e-6)
    first = TensorType((1, call.outputs[0].shape[1]), "f32")
    one = replace(call, inputs=(first, *call.inputs[1:]), outputs=(first,))
    (row,) = run(one, inputs[0][:1], *inputs[1:], target=host)
    np.testing.assert_array_equal(row[0], result[0])


@pytest.mark.parametrize("n_tasks", [1, 2, 3, 7])
def test_rows_have_the_same_bits_alone_and_in_any_number_of_tasks(run: Run, host: Target, n_tasks: int) -> None:
    many, one = norm_call("llmc.AddRMSNorm", (7, 80)), norm_call("llmc.AddRMSNorm", (1, 80))
    x, residual, weight = random_inputs(many)
    together = run(many, x, residual, weight, target=host, n_tasks=n_tasks)
    for row in range(7):
        alone = run(one, x[row : row + 1], residual[row : row + 1], weight, target=host)
        for whole, part in zip(together, alone, strict=True):
            np.testing.assert_array_equal(whole[row], part[0])


def test_a_poisoned_row_stays_in_its_row(run: Run, host: Target) -> None:
    call = norm_call("RMSNormalization", (3, 64))
    x, weight = random_inputs(call)
    x[1] = np.nan
    (y,) = run(call, x, weight, target=host)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize(
    "call",
    [
        Call("RMSNormalization", (TensorType((2, 3, 4), "f32"), TensorType((3, 4), "f32")), (), (("axis", 1),)),
        Call("LayerNormalization", (TensorType((2, 4), "f32"), TensorType((1,), "f32")), ()),
        Call("Softmax", (TensorType((2, 4), "f32"),), ()),
    ],
    ids=lambda call: call.op,
)
def test_other_axes_shapes_and_operators_are_left_to_others(call: Call, host: Target) -> None:
    from llmc.schedules.cpu import norm

    assert norm.match(call, host) is None
