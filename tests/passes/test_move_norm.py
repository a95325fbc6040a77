"""passes/move_norm.py"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llmc.passes.move_norm import move_norm


def turned_and_normed(
    build: Any, *, weights: Any = 1.0, scale: float = 1.0, behind: bool = False, used_twice: bool = False
) -> ir.Model:
    """behind: heads [batch, sequence, heads, D]."""
    _, positions = build.sequence_inputs()
    x = build.input("x", "batch", *(("sequence", 2) if behind else (2, "sequence")), 8)
    numbers = build.op("Cast", build.op("Unsqueeze", positions, build.constant([2])), to=1)
    angles = build.op("Mul", numbers, build.constant(ir.tensor(np.array([1, 0.1, 0.01, 0.001], np.float32))))
    waves = [build.op("Mul", build.op(name, angles), build.constant(scale)) for name in ("Cos", "Sin")]
    swap = partial(build.op, "Transpose", perm=[0, 2, 1, 3])
    turned = build.op("RotaryEmbedding", swap(x) if behind else x, *waves, num_heads=2, interleaved=1)
    turned = swap(turned) if behind else turned
    weight = build.constant(ir.tensor((np.ones(8) * weights).astype(np.float32)))
    normed = build.op("RMSNormalization", turned, weight, axis=-1, epsilon=1e-2)
    model: ir.Model = build.model(*([normed, build.op("Abs", turned)] if used_twice else [normed]))
    return model


@pytest.mark.parametrize("behind", [False, True], ids=["heads_first", "heads_behind"])
def test_what_is_turned_is_normalised_before(build: Any, check: Any, behind: bool) -> None:
    check(turned_and_normed(build, weights=2.0, behind=behind), move_norm, 1)


def test_weights_that_differ_are_refused(build: Any, refused: Any) -> None:
    refused(turned_and_normed(build, weights=np.arange(8)), move_norm)


def test_angles_that_are_scaled_are_refused(build: Any, refused: Any) -> None:
    refused(turned_and_normed(build, scale=1.1), move_norm)


def test_what_is_used_unnormalised_too_is_left(build: Any, refused: Any) -> None:
    refused(turned_and_normed(build, used_twice=True), move_norm)


def test_angles_that_are_no_function_of_positions_are_refused(build: Any, refused: Any) -> None:
    x, cos, sin = (build.input(name, "batch", *rest) for name, *rest in WAVES)
    turned = build.op("RotaryEmbedding", x, cos, sin, num_heads=2, interleaved=0)
    weight = build.constant(ir.tensor(np.ones(8, np.float32)))
    refused(build.model(build.op("RMSNormalization", turned, weight, axis=-1, epsilon=1e-2)), move_norm)


WAVES = (("x", 2, "sequence", 8), ("cos", "sequence", 4), ("sin", "sequence", 4))
