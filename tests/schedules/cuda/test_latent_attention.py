"""Latent attention and products of heads on the emulator, against their ONNX definitions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pytest

from llmc.bench.gpu import reference
from llmc.bench.gpu.inputs import make
from llmc.bench.gpu.latent_jobs import latent_call
from llmc.bench.gpu.memory import page_part
from llmc.compiler.kernel import PAGE_TOKENS, Call, DType, TensorType, numpy_dtype
from llmc.compiler.target import Target
from llmc.runtime.errors import LlmcError
from llmc.schedules.cuda.attention import latent_rule as latent_attention
from llmc.schedules.cuda.attention.latent_rule import Tile
from llmc.schedules.cuda.linear import heads_rule as head_product
from tests.emulator.emulate import EmulatedExecutable

Array = np.ndarray[Any, Any]
Define = Callable[..., list[Array]]
Row = tuple[int, int] | None
"""(sequence, position) of a row of a step, or None for a row that pads it."""

N_PAGES, PAGES = 16, 6
HOPPER = Target("cuda", "sm_90a")
TOLERANCE = {"bf16": 8e-3, "f16": 1e-3}
"""Of the largest result: the step's own latents are rounded, and the weights of all."""


@dataclass(frozen=True)
class Model:
    """Latent attention, the second layer of two."""

    heads: int = 3
    latent_dim: int = 48
    rotary_dim: int = 16
    straight: int = 12
    interleaved: int = 1
    softcap: float = 0.0
    window: int = 0
    kv_dtype: str = "bf16"
    tiled: bool = True

    @property
    def sizes(self) -> dict[str, Any]:
        return {
            "num_heads": self.heads,
            "head_dim": self.straight + self.rotary_dim,
            "latent_dim": self.latent_dim,
            "rotary_dim": self.rotary_dim,
            "interleaved": self.interleaved,
            "epsilon": 1e-5,
            "scale": 0.2,
            "softcap": self.softcap,
            "window": self.window,
        }

    def call(self, m: int, *, defined: bool = False) -> Call:
        """The call; or its definition's, of float32."""

        def f32(*shape: int) -> TensorType:
            return TensorType(shape, "f32")

        latent, turned = self.latent_dim, self.rotary_dim
        rows = [f32(m, self.heads * (self.straight + turned)), f32(m, self.heads * latent), f32(m, latent + turned)]
        rows += [TensorType((latent,), "f32", constant=True), f32(m, turned // 2), f32(m, turned // 2)]
        ids = [TensorType((m,), "i32"), TensorType((m, PAGES), "i32")]
        caches = (f32(N_PAGES, 1, PAGE_TOKENS, turned), f32(N_PAGES, 1, PAGE_TOKENS, latent))
        tiled = self.tiled and not defined
        out = TensorType((m, self.heads * latent), cast(DType, self.kv_dtype) if tiled else "f32", tiled=tiled)
        own = {"layer": 0} if defined else {"n_layers": 2, "kv_dtype": self.kv_dtype, "page_tokens": PAGE_TOKENS}
        attributes = tuple(sorted((self.sizes | own).items()))
        return Call("llmc.LatentPagedAttention", (*rows, *ids, *caches), (out, *caches), attributes)


def check(model: Model, lengths: Sequence[int], rows: Sequence[Row], define: Define, tile: Tile | None = None) -> None:
    """A step of these rows over sequences that have been written up to their lengths, but for the step's own rows."""
    random = np.random.default_rng(1)
    dtype, m, latent = numpy_dtype(model.kv_dtype), len(rows), model.latent_dim
    keys = random.normal(size=(N_PAGES, PAGE_TOKENS, latent + model.rotary_dim)).astype(dtype)
    numbers = [int(page) for page in random.permutation(N_PAGES)]
    tables = np.full((len(lengths) + 1, PAGES), -1, np.int32)  # the last: of rows that pad the step
    known = np.zeros((N_PAGES, PAGE_TOKENS), bool)
    for sequence, length in enumerate(lengths):
        for page in range(-(-length // PAGE_TOKENS)):
            tables[sequence, page] = numbers.pop()
            known[tables[sequence, page], : length - page * PAGE_TOKENS] = True
    of_step = [(tables[row[0], row[1] // PAGE_TOKENS], row[1] % PAGE_TOKENS) for row in rows if row]
    for place in of_step:
        known[place] = False

    call = model.call(m)
    at = np.array([row[1] if row else -1 for row in rows], np.int32)
    table = np.stack([tables[row[0] if row else -1] for row in rows])
    floats = [random.normal(size=kind.shape).astype(dtype).astype(np.float32) for kind in call.inputs[:4] if kind]
    quarters = random.integers(0, 4, (m, model.rotary_dim // 2))  # of a turn: what was exact stays so
    floats += [np.array(column, np.float32)[quarters] for column in ([1, 0, -1, 0], [0, 1, 0, -1])]
    pages = np.where(known[..., None], keys, np.float32(np.nan)).astype(dtype)
    chunks = pages.reshape(N_PAGES, PAGE_TOKENS, -1, 8).swapaxes(1, 2).reshape(N_PAGES, -1).view(np.uint8)
    pool = np.concatenate([np.full_like(chunks, 0xFF), chunks], axis=1)  # the other layer's part, then this one's
    turned, latents = keys[:, None, :, latent:].astype(np.float32), keys[:, None, :, :latent].astype(np.float32)
    expected, *caches = define(model.call(m, defined=True), *floats, at.astype(np.int64), table.astype(np.int64),
                               turned, latents)  # fmt: skip

    chosen = tile or latent_attention.match(call, HOPPER)
    assert chosen is not None
    run = EmulatedExecutable(call, latent_attention.implement(call, chosen, HOPPER), HOPPER).run
    poisoned = [np.where(at[:, None] < 0, np.nan, x) if len(x) == m and x.ndim > 1 else x for x in floats]
    out = run(*poisoned, at, table, turned, latents, kv=pool.reshape(-1)[chunks.shape[1] :])[0]
    tolerance = TOLERANCE[model.kv_dtype]
    np.testing.assert_allclose(out, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    assert not out[at < 0].any()

    after = pool[:, chunks.shape[1] :].copy().view(dtype).reshape(N_PAGES, -1, PAGE_TOKENS, 8).swapaxes(1, 2)
    kept = after.reshape(pages.shape).astype(np.float32)
    for page, token in of_step:
        wanted = np.concatenate([caches[1][page, 0, token], caches[0][page, 0, token]])
        np.testing.assert_allclose(kept[page, token], wanted, rtol=tolerance, atol=1e-3)
        kept[page, token] = pages[page, token].astype(np.float32)
    np.testing.assert_array_equal(kept, pages.astype(np.float32))
    assert (pool[:, : chunks.shape[1]] == 0xFF).all()


LENGTHS = (65, 131, 3, 201)
SMALL: list[Row] = [(0, 64), (1, 129), None, (2, 0), (2, 1), (2, 2), (3, 200), (1, 130)]
LARGE: list[Row] = [*((0, i) for i in range(30, 65)), None, *((1, i) for i in range(100, 131)), (2, 2), (3, 200), None]
OTHER = Model(20, 16, 32, 12, interleaved=0, softcap=9.0, window=-50, kv_dtype="f16", tiled=False)


@pytest.mark.parametrize(("model", "rows"), [(Model(), 16), (OTHER, 32)], ids=str)
def test_small_steps_of_several_sequences(model: Model, rows: int, define: Define) -> None:
    chosen = latent_attention.match(model.call(len(SMALL)), HOPPER)
    assert chosen == Tile(rows, tokens=1, stages=2, splits=3)
    check(model, LENGTHS, SMALL, define, replace(chosen, least=1))


def test_a_kit_for_gpus_knows_what_is_right() -> None:
    """By the first of the kernels above: that the inputs of a kit, its pages and PyTorch's result belong together."""
    call = latent_call(len(SMALL), (3, 28, 48, 16), "bf16", PAGES, 2, epsilon=1e-5, scale=0.2)
    assert call.attributes == Model().call(len(SMALL)).attributes
    inputs = make(call, 200)
    assert inputs.keys is not None
    parts = np.stack([page_part(inputs, page, "bf16") for page in range(len(inputs.keys))])
    pool = np.concatenate([parts, np.full_like(parts, 0xFF)], axis=1)
    tile = Tile(16, tokens=1, stages=2, splits=3, least=1)
    run = EmulatedExecutable(call, latent_attention.implement(call, tile, HOPPER), HOPPER).run
    out = run(*(inputs.array(at) for at in range(8)), None, None, kv=pool)[0]
    expected = reference.expected(call, inputs)
    np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE["bf16"] * np.abs(expected).max())


def test_a_large_step_of_several_sequences(define: Define) -> None:
    assert latent_attention.match(OTHER.call(len(LARGE)), HOPPER) == Tile(64, tokens=3, stages=2)
    check(OTHER, LENGTHS, LARGE, define)


def test_tiles_are_as_high_as_shared_memory_has_room_for() -> None:
    call = Model(128, 512, 64, 128).call(1)
    chosen = {level: latent_attention.match(call, Target("cuda", level)) for level in ("sm_90a", "sm_80", "sm_89")}
    heights = {level: (tile.rows, tile.stages) for level, tile in chosen.items() if tile}
    assert heights == {"sm_90a": (64, 2), "sm_80": (64, 1), "sm_89": (16, 1)}
    page_bytes = latent_attention.implement(call, Tile(16, 1, 1), HOPPER).kv_layer_bytes
    assert page_bytes == 2 * PAGE_TOKENS * (512 + 64)


def test_what_these_kernels_cannot_do_is_said() -> None:
    with pytest.raises(LlmcError, match="in bf16 or f16, not int8"):
        latent_attention.match(Model(kv_dtype="int8").call(1), HOPPER)
    with pytest.raises(LlmcError, match="512 elements, not 40"):
        latent_attention.match(Model(latent_dim=40).call(1), HOPPER)
    with pytest.raises(LlmcError, match="find no room in the 99 KB"):
        latent_attention.match(Model(latent_dim=512, rotary_dim=256).call(1), Target("cuda", "sm_89"))
    rows, weight = TensorType((1, 6), "f32"), TensorType((2, 3, 3), "f32", constant=True)
    with pytest.raises(LlmcError, match="of matrices in bf16 or f16, not f32"):
        head_product.match(Call("llmc.HeadProduct", (rows, weight), (rows,)), HOPPER)


@pytest.mark.parametrize(
    ("m", "shape", "stride", "dtype", "tiled"),
    [(9, (2, 71, 21), 23, "f16", False), (70, (3, 136, 72), 72, "bf16", True)],
    ids=str,
)
def test_each_head_is_multiplied_by_its_own_matrix(
    m: int, shape: tuple[int, int, int], stride: int, dtype: DType, tiled: bool
) -> None:
    random = np.random.default_rng(0)
    heads, n, k = shape
    kind = TensorType((m, heads * stride), dtype if tiled else "f32", tiled=tiled)
    x, weight = (random.normal(size=size).astype(numpy_dtype(dtype)) for size in (kind.shape, shape))
    y = TensorType((m, heads * n), dtype if tiled else "f32", tiled=tiled)
    call = Call("llmc.HeadProduct", (kind, TensorType(shape, dtype, constant=True)), (y,))
    block = head_product.match(call, HOPPER)
    assert block is not None
    (found,) = EmulatedExecutable(call, head_product.implement(call, block, HOPPER), HOPPER).run(x, weight)
    heads_of_x = x.astype(np.float32).reshape(m, heads, stride)[..., :k]
    expected = np.einsum("mhk,hnk->mhn", heads_of_x, weight.astype(np.float32)).reshape(m, -1)
    tolerance = 2**-8 if tiled else 2e-6
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=2e-6 * np.abs(expected).max())
