"""An int8 KV cache on GPUs: the codes that a token gets, whichever kernel makes them, and what is read back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmc.compiler.target import Target
from llmc.schedules.cuda.attention import rule as attention
from tests.emulator.emulate import EmulatedExecutable
from tests.schedules.cuda.kv_pages import in_page_order, taken_apart
from tests.schedules.cuda.test_attention import N_PAGES, Model, tolerance

Array = np.ndarray[Any, Any]
TARGET = Target("cuda", "sm_90a")
LENGTH, PAGES = 76, 10
MODELS = [Model(kv_dtype="int8"), Model(heads=3, kv_heads=3, head_dim=80, rotary_dim=32, kv_dtype="int8", out="f16")]


class Prompt:
    """A sequence of LENGTH tokens over pages 3 and 1, in steps of any size."""

    def __init__(self, model: Model) -> None:
        self.model = model
        generator = np.random.default_rng(5)
        sizes = 10.0 ** generator.uniform(-4, 2, (LENGTH, 1, 1))
        heads = generator.standard_normal((LENGTH, model.columns // model.head_dim, model.head_dim)) * sizes
        heads[7] = 0  # a token of zeros, and one of numbers whose reciprocals overflow
        heads[9, model.heads :] = 1e-39
        heads[:, : model.heads] /= np.abs(heads[:, : model.heads]).max(-1, keepdims=True) + 1e-9
        self.qkv = heads.reshape(LENGTH, -1).astype(np.float32)
        angles = generator.uniform(0, 6, (LENGTH, model.rotary_dim // 2))
        self.turn = [part(angles).astype(np.float32) for part in (np.cos, np.sin)]
        self.executables: dict[int, EmulatedExecutable] = {}
        nothing = np.full((N_PAGES, model.kv_heads, 2, 64, model.head_dim), np.nan)
        layer = in_page_order(nothing, "int8")
        self.empty = np.concatenate([layer, layer], axis=1)

    def run(self, *steps: int) -> tuple[Array, Array]:
        """Results [LENGTH, H D] and the pages' bytes after steps of so many tokens."""
        pool, results, start = self.empty.copy(), [], 0
        for m in steps:
            chosen = slice(start, start + m)
            table = np.full((m, PAGES), -1, np.int32)
            table[:, :2] = 3, 1
            at = np.arange(start, start + m, dtype=np.int32)
            caches = [np.zeros((N_PAGES, self.model.kv_heads, 64, self.model.head_dim), np.float32)] * 2
            kv = pool.reshape(-1)[pool.shape[1] // 2 :]
            turn = [part[chosen] for part in self.turn]
            results.append(self.executable(m).run(self.qkv[chosen], *turn, at, table, *caches, kv=kv)[0])
            start += m
        assert start == LENGTH
        return np.concatenate(results), pool

    def executable(self, m: int) -> EmulatedExecutable:
        if m not in self.executables:
            call = self.model.call(m)
            params = attention.match(call, TARGET)
            assert params is not None
            self.executables[m] = EmulatedExecutable(call, attention.implement(call, params, TARGET), TARGET)
        return self.executables[m]


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_a_prompt_leaves_the_same_bits_in_the_cache_in_any_chunks(model: Model) -> None:
    """A large step, or small ones and then token by token: what is read back is the same, and so are results but for
    the order of sums and the rounding of weights."""
    prompt = Prompt(model)
    whole, pool = prompt.run(LENGTH)
    for steps in ((70, 6), (40, 33, 1, 1, 1)):
        results, after = prompt.run(*steps)
        np.testing.assert_array_equal(after, pool)
        size = np.abs(whole).max(-1, keepdims=True) + 1e-30  # tokens differ in size
        assert (np.abs(results - whole) / size).max() < 2 * tolerance(model)


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_codes_are_those_of_the_cpus_cache(model: Model) -> None:
    """rint(x 127 / peak) in float32, each scale peak / 127: as schedules/cpu/attention/append.py keeps them."""
    prompt = Prompt(model)
    _, pool = prompt.run(70, 6)
    codes, scales = taken_apart(pool[:, pool.shape[1] // 2 :], model.kv_heads, model.head_dim)
    heads = prompt.qkv.reshape(LENGTH, -1, model.head_dim)[:, model.heads :]
    keys, values = np.split(heads, 2, axis=1)
    keys = turned(model, keys, *prompt.turn)
    for is_value, kept in enumerate((keys, values)):
        peak = np.abs(kept).max(-1)
        per_unit = np.where(peak > 1e-30, np.float32(127) / np.maximum(peak, np.float32(1e-30)), np.float32(0))
        expected = np.rint(kept * per_unit[..., None].astype(np.float32)).astype(np.int8)
        for token in range(LENGTH):
            page = (3, 1)[token // 64]
            np.testing.assert_array_equal(codes[page, :, is_value, token % 64], expected[token])
            np.testing.assert_array_equal(scales[page, :, is_value, token % 64], peak[token] * np.float32(1 / 127))


def turned(model: Model, x: Array, cos: Array, sin: Array) -> Array:
    """The first elements of [T, heads, D] turned, with one rounding of the sum, as a fused multiply-add has."""
    half = model.rotary_dim // 2
    a, b = (x[..., part].astype(np.float64) for part in (slice(0, half), slice(half, 2 * half)))
    c, s = (part[:, None].astype(np.float64) for part in (cos, sin))
    first = a * c + (np.float32(-b) * np.float32(s)).astype(np.float64)
    second = b * c + (np.float32(a) * np.float32(s)).astype(np.float64)
    return np.concatenate([first, second, x[..., 2 * half :]], -1).astype(np.float32)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3])
def test_neither_small_values_nor_small_weights_are_lost(size: float) -> None:
    """A token that draws most of the attention but has next to no value, as models' first tokens do."""
    model = replace(MODELS[1], heads=1, kv_heads=1, tiled=False)
    prompt = Prompt(model)
    qkv = prompt.qkv.reshape(LENGTH, 3, model.head_dim)
    qkv[:, 0], qkv[:, 1], prompt.turn[0][:], prompt.turn[1][:] = 1, 0, 1, 0
    qkv[0, 1] = 1.5  # q k scale = 13.4 for the first token, 0 for the others: 670 thousand times their weight
    qkv[:, 2] = np.random.default_rng(3).uniform(0.5, 1, (LENGTH, model.head_dim)) * size
    qkv[0, 2] = 1e-9 * size
    prompt.qkv = qkv.reshape(LENGTH, -1)
    results, _ = prompt.run(70, 6)
    weights = np.exp(np.array([1.5 * model.head_dim**0.5, *[0.0] * (LENGTH - 1)]))
    for token in (1, 40, LENGTH - 1):
        expected = weights[: token + 1] @ qkv[: token + 1, 2].astype(np.float64) / weights[: token + 1].sum()
        np.testing.assert_allclose(results[token], expected, rtol=0, atol=5e-3 * np.abs(expected).max())  # codes: 4e-3
