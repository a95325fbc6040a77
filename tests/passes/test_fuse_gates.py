"""passes/fuse_gates.py"""

from __future__ import annotations

from functools import partial
from typing import Any

import onnx_ir as ir
import pytest

from llmc.passes.fuse_gates import fuse_gates

KH, VH, DK, DV = 2, 4, 8, 6


def softplus(build: Any, x: Any, threshold: float | None = 20.0) -> Any:
    y = build.op("Softplus", x)
    return y if threshold is None else build.op("Where", build.op("Greater", x, build.constant(threshold)), x, y)


def decay(build: Any, act: Any = softplus, vectors: int = VH) -> Any:
    """rate · act(a + bias)."""
    a = build.op("Add", build.input("a", "M", VH), build.weight("bias", vectors))
    return build.op("Mul", build.weight("rate", vectors), act(build, a))


def rule(build: Any, g: Any, act: str = "Sigmoid") -> Any:
    _, positions = build.token_inputs()
    slots = build.input("slots", "M", dtype=ir.DataType.INT64)
    beta = build.op(act, build.input("b", "M", VH))
    qkv, state = build.input("qkv", "M", 2 * KH * DK + VH * DV), build.input("state", "n_slots", VH, DK, DV)
    sizes = {"num_k_heads": KH, "num_v_heads": VH, "key_dim": DK, "value_dim": DV}
    settings = {"scale": 0.4, "epsilon": 1e-6, "place": 0, "n_results": 2}
    y, left = build.op("llmc.StatefulGatedDeltaRule", qkv, g, beta, positions, slots, state, **sizes, **settings)
    return build.model(y, left)


@pytest.mark.parametrize("threshold", [20.0, None], ids=str)
def test_a_rule_works_out_its_gates(build: Any, check: Any, threshold: float | None) -> None:
    check(rule(build, decay(build, partial(softplus, threshold=threshold))), fuse_gates, 1)


OTHERS: dict[str, Any] = {
    "a threshold that is too low": lambda build: rule(build, decay(build, partial(softplus, threshold=2.0))),
    "another function": lambda build: rule(build, decay(build, lambda build, x: build.op("Relu", x))),
    "a rate for all heads": lambda build: rule(build, decay(build, vectors=1)),
    "no sigmoid": lambda build: rule(build, decay(build), "Abs"),
    "no product": lambda build: rule(build, softplus(build, build.input("a", "M", VH))),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_gates_are_left(build: Any, refused: Any, kind: str) -> None:
    refused(OTHERS[kind](build), fuse_gates)
