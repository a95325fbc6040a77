"""Attention over a cache of latents, and products of heads: what they are defined to be, in any step the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from llmc import schedules
from llmc.compiler.kernel import PAGE_TOKENS, Call, TensorType
from llmc.compiler.target import Target
from llmc.runtime.errors import LlmcError
from llmc.schedules.cpu.attention import latent_rule as latent_attention

Array = np.ndarray[Any, Any]
Run = Callable[..., list[Array]]
H, N, RD, L, PAGES, LENGTH = 3, 16, 8, 40, 2, 70
SIZES = {"num_heads": H, "head_dim": N + RD, "latent_dim": L, "rotary_dim": RD, "interleaved": 1, "epsilon": 1e-6}
HOW = {"scale": 0.2, "softcap": 0.0, "window": 0}
TOLERANCE = {"f32": 2e-6, "bf16": 6e-3, "int8": 2e-2}


def attention_call(m: int, kv_dtype: str, **changes: Any) -> Call:
    def f32(*shape: int) -> TensorType:
        return TensorType(shape, "f32")

    rows = [f32(m, H * (N + RD)), f32(m, H * L), f32(m, L + RD), TensorType((L,), "f32", constant=True)]
    ids = [TensorType((m,), "i32"), TensorType((m, PAGES), "i32")]
    caches = (f32(1, 1, PAGE_TOKENS, RD), f32(1, 1, PAGE_TOKENS, L))
    inputs = (*rows, f32(m, RD // 2), f32(m, RD // 2), *ids, *caches)
    rest = {"n_layers": 1, "kv_dtype": kv_dtype, "page_tokens": PAGE_TOKENS}
    attributes = {**SIZES, **HOW, **rest, **changes}
    return Call("llmc.LatentPagedAttention", inputs, (f32(m, H * L), *caches), tuple(sorted(attributes.items())))


@pytest.fixture(scope="module")
def tokens() -> list[Array]:
    """What a sequence's tokens bring: q, absorbed, kv, the norm's weight, cos, sin."""
    random = np.random.default_rng(0)
    angles = random.uniform(0, 6, (LENGTH, RD // 2))
    shapes = ((LENGTH, H * (N + RD)), (LENGTH, H * L), (LENGTH, L + RD), (L,))
    parts = [random.normal(0, 1, shape) for shape in shapes]
    return [part.astype(np.float32) for part in (*parts, np.cos(angles), np.sin(angles))]


def step(
    run: Run, target: Target, kv_dtype: str, tokens: list[Array], kv: Array, rows: list[int], n_tasks: int
) -> Array:
    """Rows at these positions; -1 pads the step."""
    call = attention_call(len(rows), kv_dtype)
    inputs = [x if x.ndim == 1 else np.where(np.array(rows)[:, None] < 0, np.nan, x[rows]) for x in tokens]
    table = np.tile(np.array([2, 0], np.int32), (len(rows), 1))
    caches = [np.zeros(kind.shape, np.float32) for kind in call.inputs[-2:] if kind]
    return run(call, *inputs, np.array(rows, np.int32), table, *caches, target=target, n_tasks=n_tasks, kv=kv)[0]


@pytest.mark.parametrize(("kv_dtype", "level"), [("f32", ""), ("bf16", ""), ("int8", ""), ("bf16", "x86-64-v3")])
def test_every_step_gives_what_the_operator_is_defined_to_be(
    run: Run, define: Run, host: Target, tokens: list[Array], kv_dtype: str, level: str
) -> None:
    host = Target("cpu", level) if level else host
    page_bytes = schedules.implement(attention_call(1, kv_dtype), host).kv_layer_bytes
    kv, again = (np.full(3 * page_bytes, 0xFF, np.uint8) for _ in range(2))
    alone = np.concatenate([step(run, host, kv_dtype, tokens, kv, [i], 2) for i in range(LENGTH)])
    chunks = [[*range(40)], [*range(40, LENGTH), *[-1] * (80 - LENGTH)]]
    together = np.concatenate([step(run, host, kv_dtype, tokens, again, rows, 3) for rows in chunks])
    np.testing.assert_array_equal(together[:LENGTH], alone)
    assert not together[LENGTH:].any()
    expected = define(causal(LENGTH), *tokens)[0]
    assert np.abs(alone - expected).max() <= TOLERANCE[kv_dtype] * np.abs(expected).max()


def causal(m: int) -> Call:
    call = attention_call(m, "f32")
    kept = tuple({**SIZES, **HOW, "layer": 0}.items())
    return Call("llmc.CausalLatentAttention", call.inputs[:6], call.outputs[:1], kept)


@pytest.mark.parametrize(
    ("level", "kv_dtype", "n_bytes", "copies"),
    [("v3", "f32", 4, 1), ("v3", "bf16", 2, 1), ("v4+amx", "bf16", 2, 1), ("v4+bf16", "bf16", 2, 2)],
)
def test_the_cache_holds_no_keys_of_heads(level: str, kv_dtype: str, n_bytes: int, copies: int) -> None:
    words = PAGE_TOKENS * (L + RD + 48 * (copies - 1))  # latents once more as values, rounded up to 16
    target = Target("cpu", f"x86-64-{level}")
    assert schedules.implement(attention_call(1, kv_dtype), target).kv_layer_bytes == n_bytes * words


def test_a_block_of_latents_that_is_not_there_is_not_read(host: Target) -> None:
    call = attention_call(1, "f32", latent_dim=L - 4, rotary_dim=RD - 2)  # 42 elements of a key, 48 of a value
    assert schedules.implement(call, host).kv_layer_bytes == 4 * PAGE_TOKENS * (42 + 48)


def test_keys_too_long_for_int8_are_named(host: Target) -> None:
    with pytest.raises(LlmcError, match="keys of up to 1024 elements, not 1032"):
        latent_attention.match(attention_call(1, "int8", latent_dim=1024), host)


@pytest.mark.parametrize(("dtype", "n", "k"), [("f32", 24, 16), ("bf16", 40, 21)])
def test_each_head_is_multiplied_by_its_own_matrix(run: Run, host: Target, dtype: Any, n: int, k: int) -> None:
    random = np.random.default_rng(0)
    x, weight = random.normal(size=(9, 3 * 24)).astype(np.float32), random.normal(size=(3, n, k)).astype(np.float32)
    if dtype == "bf16":
        x, weight = (array.astype(ml_dtypes.bfloat16).astype(np.float32) for array in (x, weight))
    expected = np.einsum("mhk,hnk->mhn", x.reshape(9, 3, 24)[..., :k].astype(np.float64), weight).reshape(9, -1)

    def product(rows: Array) -> Array:
        shapes = [TensorType(rows.shape, "f32"), TensorType(weight.shape, dtype, constant=True)]
        call = Call("llmc.HeadProduct", tuple(shapes), (TensorType((len(rows), 3 * n), "f32"),))
        stored = weight.astype(ml_dtypes.bfloat16) if dtype == "bf16" else weight
        return run(call, rows, stored, target=host, n_tasks=2)[0]

    together = product(x)
    np.testing.assert_allclose(together, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    np.testing.assert_array_equal(product(x[4:5]), together[4:5])
