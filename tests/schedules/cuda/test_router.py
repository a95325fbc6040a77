"""Routers of experts on the emulator, against their ONNX definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llmc import schedules
from llmc.compiler.kernel import Call, TensorType
from llmc.compiler.target import Target
from tests.emulator.emulate import EmulatedExecutable

Array = np.ndarray[Any, Any]
HOPPER = Target("cuda", "sm_90a")
GROUPS = {"num_groups": 5, "kept": 2, "best": 2, "fill": -np.inf}


def router_call(name: str, m: int, n_experts: int, **settings: Any) -> Call:
    bias = [TensorType((n_experts,), "f32", constant=True)] * ("Bias" in name)
    k = settings["k"]
    outputs = TensorType((m, k), "f32"), TensorType((m, k), "i64")
    return Call(f"llmc.{name}", (TensorType((m, n_experts), "f32"), *bias), outputs, tuple(sorted(settings.items())))


@pytest.mark.parametrize(
    ("name", "shape", "settings"),
    [
        ("RouterSoftmaxNormed", (5, 70), {"k": 6, "least": 0.0}),
        ("RouterSigmoidBiasGroups", (6, 40), {"k": 3, **GROUPS}),
    ],
)
def test_choices_and_shares_are_what_the_definition_says(
    define: Callable[..., list[Array]], name: str, shape: tuple[int, int], settings: dict[str, Any]
) -> None:
    """Of equals the first comes first."""
    call = router_call(name, *shape, **settings)
    implementation = schedules.implement(call, HOPPER)
    assert implementation.rule == "router"
    x = (np.random.default_rng(0).integers(-8, 8, shape) / 4).astype(np.float32)
    bias = [np.linspace(-0.2, 0.2, shape[1]).astype(np.float32).round(1)] * ("Bias" in name)
    share, index = EmulatedExecutable(call, implementation, HOPPER).run(x, *bias)
    wanted_share, wanted_index = define(call, x, *bias)
    np.testing.assert_array_equal(index, wanted_index)
    np.testing.assert_allclose(share, wanted_share, rtol=2e-6)
