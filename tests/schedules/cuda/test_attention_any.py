"""Attention of any size on the emulator, against its ONNX definition; and over the cache of another layer, with
whatever kernels that one has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pytest

from llmc import schedules
from llmc.compiler.kernel import PAGE_TOKENS, Call, DType, TensorType
from llmc.compiler.target import Target
from llmc.runtime.errors import LlmcError
from llmc.schedules.cuda.attention import any_rule as attention_any
from llmc.schedules.cuda.attention import rule as attention
from tests.emulator.emulate import EmulatedExecutable

Array = np.ndarray[Any, Any]
Define = Callable[..., list[Array]]
N_PAGES, PAGES = 5, 3
TARGET = Target("cuda", "sm_90a")
TOLERANCE = {"bf16": 3e-2, "f16": 4e-3, "f32": 1e-5}
"""Of the largest result: keys and values are rounded to it."""


@dataclass(frozen=True)
class Layer:
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    rotary_dim: int = 0
    epsilon: float | None = None
    norms_values: bool = False
    sinks: bool = False
    window: int = 0
    kv_dtype: str = "bf16"
    tiled: bool = False
    other_bytes: int = 0  # of the layer in front

    def call(self, m: int, *, reads: bool = False) -> Call:
        """reads: over the cache that such a layer has appended to."""
        settings: dict[str, Any] = {
            "num_heads": self.heads, "kv_num_heads": self.kv_heads, "head_dim": self.head_dim, "n_layers": 2,
            "scale": self.head_dim**-0.5, "softcap": 0.0, "window": self.window, "kv_dtype": self.kv_dtype,
            "page_tokens": PAGE_TOKENS, "page_bytes": self.other_bytes + self.layer_bytes,
        }  # fmt: skip
        columns = self.heads * self.head_dim
        if not reads:
            columns += self.kv_heads * (self.head_dim + self.value_dim)
        norms = [TensorType((self.head_dim,), "f32", constant=True)] * (1 if reads else 2)
        turns = [TensorType((m, self.rotary_dim // 2), "f32")] * 2
        settings |= {"epsilon": self.epsilon} if self.epsilon is not None else {}
        settings |= {"rotary_dim": self.rotary_dim, "interleaved": 0} if self.rotary_dim else {}
        caches = [TensorType((N_PAGES, self.kv_heads, PAGE_TOKENS, n), "f32") for n in (self.head_dim, self.value_dim)]
        inputs = (
            TensorType((m, columns), "f32"),
            *(norms if self.epsilon is not None else []),
            *(turns if self.rotary_dim else []),
            *[TensorType((self.heads,), "f32", constant=True)] * self.sinks,
            TensorType((m,), "i32"),
            TensorType((m, PAGES), "i32"),
            *caches,
        )
        kind = "RMSNorm" * (self.epsilon is not None) + "Values" * (self.norms_values and not reads)
        name = (
            f"{kind}{'Rotary' * bool(self.rotary_dim)}{'Sink' * self.sinks}{'Appended' if reads else 'Paged'}Attention"
        )
        dtype = cast(DType, self.kv_dtype if self.tiled else "f32")
        out = TensorType((m, self.heads * self.value_dim), dtype, tiled=self.tiled)
        results = (out,) if reads else (out, *caches)
        return Call(f"llmc.{name}", inputs, results, tuple(sorted(settings.items())))

    @property
    def layer_bytes(self) -> int:
        size = {"f32": 4, "bf16": 2, "f16": 2, "int8": 1}[self.kv_dtype]
        return PAGE_TOKENS * self.kv_heads * (self.head_dim + self.value_dim) * size


LAYERS = {
    "long heads": Layer(3, 1, 512, 512, 128, 1e-6, norms_values=True, tiled=True),
    "values of fewer elements": Layer(4, 2, 48, 32, 16, sinks=True, window=40, other_bytes=512),
    "values of more": Layer(3, 3, 16, 80, kv_dtype="f16", tiled=True),
    "in float32": Layer(2, 1, 32, 48, 32, 1e-5, kv_dtype="f32", window=30),
}
SHARED = {
    "of a layer as most are": Layer(4, 2, 64, 64, 64, 1e-6, norms_values=True, other_bytes=4096),
    "in float32": Layer(3, 1, 48, 48, 32, kv_dtype="f32"),
    "of long heads": LAYERS["long heads"],
}
POSITIONS = np.array([*range(70), -1], np.int32)


def step_inputs(layer: Layer, *, reads: bool = False) -> list[Array]:
    """A sequence's 70 tokens, and a row that pads the step."""
    random = np.random.default_rng(0)
    call = layer.call(len(POSITIONS), reads=reads)
    drawn = [random.standard_normal(kind.shape) for kind in call.inputs[:-4] if kind]
    if layer.rotary_dim:
        at = 1 + (0 if layer.epsilon is None else 1 if reads else 2)
        drawn[at], drawn[at + 1] = np.cos(drawn[at]), np.sin(drawn[at])
    table = np.tile(np.array([3, 1, -1], np.int32), (len(POSITIONS), 1))
    return [*(x.astype(np.float32) for x in drawn), POSITIONS, table]


def defined(call: Call) -> Call:
    ours = ("n_layers", "kv_dtype", "page_tokens", "page_bytes")
    attributes = (*((name, value) for name, value in call.attributes if name not in ours), ("layer", 0))
    outputs = (replace(call.outputs[0], dtype="f32", tiled=False), *call.outputs[1:])
    return replace(call, attributes=attributes, outputs=outputs)


def zeros(call: Call) -> list[Array]:
    return [np.zeros(kind.shape if kind else (), np.float32) for kind in call.inputs[-2:]]


def run(call: Call, inputs: list[Array], pool: Array) -> Array:
    executable = EmulatedExecutable(call, schedules.implement(call, TARGET), TARGET)
    return executable.run(*inputs, *zeros(call), kv=pool)[0]


def pool_of(layer: Layer) -> Array:
    page_bytes = layer.other_bytes + layer.layer_bytes
    return np.full(page_bytes * N_PAGES, 0xFF, np.uint8)[layer.other_bytes :]  # not a number, if it were read


def numbered(inputs: list[Array]) -> list[Array]:
    return [*inputs[:-2], *(x.astype(np.int64) for x in inputs[-2:])]


@pytest.mark.parametrize("kind", LAYERS)
def test_heads_of_any_size_are_what_the_operator_is_defined_to_be(kind: str, define: Define) -> None:
    layer = LAYERS[kind]
    call, inputs = layer.call(len(POSITIONS)), step_inputs(layer)
    assert schedules.implement(call, TARGET).rule == "attention_any"
    expected = define(defined(call), *numbered(inputs), *zeros(call))[0]
    found = run(call, inputs, pool_of(layer))
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[layer.kv_dtype] * np.abs(expected).max())


@pytest.mark.parametrize("kind", SHARED)
def test_a_layer_may_share_the_cache_of_one_with_other_kernels(kind: str, define: Define) -> None:
    layer = SHARED[kind]
    owner, inputs = layer.call(len(POSITIONS)), step_inputs(layer)
    pool = pool_of(layer)
    run(owner, inputs, pool)
    filled = define(defined(owner), *numbered(inputs), *zeros(owner))[1:]
    call, inputs = layer.call(len(POSITIONS), reads=True), step_inputs(layer, reads=True)
    assert schedules.implement(call, TARGET).kv_layer_bytes == layer.layer_bytes
    expected = define(defined(call), *numbered(inputs), *filled)[0]
    before = pool.copy()
    found = run(call, inputs, pool)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[layer.kv_dtype] * np.abs(expected).max())
    np.testing.assert_array_equal(pool, before)


@pytest.mark.parametrize("m", [4, 71])
def test_values_are_normalised_by_the_faster_kernels_too(m: int, define: Define) -> None:
    layer = replace(SHARED["of a layer as most are"], other_bytes=0)
    inputs = [x if x.ndim == 1 and len(x) == 64 else x[:m] for x in step_inputs(layer)]
    call = layer.call(m)
    assert schedules.implement(call, TARGET).rule == "attention"
    expected = define(defined(call), *numbered(inputs), *zeros(call))[0]
    found = run(call, inputs, pool_of(layer))
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE["bf16"] * np.abs(expected).max())


def test_what_they_cannot_do_is_said() -> None:
    layer = LAYERS["values of fewer elements"]
    assert attention.match(layer.call(3), TARGET) is None
    with pytest.raises(LlmcError, match="a KV cache in int8 on NVIDIA GPUs takes heads of up to 256") as error:
        attention_any.match(replace(layer, kv_dtype="int8").call(3), TARGET)
    assert error.value.place == "--kv-dtype int8"
    with pytest.raises(LlmcError, match="heads of 16, 32 … 512 elements, not 528"):
        attention_any.match(replace(layer, head_dim=528).call(3), TARGET)
