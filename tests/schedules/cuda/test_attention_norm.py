"""Attention that normalises its queries and keys, on the emulator: against its ONNX definition, and key by key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmc.compiler.kernel import numpy_dtype
from llmc.schedules.cuda.attention import rule as attention
from tests.emulator.emulate import EmulatedExecutable
from tests.schedules.cuda.kv_pages import taken_apart
from tests.schedules.cuda.test_attention import (
    LENGTHS,
    N_PAGES,
    STEP,
    TARGET,
    Define,
    Kernels,
    Machine,
    Model,
    Row,
    kernels,
)

__all__ = ["kernels"]

Array = np.ndarray[Any, Any]
TOLERANCE = {"bf16": 1.6e-2, "f16": 2e-3, "f32": 4e-6, "int8": 2e-2}
"""Of the largest result: queries and keys are rounded too, once they are normalised."""
ROUNDING = {"bf16": 2.0**-8, "f16": 2.0**-11, "f32": 4e-6}
"""Of a cached key: a unit in the last place, as the sum of squares is in another order."""


def norms_of(model: Model) -> list[Array]:
    return list(np.random.default_rng(7).uniform(0.3, 1.7, (2, model.head_dim)).astype(np.float32))


class NormedMachine(Machine):
    """A layer whose queries and keys are of any size."""

    def inputs(self, rows: Sequence[Row]) -> list[Array]:
        qkv, *rest = super().inputs(rows)
        model = self.model
        sizes = 2.0 ** self.generator.integers(-6, 6, (len(rows), model.heads + 2 * model.kv_heads))
        sizes[:, model.heads + model.kv_heads :] = 1
        return [qkv * sizes.repeat(model.head_dim, axis=1).astype(np.float32), *norms_of(model), *rest]

    def check(self, rows: Sequence[Row], define: Define, run: EmulatedExecutable) -> None:
        inputs = self.inputs(rows)
        clean, ids = [np.nan_to_num(x) for x in inputs[:-2]], [x.astype(np.int64) for x in inputs[-2:]]
        expected, *expected_caches = define(self.model.definition(len(rows)), *clean, *ids, *self.caches)
        pool = self.pool(rows)
        before, layer_bytes = pool.copy(), pool.shape[1] // 2
        zeros = np.zeros_like(self.caches[0])
        out, *_ = run.run(*inputs, zeros, zeros, kv=pool.reshape(-1)[layer_bytes:])
        bound = TOLERANCE[self.model.kv_dtype] * np.abs(expected).max()
        np.testing.assert_allclose(out, expected, rtol=0, atol=bound)
        np.testing.assert_array_equal(pool[:, :layer_bytes], before[:, :layer_bytes])
        (kept, steps), (others, _) = self.numbers(pool[:, layer_bytes:]), self.numbers(before[:, layer_bytes:])
        for sequence, position in filter(None, rows):
            at = self.tables[sequence][position // 64], slice(None), slice(None), position % 64
            wanted = np.stack(expected_caches, axis=2)[at]
            np.testing.assert_array_less(np.abs(kept[at] - wanted), steps[at])
            others[at] = kept[at]
        np.testing.assert_array_equal(kept, others)

    def numbers(self, layer: Array) -> tuple[Array, Array]:
        """What the pages hold [n_pages, KH, 2, 64, D], and how far each number may be off."""
        model = self.model
        if model.kv_dtype == "int8":
            codes, scales = taken_apart(layer, model.kv_heads, model.head_dim)
            return codes * scales[..., None], np.broadcast_to(0.51 * scales[..., None], codes.shape)
        kept = layer.copy().view(numpy_dtype(model.kv_dtype)).astype(np.float32)
        if model.kv_dtype == "f32":
            kept = kept.reshape(N_PAGES, model.kv_heads, 2, 64, model.head_dim)
        else:
            kept = kept.reshape(N_PAGES, model.kv_heads, 2, model.head_dim // 8, 64, 8).swapaxes(3, 4)
            kept = kept.reshape(N_PAGES, model.kv_heads, 2, 64, model.head_dim)
        return kept, np.abs(kept) * ROUNDING[model.kv_dtype] + 1e-6


PLAIN = Model(epsilon=1e-6)
FLOAT32 = Model(heads=3, kv_heads=1, head_dim=48, rotary_dim=24, window=70, kv_dtype="f32", tiled=False, epsilon=1e-6)
SMALL = [
    PLAIN,
    Model(heads=3, kv_heads=3, head_dim=80, rotary_dim=40, interleaved=1, kv_dtype="f16", epsilon=1e-5),
    Model(heads=4, kv_heads=2, head_dim=128, rotary_dim=128, kv_dtype="int8", epsilon=1e-6),
    FLOAT32,
]
LARGE = [
    PLAIN,
    Model(heads=7, kv_heads=1, head_dim=48, rotary_dim=0, window=30, tiled=False, epsilon=0.5),
    Model(heads=20, kv_heads=1, head_dim=16, rotary_dim=8, kv_dtype="int8", tiled=False, epsilon=1e-5),
    FLOAT32,
]


@pytest.mark.parametrize("model", SMALL, ids=str)
def test_small_steps_of_several_sequences(model: Model, define: Define, kernels: Kernels) -> None:
    NormedMachine(model, LENGTHS).check(STEP, define, kernels(model, 8))


@pytest.mark.parametrize("model", LARGE, ids=str)
def test_large_steps_of_several_sequences(model: Model, define: Define, kernels: Kernels) -> None:
    rows: list[Row] = [*((0, i) for i in range(30, 65)), None, *((1, i) for i in range(100, 131)), (2, 2), (3, 200)]
    NormedMachine(model, LENGTHS).check([*rows, None], define, kernels(model, 70))


def test_a_prompt_leaves_the_same_bits_in_the_cache_in_any_chunks(define: Define, kernels: Kernels) -> None:
    """A large step, or small ones of a warp for each unit."""
    machine = NormedMachine(PLAIN, (70,))
    rows: list[Row] = [(0, i) for i in range(70)]
    inputs, small = machine.inputs(rows), kernels(PLAIN, 35, attention.Stream(1, 4, team=1))
    pools = [machine.pool(rows) for _ in range(2)]
    zeros = np.zeros_like(machine.caches[0])
    kernels(PLAIN, 70).run(*inputs, zeros, zeros, kv=pools[0].reshape(-1)[pools[0].shape[1] // 2 :])
    for part in (slice(0, 35), slice(35, 70)):
        cut = [x if i in (1, 2) else x[part] for i, x in enumerate(inputs)]
        small.run(*cut, zeros, zeros, kv=pools[1].reshape(-1)[pools[1].shape[1] // 2 :])
    np.testing.assert_array_equal(pools[0], pools[1])


def test_rounded_queries_are_not_normalised() -> None:
    assert attention.match(replace(PLAIN, rounded=True).call(65), TARGET) is None
