"""Products of prompts that turn queries and keys and append to the cache, on the emulator: to the bit what two launches
make of it, and what the ONNX definition says."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from llmc import schedules
from llmc.compiler.kernel import (
    PAGE_TOKENS,
    QUERY_ROWS,
    Call,
    DType,
    Implementation,
    Operand,
    TensorType,
    numpy_dtype,
)
from llmc.compiler.target import Target
from llmc.runtime.errors import LlmcError
from llmc.schedules.cuda.attention import rule as attention
from llmc.schedules.cuda.linear import gemm
from llmc.schedules.cuda.linear import rule as linear
from llmc.schedules.cuda.linear.call import parse
from llmc.schedules.cuda.linear.gemm_tiles import Tiling
from tests.emulator.emulate import EmulatedExecutable

Array = np.ndarray[Any, Any]
Define = Callable[..., list[Array]]
HOPPER, CPU = Target("cuda", "sm_90a"), Target("cpu", "x86-64-v4+bf16")
N_PAGES, PAGES = 12, 4
OURS = ("n_layers", "kv_dtype", "page_tokens")


@dataclass(frozen=True)
class Layer:
    """A product of m tokens, and the attention that it is for, of the second layer of two."""

    m: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    k: int = 72
    name: str = "Linear"
    dtype: DType = "bf16"

    @property
    def columns(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def rotary(self) -> bool:
        return self.rotary_dim > 0

    @property
    def settings(self) -> dict[str, Any]:
        turned = {"rotary_dim": self.rotary_dim, "interleaved": 0} if self.rotary else {}
        heads = {"num_heads": self.heads, "kv_num_heads": self.kv_heads, "head_dim": self.head_dim, **turned}
        return {**heads, "n_layers": 2, "kv_dtype": self.dtype, "page_tokens": PAGE_TOKENS}

    @property
    def cache(self) -> TensorType:
        return TensorType((N_PAGES, self.kv_heads, PAGE_TOKENS, self.head_dim), "f32")

    @property
    def queries(self) -> TensorType:
        tiles = -(-self.m // QUERY_ROWS) * QUERY_ROWS // PAGE_TOKENS
        return TensorType((tiles, self.heads, self.head_dim // 8, PAGE_TOKENS, 8), self.dtype)

    def product(self) -> Call:
        """To qkv in float32."""
        inputs = [TensorType((self.m, self.k), self.dtype, tiled=True)]
        inputs.append(TensorType((self.columns, self.k), self.dtype, constant=True))
        if "Bias" in self.name:
            inputs.append(TensorType((self.columns,), self.dtype, constant=True))
        return Call(f"llmc.{self.name}", tuple(inputs), (TensorType((self.m, self.columns), "f32"),))

    def step(self) -> tuple[TensorType, ...]:
        angles = (TensorType((self.m, self.rotary_dim // 2), "f32"),) * 2 if self.rotary else ()
        return (*angles, TensorType((self.m,), "i32"), TensorType((self.m, PAGES), "i32"), self.cache, self.cache)

    def appending(self) -> Call:
        product = self.product()
        op = f"{product.op}{'Rotary' * self.rotary}Append"
        results = (self.queries, self.cache, self.cache)
        return Call(op, (*product.inputs, *self.step()), results, tuple(sorted(self.settings.items())))

    def attending(self, appended: bool) -> Call:
        attributes = self.settings | {"scale": self.head_dim**-0.5, "softcap": 0.0, "window": 0}
        out = TensorType((self.m, self.heads * self.head_dim), self.dtype, tiled=True)
        if appended:
            kept = {name: value for name, value in attributes.items() if name not in ("rotary_dim", "interleaved")}
            inputs = (self.queries, *self.step()[-4:])
            return Call("llmc.AppendedAttention", inputs, (out,), tuple(sorted(kept.items())))
        op = "llmc.RotaryPagedAttention" if self.rotary else "llmc.PagedAttention"
        inputs = (TensorType((self.m, self.columns), "f32"), *self.step())
        return Call(op, inputs, (out, self.cache, self.cache), tuple(sorted(attributes.items())))

    def inputs(self) -> tuple[list[Array], list[Array]]:
        """Of the product; of the step, without the caches: two sequences in pages here and there, and rows that are
        none."""
        generator = np.random.default_rng(self.m)
        product = [
            (generator.standard_normal(kind.shape) * (self.k**-0.5 if kind.constant else 1)).astype(
                numpy_dtype(self.dtype)
            )
            for kind in self.product().inputs
            if kind
        ]
        first = min(self.m * 2 // 3, PAGES * PAGE_TOKENS - 5)
        at = np.concatenate([5 + np.arange(first), np.arange(self.m - first)]).astype(np.int32)
        at[[first - 1, -1]] = -1
        pages = generator.permutation(N_PAGES)[: 2 * PAGES].reshape(2, PAGES)
        table = pages[(np.arange(self.m) >= first).astype(int)].astype(np.int32)
        angles = np.outer(np.maximum(at, 0), 1e4 ** -np.linspace(0, 1, max(1, self.rotary_dim // 2), endpoint=False))
        tables = [np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)] if self.rotary else []
        return product, [*tables, at, table]

    def pool(self) -> Array:
        """The cache's memory, both layers of each page, poisoned."""
        elements = 2 * self.kv_heads * PAGE_TOKENS * self.head_dim
        return np.full((N_PAGES, 2, elements * 2), 0xFF, np.uint8)


LAYERS = {
    "one head a tile": Layer(130, 3, 1, 128, 128),
    "two heads a tile, the last tile half": Layer(200, 3, 2, 64, 64, name="LinearBias"),
    "part of each head": Layer(97, 2, 1, 128, 64),
    "few of each head, which are narrow": Layer(70, 5, 2, 32, 16, dtype="f16"),
    "nothing": Layer(129, 2, 2, 64, 0, name="LinearBias"),
}
TILINGS = {
    "whole": Tiling(112, 2, 3, False),
    "wide": Tiling(256, 2, 2, False),
    "shared out": Tiling(96, 2, 4, True, band=2),
    "in clusters": Tiling(128, 2, 4, False, cluster=2),
    "in turns": Tiling(104, 2, 2, False, turns=2, quick=True),
}


def run(call: Call, implementation: Implementation, inputs: list[Array], kv: Array | None = None) -> list[Array]:
    """kv: the layer's memory, of both layers'."""
    caches = [None] * (len(call.inputs) - len(inputs))
    memory = None if kv is None else kv.reshape(-1)[kv.shape[2] :]
    return EmulatedExecutable(call, implementation, HOPPER).run(*inputs, *caches, kv=memory)


def two_launches(layer: Layer, tiling: Tiling) -> tuple[Array, Array]:
    """Queries, and the cache, by a product in float32 and attention's own launch that turns and appends."""
    call = layer.product()
    op = parse(call)
    assert op is not None
    product, step = layer.inputs()
    (qkv,) = run(call, gemm.implement(call, op, tiling, HOPPER), product)
    return turned_and_appended(layer, qkv, step)


def turned_and_appended(layer: Layer, qkv: Array, step: list[Array]) -> tuple[Array, Array]:
    """Queries, and the cache, by attention's own launch."""
    attend = layer.attending(False)
    append, _ = attention.implement(attend, attention.Tile(2, 2), HOPPER).launches
    operands = tuple(Operand("output", 0) if operand.kind == "temp" else operand for operand in append.operands)
    pool = layer.pool()
    attend = replace(attend, outputs=(layer.queries, *attend.outputs[1:]))
    queries, *_ = run(attend, Implementation((replace(append, operands=operands),)), [qkv, *step], pool)
    return queries, pool


@functools.cache
def appended(layer: Layer, tiling: Tiling) -> tuple[Array, Array]:
    """The same by the product alone."""
    call = layer.appending()
    op = parse(call)
    assert op is not None
    product, step = layer.inputs()
    pool = layer.pool()
    queries, *_ = run(call, gemm.implement(call, op, tiling, HOPPER), [*product, *step], pool)
    return queries, pool


CASES = (
    ("one head a tile", "in clusters"),
    ("one head a tile", "in turns"),
    ("two heads a tile, the last tile half", "shared out"),
    ("part of each head", "wide"),
    ("few of each head, which are narrow", "whole"),
    ("nothing", "whole"),
)


@pytest.mark.parametrize(("layer", "tiling"), CASES)
def test_it_is_what_two_launches_make_to_the_bit(layer: str, tiling: str) -> None:
    """Poison that neither writes is the same too."""
    wanted, cache = two_launches(LAYERS[layer], TILINGS[tiling])
    queries, pool = appended(LAYERS[layer], TILINGS[tiling])
    assert (pool != 0xFF).any()
    np.testing.assert_array_equal(pool, cache)
    np.testing.assert_array_equal(queries.view(np.uint16), wanted.view(np.uint16))


def test_it_is_what_its_definition_says(define: Define) -> None:
    """Each result rounded once."""
    layer = LAYERS["two heads a tile, the last tile half"]
    queries, pool = appended(layer, TILINGS["shared out"])
    product, (*tables, at, table) = layer.inputs()
    call = layer.appending()
    attributes = (*((name, value) for name, value in call.attributes if name not in OURS), ("layer", 0))
    results = (TensorType((layer.m, layer.heads * layer.head_dim), "f32"), layer.cache, layer.cache)
    nothing = np.zeros(layer.cache.shape, np.float32)
    step = [*tables, at.astype(np.int64), table.astype(np.int64), nothing, nothing]
    wanted, *caches = define(replace(call, outputs=results, attributes=attributes), *product, *step)
    rows = at >= 0
    tiles = queries.astype(np.float32).transpose(0, 3, 1, 2, 4).reshape(-1, wanted.shape[1])
    np.testing.assert_allclose(tiles[: layer.m][rows], wanted[rows], rtol=2**-8, atol=1e-5)
    assert np.isnan(tiles[layer.m :]).all()
    pages = np.ascontiguousarray(pool[:, 1]).view(numpy_dtype(layer.dtype)).astype(np.float32)
    found = pages.reshape(N_PAGES, layer.kv_heads, 2, layer.head_dim // 8, PAGE_TOKENS, 8)
    found = found.transpose(2, 0, 1, 4, 3, 5).reshape(2, *layer.cache.shape)
    np.testing.assert_allclose(np.nan_to_num(found), caches, rtol=2**-8, atol=1e-5)


def test_attention_behind_it_gives_what_it_did() -> None:
    layer, tiling = LAYERS["part of each head"], TILINGS["wide"]
    queries, pool = appended(layer, tiling)
    _, step = layer.inputs()
    call = layer.attending(True)
    params = attention.match(call, HOPPER)
    assert isinstance(params, attention.Tile)
    implementation = attention.implement(call, params, HOPPER)
    assert (len(implementation.launches), implementation.temps) == (1, ())
    (out,) = run(call, implementation, [queries, *step[-2:]], pool.copy())
    plain = layer.product()
    op = parse(plain)
    assert op is not None
    (qkv,) = run(plain, gemm.implement(plain, op, tiling, HOPPER), layer.inputs()[0])
    call = layer.attending(False)
    wanted, *_ = run(call, attention.implement(call, params, HOPPER), [qkv, *step], layer.pool())
    np.testing.assert_array_equal(out, wanted)


def test_it_is_offered_where_it_can_be_done() -> None:
    """Not by `mma.sync`, not to few tokens, and by no tiling that parts what turns each other."""
    call = LAYERS["one head a tile"].appending()
    assert isinstance(linear.match(call, HOPPER), Tiling)
    assert linear.match(call, Target("cuda", "sm_80")) is None
    assert attention.match(call, HOPPER) is None
    for target, refused in ((Target("cuda", "sm_80"), call), (CPU, call)):
        with pytest.raises(LlmcError, match=f"takes {refused.op}"):
            schedules.implement(refused, target)
    assert linear.match(Layer(64, 3, 1, 128, 128).appending(), HOPPER) is None
    in_float32 = Layer(130, 3, 1, 128, 128, dtype="f32").appending()
    rows = TensorType((130, 72), "f32")
    assert linear.match(replace(in_float32, inputs=(rows, *in_float32.inputs[1:])), HOPPER) is None
    for rotary_dim, turns in ((128, {0, 2}), (64, {0, 1, 2}), (0, {0, 1, 2})):
        space = list(linear.space(Layer(2048, 32, 32, 128, rotary_dim, k=4096).appending(), HOPPER))
        assert {tiling.turns for tiling in space if isinstance(tiling, Tiling)} == turns
    plain = Layer(2048, 32, 32, 128, 128, k=4096)
    assert linear.match(plain.appending(), HOPPER) == linear.match(plain.product(), HOPPER)
    groups = [params.groups for params in attention.space(Layer(200, 4, 2, 64, 64).attending(True), HOPPER)]  # type: ignore[union-attr]
    assert max(groups) == 2
