"""Adapters of tokens: the kernels say what the definition says, and a row's bits do not depend on other rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmc import schedules
from llmc.compiler.kernel import Call, TensorType, numpy_dtype
from llmc.compiler.ops import low_rank_name
from llmc.compiler.target import Target
from llmc.schedules.execute import Executable

Array = np.ndarray[Any, Any]
Run = Callable[..., list[Array]]
N_ADAPTERS = 3
SHAPES = [
    ("", 1, 700, (24, 8, 8), 8, "bf16"),
    ("", 9, 37, (13,), 5, "f32"),
    ("", 6, 1030, (32, 16), 16, "bf16"),
    ("", 4, 64, (800,), 24, "f32"),
    ("Silu", 5, 513, (40, 40), 8, "bf16"),
    ("Gelu", 1, 33, (22,), 3, "bf16"),
    ("GeluTanh", 4, 64, (32, 32), 16, "f32"),
]
"""Activation, rows, k, columns of the parts, rank, dtype of A and B."""


def low_rank_call(activation: str, m: int, k: int, sizes: tuple[int, ...], rank: int, dtype: Any) -> Call:
    n = sum(sizes)
    matrices = [(N_ADAPTERS, len(sizes) * rank, k), (N_ADAPTERS, n, rank)]
    inputs = (
        TensorType((m, n), "f32"),
        TensorType((m, k), "f32"),
        TensorType((m,), "i32"),
        *(TensorType(shape, dtype, constant=True) for shape in matrices),
        TensorType((len(sizes),), "i64", constant=True),
    )
    result = TensorType((m, n // 2 if activation else n), "f32")
    return Call(f"llmc.{low_rank_name(activation)}", inputs, (result,), (("input.5", sizes),))


def random_inputs(call: Call, adapters: Array) -> list[Array]:
    random = np.random.default_rng(0)
    made = [random.normal(size=kind.shape).astype(np.float32) for kind in call.inputs[:5] if kind is not None]
    dtypes = [numpy_dtype(kind.dtype) for kind in call.inputs[3:5] if kind is not None]
    stored = [array.astype(dtype) for array, dtype in zip(made[3:], dtypes, strict=True)]
    return [*made[:2], adapters.astype(np.int32), *stored, np.array(dict(call.attributes)["input.5"])]


def some(m: int) -> Array:
    """Adapters of m rows: four that are alike, then any."""
    return np.array([2, 2, 2, 2, -1, 0, 1, 2, -1])[:m]


@pytest.mark.parametrize(("activation", "m", "k", "sizes", "rank", "dtype"), SHAPES)
def test_each_row_has_its_own_adapter(
    run: Run, define: Run, target: Target, activation: str, m: int, k: int, sizes: Any, rank: int, dtype: Any
) -> None:
    call = low_rank_call(activation, m, k, sizes, rank, dtype)
    y, x, adapters, *rest = random_inputs(call, some(m))
    (found,) = run(call, y, x, adapters, *rest, target=target, n_tasks=3)
    (wanted,) = define(call, y, x, adapters.astype(np.int64), *rest)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())
    if not activation:
        assert np.array_equal(found[adapters < 0], y[adapters < 0])


@pytest.mark.parametrize(("activation", "k", "sizes", "rank"), [("", 700, (24, 8, 8), 8), ("Silu", 513, (40, 40), 16)])
def test_a_rows_bits_do_not_depend_on_others(
    run: Run, target: Target, activation: str, k: int, sizes: Any, rank: int
) -> None:
    whole = low_rank_call(activation, 9, k, sizes, rank, "bf16")
    y, x, adapters, *rest = random_inputs(whole, some(9))
    (found,) = run(whole, y, x, adapters, *rest, target=target, n_tasks=2)
    for rows in ([0], [8], [1, 2, 3, 4], [7, 3, 6], [0, 1, 2, 3, 7]):
        part = low_rank_call(activation, len(rows), k, sizes, rank, "bf16")
        (alone,) = run(part, y[rows], x[rows], adapters[rows], *rest, target=target, n_tasks=5)
        assert np.array_equal(alone.view(np.uint32), found[rows].view(np.uint32)), rows


def test_rows_without_an_adapter_cost_no_product(host: Target) -> None:
    call = low_rank_call("", 4, 64, (32,), 8, "f32")
    y, x, _, a, b, sizes = random_inputs(call, some(4))
    executable = Executable(call, schedules.implement(call, host), host)
    nothing = np.full_like(a, np.nan), np.full_like(b, np.nan)
    (found,) = executable.run(y, x, np.full(4, -1, np.int32), *nothing, sizes)
    assert np.array_equal(found, y)


def test_another_dtype_is_not_ours(host: Target) -> None:
    call = low_rank_call("", 4, 64, (32,), 8, "f32")
    assert schedules.rule_of(call, host)[0].name == "low_rank"
    other = replace(call, inputs=(*call.inputs[:3], TensorType((3, 8, 64), "i8", constant=True), *call.inputs[4:]))
    assert schedules.rule_of(other, host)[0].name != "low_rank"
