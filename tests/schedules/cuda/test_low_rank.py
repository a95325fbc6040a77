"""What tokens' adapters add to a product, emulated, against its definition."""

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
from llmc.schedules.cuda.low_rank import LowRank
from tests.emulator.emulate import EmulatedExecutable

Array = np.ndarray[Any, Any]
HOPPER = Target("cuda", "sm_90a")
N_ADAPTERS = 3
ERROR = {"f32": 2e-6, "bf16": 6e-3, "f16": 1e-3}
"""Of the largest number, where x and what A makes of it are rounded."""
CASES: list[dict[str, Any]] = [
    {"m": 1, "k": 700, "sizes": (24, 8, 8), "rank": 8, "dtype": "bf16", "norm": "RMSNorm"},
    {"m": 9, "k": 37, "sizes": (13,), "rank": 16, "dtype": "f32"},
    {"m": 6, "k": 128, "sizes": (32, 16), "rank": 24, "dtype": "bf16", "tiled": "x"},
    {"m": 20, "k": 60, "sizes": (300,), "rank": 8, "dtype": "f32", "norm": "LayerNorm"},
    {"m": 5, "k": 513, "sizes": (40, 40), "rank": 8, "dtype": "f16", "activation": "Silu", "tiled": "y"},
    {"m": 3, "k": 64, "sizes": (64, 64), "rank": 8, "dtype": "bf16", "activation": "Gelu", "strips": True},
    {"m": 19, "k": 700, "sizes": (24, 8, 8), "rank": 8, "dtype": "bf16", "norm": "LayerNorm"},
    {"m": 32, "k": 192, "sizes": (520,), "rank": 40, "dtype": "f16", "tiled": "x"},
    {
        "m": 17,
        "k": 96,
        "sizes": (64, 64),
        "rank": 8,
        "dtype": "bf16",
        "activation": "Silu",
        "strips": True,
        "tiled": "y",
    },
    {"m": 33, "k": 36, "sizes": (24, 24), "rank": 16, "dtype": "bf16", "activation": "GeluTanh", "norm": "RMSNorm"},
    {"m": 260, "k": 320, "sizes": (16, 8, 8), "rank": 24, "dtype": "bf16", "norm": "RMSNorm"},
    {"m": 18, "k": 64, "sizes": (12, 4), "rank": 8, "dtype": "bf16"},
]


def low_rank_call(
    m: int,
    k: int,
    sizes: tuple[int, ...],
    rank: int,
    dtype: Any,
    activation: str = "",
    norm: str = "",
    strips: bool = False,
    tiled: str = "",
) -> Call:
    n, vector = sum(sizes), TensorType((k,), "f32", constant=True)
    x = TensorType((m, k), dtype, tiled=True) if tiled == "x" else TensorType((m, k), "f32")
    result = TensorType((m, n // 2 if activation else n), "f32")
    inputs = (
        TensorType((m, n), "f32"),
        x,
        *[vector] * {"": 0, "RMSNorm": 1, "LayerNorm": 2}[norm],
        TensorType((m,), "i32"),
        TensorType((N_ADAPTERS, len(sizes) * rank, k), dtype, constant=True),
        TensorType((N_ADAPTERS, n, rank), dtype, constant=True),
        TensorType((len(sizes),), "i64", constant=True),
    )
    settings: dict[str, Any] = {f"input.{len(inputs) - 1}": sizes} | ({"epsilon": 1e-5} if norm else {})
    outputs = (replace(result, dtype=dtype, tiled=True) if tiled == "y" else result,)
    return Call(
        f"llmc.{low_rank_name(activation, norm, strips=strips)}", inputs, outputs, tuple(sorted(settings.items()))
    )


def some(m: int) -> Array:
    """Adapters of m rows: of some tiles one, of others several, of others none."""
    numbers = np.resize([2] * 16 + [-1, 0, 1, 2, -1, -1, 0], m)
    numbers[48:64] = -1
    return numbers.astype(np.int32)


def random_inputs(call: Call, adapters: Array) -> list[Array]:
    random = np.random.default_rng(0)
    arrays: list[Array] = []
    for kind in call.inputs:
        assert kind is not None
        if kind.dtype == "i64":
            arrays.append(np.array(call.attribute(f"input.{len(call.inputs) - 1}")))
        elif kind.dtype == "i32":
            arrays.append(adapters)
        else:
            arrays.append(random.normal(0.2, 1.0, kind.shape).astype(numpy_dtype(kind.dtype)))
    return arrays


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_each_row_has_its_own_adapter(define: Callable[..., list[Array]], case: dict[str, Any]) -> None:
    call = low_rank_call(**case)
    arrays = random_inputs(call, some(case["m"]))
    implementation = schedules.implement(call, HOPPER)
    assert implementation.rule == "low_rank"
    (found,) = EmulatedExecutable(call, implementation, HOPPER).run(*arrays)
    result = replace(call.outputs[0], dtype="f32", tiled=False)
    (wanted,) = define(
        replace(call, outputs=(result,)),
        *[each.astype(np.int64) if each.dtype == np.int32 else each for each in arrays],
    )
    np.testing.assert_allclose(found, wanted, rtol=0, atol=ERROR[case["dtype"]] * np.abs(wanted).max())
    if not case.get("activation"):
        without = some(case["m"]) < 0
        assert np.array_equal(found[without], arrays[0][without])


def test_rows_without_an_adapter_read_no_matrix() -> None:
    for m in (2, 40):
        call = low_rank_call(m, 64, (32,), 8, "bf16")
        y, x, _, a, b, sizes = random_inputs(call, some(m))
        nothing, broken = np.full(m, -1, np.int32), np.full_like(x, np.nan)
        executable = EmulatedExecutable(call, schedules.implement(call, HOPPER), HOPPER)
        assert np.array_equal(executable.run(y, broken, nothing, a, b, sizes)[0], y)


def test_tiles_are_for_many_tokens_of_what_they_can_multiply() -> None:
    def rows_of(**changed: Any) -> bool:
        case: dict[str, Any] = {"m": 64, "k": 64, "sizes": (64,), "rank": 8, "dtype": "bf16"} | changed
        found = schedules.rule_of(low_rank_call(**case), HOPPER)[1]
        assert isinstance(found, LowRank)
        return not found.by_tiles

    assert not rows_of()
    assert rows_of(m=16)
    assert rows_of(dtype="f32")
    assert rows_of(sizes=(60, 4))
    assert rows_of(sizes=(24, 24), activation="Silu", tiled="y")


def test_one_kernel_serves_every_number_of_tokens() -> None:
    def names(m: int, **changed: Any) -> set[str]:
        call = low_rank_call(m, 64, (64, 64), 8, "bf16", **changed)
        return {launch.kernel.name for launch in schedules.implement(call, HOPPER).launches}

    assert names(1) == names(2) == names(16)
    assert names(32) == names(64) == names(128)
    assert len(names(32, tiled="x") | names(64, tiled="x")) == 3


def test_what_it_cannot_read_is_not_its_own() -> None:
    call = low_rank_call(4, 64, (32,), 8, "f32")
    other = replace(call, inputs=(*call.inputs[:3], TensorType((3, 8, 64), "i8", constant=True), *call.inputs[4:]))
    assert schedules.rule_of(other, HOPPER)[0].name != "low_rank"
