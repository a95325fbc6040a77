"""Attention that normalises its queries and keys, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmc.compiler.target import Target
from tests.schedules.test_attention import Machine, Model, Run, check_one_sequence

NORMED = [
    Model(epsilon=1e-6),
    Model(heads=3, kv_heads=3, head_dim=80, rotary_dim=40, interleaved=1, epsilon=1e-5),
    Model(heads=7, kv_heads=1, head_dim=24, rotary_dim=0, window=30, epsilon=0.5),
]


@pytest.mark.parametrize(
    ("kv_dtype", "model"),
    [("f32", NORMED[1]), ("bf16", NORMED[0]), ("int8", NORMED[2])],
    ids=str,
)
def test_normalised_heads_agree_with_float64_and_are_the_same_in_any_step(
    run: Run, host: Target, model: Model, kv_dtype: str
) -> None:
    check_one_sequence(Machine(replace(model, kv_dtype=kv_dtype), run, host, (131,)))
