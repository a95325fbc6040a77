"""passes/fuse_gated_norm.py"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from llmc.passes.fuse_gated_norm import fuse_gated_norm

H, D = 3, 8


def gated(
    build: Any, columns: int = D, axis: int = -1, act: str = "Sigmoid", gates: int = H, has_other_user: bool = False
) -> Any:
    x, z = build.input("x", "M", H, columns), build.input("z", "M", gates, columns)
    weight = build.weight("w", *(columns,) if axis == -1 else (H, columns))
    normed = build.op("RMSNormalization", x, weight, axis=axis, epsilon=1e-6)
    y = build.op("Mul", normed, build.op("Mul", build.op(act, z), z))
    return build.model(build.op("Add", y, normed) if has_other_user else y)


def test_a_norm_and_its_gate_are_one_operator(build: Any, check: Any) -> None:
    check(gated(build), fuse_gated_norm, 1)


OTHERS: dict[str, Any] = {
    "other axes": partial(gated, axis=1),
    "another function": partial(gated, act="Tanh"),
    "a gate for all heads": partial(gated, gates=1),
    "too many columns": partial(gated, columns=1032),
    "another user": partial(gated, has_other_user=True),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_others_are_left(build: Any, refused: Any, kind: str) -> None:
    refused(OTHERS[kind](build), fuse_gated_norm)
