"""Paged attention on the emulator, against its ONNX definition; and what it does with caches that hold anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import pytest

from llmc.compiler.kernel import PAGE_TOKENS, Call, DType, TensorType, numpy_dtype
from llmc.compiler.target import Target
from llmc.runtime.errors import LlmcError
from llmc.schedules.cuda.attention import rule as attention
from tests.emulator.emulate import EmulatedExecutable
from tests.schedules.cuda.kv_pages import in_page_order, to_codes

Array = np.ndarray[Any, Any]
Define = Callable[..., list[Array]]
Row = tuple[int, int] | None
"""(sequence, position) of a row of a step, or None for a row that pads it."""

N_PAGES, PAGES = 24, 10
TARGET = Target("cuda", "sm_90a")
TOLERANCE = {"bf16": 4e-3, "f16": 6e-4, "f32": 2e-6}
"""Of the largest result: inputs are exact in what is multiplied, the weights of the values are rounded to it."""


@dataclass(frozen=True)
class Model:
    """An attention layer, the second of two."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    rotary_dim: int = 64
    interleaved: int = 0
    softcap: float = 0.0
    window: int = 0
    kv_dtype: str = "bf16"
    tiled: bool = True
    out: DType | None = None  # of a tiled result; by default its cache's, bf16 beside int8
    rounded: bool = False  # qkv lies in tiles
    epsilon: float | None = None  # of the norm of queries and keys
    has_sinks: bool = False
    has_slopes: bool = False
    both_ways: bool = False  # over all of a text
    has_biases: bool = False  # by distance, looked up

    @property
    def columns(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def factor(self) -> str:
        """What is multiplied."""
        return "f16" if self.kv_dtype == "int8" else self.kv_dtype

    @property
    def result(self) -> DType:
        own = "bf16" if self.kv_dtype == "int8" else cast(DType, self.kv_dtype)
        return (self.out or own) if self.tiled else "f32"

    def call(self, m: int) -> Call:
        def f32(*shape: int) -> TensorType:
            return TensorType(shape, "f32")

        attributes: dict[str, Any] = {
            "num_heads": self.heads,
            "kv_num_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "scale": self.head_dim**-0.5,
            "softcap": self.softcap,
            "window": self.window,
            "n_layers": 2,
            "kv_dtype": self.kv_dtype,
            "page_tokens": PAGE_TOKENS,
        }
        ids = (TensorType((m,), "i32"), TensorType((m, PAGES), "i32"))
        cache = f32(N_PAGES, self.kv_heads, PAGE_TOKENS, self.head_dim)
        qkv = TensorType((m, self.columns), cast(DType, self.factor if self.rounded else "f32"), tiled=self.rounded)
        out = TensorType((m, self.heads * self.head_dim), self.result, tiled=self.tiled)
        norm, norms, turned, turns = "", [], "", []
        if self.epsilon is not None:
            attributes["epsilon"] = self.epsilon
            norm, norms = "RMSNorm", [TensorType((self.head_dim,), "f32", constant=True)] * 2
        if self.rotary_dim:
            attributes |= {"rotary_dim": self.rotary_dim, "interleaved": self.interleaved}
            turned, turns = "Rotary", [f32(m, self.rotary_dim // 2)] * 2
        of_heads = [TensorType((self.heads,), "f32", constant=True)] * (self.has_sinks + self.has_slopes)
        of_heads += [TensorType((self.heads, 2 * PAGE_TOKENS * PAGES), "f32", constant=True)] * self.has_biases
        inputs = (qkv, *norms, *turns, *of_heads, *ids, cache, cache)
        of_heads_too = f"{'Sink' * self.has_sinks}{'Alibi' * self.has_slopes}"
        of_heads_too += f"{'Distance' * self.has_biases}{'Bidirectional' * self.both_ways}"
        op = f"llmc.{norm}{turned}{of_heads_too}PagedAttention"
        return Call(op, inputs, (out, cache, cache), tuple(sorted(attributes.items())))

    def definition(self, m: int) -> Call:
        """The same, of float32."""
        call = replace(self, rounded=False).call(m)
        result = replace(call.outputs[0], dtype="f32", tiled=False)
        ours = ("n_layers", "kv_dtype", "page_tokens")
        attributes = (*((name, value) for name, value in call.attributes if name not in ours), ("layer", 0))
        return replace(call, outputs=(result, *call.outputs[1:]), attributes=attributes)


@dataclass
class Machine:
    """A layer with its part of a cache, in which sequences have random keys and values at all positions; the rest, and
    what is after a sequence's last position, is poisoned."""

    model: Model
    lengths: Sequence[int]
    caches: list[Array] = field(init=False)
    tables: list[Array] = field(init=False)

    def __post_init__(self) -> None:
        generator = np.random.default_rng(sum(self.lengths))
        shape = (N_PAGES, self.model.kv_heads, PAGE_TOKENS, self.model.head_dim)
        self.caches = [self.kept(self.drawn(generator, shape)) for _ in range(2)]
        numbers = [int(page) for page in generator.permutation(N_PAGES)]
        self.tables = []
        for length in self.lengths:
            own = [numbers.pop() for _ in range(-(-length // PAGE_TOKENS))]
            self.tables.append(np.array(own + [-1] * (PAGES - len(own)), np.int32))
        self.generator = generator

    def exact(self, x: Array) -> Array:
        """Numbers that what is multiplied holds."""
        return np.asarray(x.astype(np.float32).astype(numpy_dtype(self.model.factor)).astype(np.float32))

    def drawn(self, generator: np.random.Generator, shape: tuple[int, ...]) -> Array:
        """Keys or values [..., D]: for codes, the largest of a vector is 127 times a power of 2."""
        x = generator.standard_normal(shape)
        if self.model.kv_dtype != "int8":
            return self.exact(x)
        peak = 127 * 2.0 ** generator.integers(-7, -4, (*shape[:-1], 1))
        largest = np.abs(x) == np.abs(x).max(-1, keepdims=True)
        return np.asarray(np.where(largest, np.sign(x) * peak, x / np.abs(x).max(-1, keepdims=True) * peak), np.float32)

    def kept(self, x: Array) -> Array:
        """Keys or values [..., D] as the cache holds them."""
        if self.model.kv_dtype != "int8":
            return x
        codes, scales = to_codes(x)
        return np.asarray(codes * scales[..., None], np.float32)

    def as_kept(self, qkv: Array) -> Array:
        """A step's qkv, its keys and values as the cache will hold them.  (Quarter turns do not change a code.)"""
        x = qkv.reshape(len(qkv), -1, self.model.head_dim).copy()
        x[:, self.model.heads :] = self.kept(x[:, self.model.heads :])
        return x.reshape(qkv.shape)

    def inputs(self, rows: Sequence[Row]) -> list[Array]:
        """The step's inputs, without the caches.  Angles are quarter turns, so that turned numbers are exact too."""
        model, m = self.model, len(rows)
        at = np.array([row[1] if row else -1 for row in rows], np.int32)
        table = np.stack([self.tables[row[0]] if row else np.full(PAGES, -1, np.int32) for row in rows])
        keys = self.drawn(self.generator, (m, 2 * model.kv_heads, model.head_dim)).reshape(m, -1)
        qkv = np.concatenate([self.exact(self.generator.standard_normal((m, model.heads * model.head_dim))), keys], 1)
        quarters = self.generator.integers(0, 4, (m, model.rotary_dim // 2))
        turn = [np.array(column, np.float32)[quarters] for column in ([1, 0, -1, 0], [0, 1, 0, -1])]
        for numbers in (qkv, *turn):
            numbers[at < 0] = np.nan
        of_heads = [np.linspace(-3, 9, model.heads, dtype=np.float32)] * model.has_sinks
        of_heads += [np.linspace(0.01, 0.3, model.heads, dtype=np.float32)] * model.has_slopes
        biases = np.random.default_rng(5).normal(0, 2, (model.heads, 2 * PAGE_TOKENS * PAGES))
        of_heads += [biases.astype(np.float32)] * model.has_biases
        return [qkv, *(turn if model.rotary_dim else []), *of_heads, at, table]

    def pool(self, rows: Sequence[Row]) -> Array:
        """The layer's memory before the step: both layers of all pages, poisoned where nothing was written yet."""
        known = np.zeros((N_PAGES, PAGE_TOKENS), bool)
        for length, table in zip(self.lengths, self.tables, strict=True):
            for position in range(length):
                known[table[position // PAGE_TOKENS], position % PAGE_TOKENS] = True
        for sequence, position in filter(None, rows):
            known[self.tables[sequence][position // PAGE_TOKENS], position % PAGE_TOKENS] = False
        kept = [np.where(known[:, None, :, None], cache, np.nan) for cache in self.caches]
        layer = in_page_order(np.stack(kept, axis=2), self.model.kv_dtype)
        return np.concatenate([np.full_like(layer, 0xFF), layer], axis=1)  # the other layer's part, then this one's

    def check(self, rows: Sequence[Row], define: Define, run: EmulatedExecutable) -> None:
        inputs = self.inputs(rows)
        m = len(rows)
        clean = [self.as_kept(np.nan_to_num(inputs[0])), *(np.nan_to_num(x) for x in inputs[1:-2])]
        expected, *expected_caches = define(self.model.definition(m), *clean, inputs[-2].astype(np.int64),
                                            inputs[-1].astype(np.int64), *self.caches)  # fmt: skip
        pool = self.pool(rows)
        before, layer_bytes = pool.copy(), pool.shape[1] // 2
        flat = pool.reshape(-1)
        zeros = np.zeros_like(self.caches[0])
        out, *_ = run.run(*inputs, zeros, zeros, kv=flat[layer_bytes:])
        np.testing.assert_allclose(out, expected, rtol=0, atol=tolerance(self.model) * np.abs(expected).max())
        after = in_page_order(np.stack(expected_caches, axis=2), self.model.kv_dtype)
        np.testing.assert_array_equal(pool[:, :layer_bytes], before[:, :layer_bytes])
        untouched = before[:, layer_bytes:] == pool[:, layer_bytes:]
        np.testing.assert_array_equal(np.where(untouched, after, pool[:, layer_bytes:]), after)
        poison = self.pool([])[:, layer_bytes:] != before[:, layer_bytes:]  # what the step was to write
        np.testing.assert_array_equal(pool[:, layer_bytes:][poison], after[poison])


def tolerance(model: Model) -> float:
    """What products, or a narrower result, are rounded to."""
    return max(TOLERANCE[model.factor], TOLERANCE[model.result])


@pytest.fixture(scope="module")
def kernels() -> Callable[..., EmulatedExecutable]:
    """kernels(model, m): the attention of m rows, compiled once."""
    made: dict[Any, EmulatedExecutable] = {}

    def executable(model: Model, m: int, params: Any = None) -> EmulatedExecutable:
        if (model, m, params) not in made:
            call = model.call(m)
            chosen = params or finest(attention.match(call, TARGET))
            assert chosen is not None
            made[model, m, params] = EmulatedExecutable(call, attention.implement(call, chosen, TARGET), TARGET)
        return made[model, m, params]

    return executable


def finest(params: Any) -> Any:
    """The parameters, but contexts of a few pages are split already."""
    return replace(params, splits=5, least=1) if isinstance(params, attention.Stream) else params


Kernels = Callable[..., EmulatedExecutable]


EDGES = (1, 63, 64, 65, 127, 128, 513)
INT8 = Model(kv_dtype="int8")


@pytest.mark.parametrize(
    ("model", "length"), [*((Model(), n) for n in EDGES), *((INT8, n) for n in (1, 64, 65, 513))], ids=str
)
def test_one_row_at_the_edges_of_pages_and_splits(model: Model, length: int, define: Define, kernels: Kernels) -> None:
    Machine(model, (length,)).check([(0, length - 1)], define, kernels(model, 1))


MODELS = [
    Model(heads=3, kv_heads=3, head_dim=80, rotary_dim=40, interleaved=1),
    Model(heads=8, kv_heads=1, head_dim=16, rotary_dim=16, softcap=20.0, window=-50, kv_dtype="f16", has_sinks=True),
    Model(heads=2, kv_heads=2, head_dim=128, rotary_dim=128, window=100, has_sinks=True),
    Model(heads=7, kv_heads=1, head_dim=32, rotary_dim=0, window=30, tiled=False, has_slopes=True),
    Model(heads=2, kv_heads=1, head_dim=256, rotary_dim=64, window=-100, has_sinks=True),
    Model(heads=20, kv_heads=1, head_dim=32, rotary_dim=8, has_sinks=True),
    Model(heads=3, kv_heads=1, head_dim=48, rotary_dim=32, window=70, kv_dtype="f32", tiled=False, has_sinks=True),
    Model(heads=3, kv_heads=1, head_dim=48, rotary_dim=0, window=-50, kv_dtype="f32", out="bf16", has_slopes=True),
    Model(heads=2, kv_heads=1, head_dim=64, rotary_dim=32, kv_dtype="bf16", out="f16"),
    Model(heads=4, kv_heads=2, head_dim=64, rotary_dim=64, window=-50, kv_dtype="int8"),
    Model(heads=3, kv_heads=3, head_dim=80, rotary_dim=40, interleaved=1, kv_dtype="int8", out="f16"),
    Model(heads=6, kv_heads=2, head_dim=96, rotary_dim=32, softcap=20.0, kv_dtype="int8", tiled=False, has_sinks=True),
    Model(heads=2, kv_heads=2, head_dim=128, rotary_dim=128, window=100, kv_dtype="int8"),
    Model(heads=2, kv_heads=1, head_dim=256, rotary_dim=64, kv_dtype="int8", out="f16"),
    Model(heads=20, kv_heads=1, head_dim=16, rotary_dim=0, window=30, kv_dtype="int8", has_slopes=True),
]
STEP: list[Row] = [(0, 64), (1, 129), None, (2, 0), (2, 1), (2, 2), (3, 200), (1, 130)]
LENGTHS = (65, 131, 3, 201)


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_small_steps_of_several_sequences(model: Model, define: Define, kernels: Kernels) -> None:
    Machine(model, LENGTHS).check(STEP, define, kernels(model, 8))


@pytest.mark.parametrize(
    "model", [*MODELS, *(replace(m, rounded=True) for m in MODELS if m.kv_dtype in ("bf16", "f16"))], ids=str
)
def test_large_steps_of_several_sequences(model: Model, define: Define, kernels: Kernels) -> None:
    rows: list[Row] = [*((0, i) for i in range(30, 65)), None, *((1, i) for i in range(100, 131)), (2, 2), (3, 200)]
    Machine(model, LENGTHS).check([*rows, None], define, kernels(model, 70))


@pytest.mark.parametrize(
    ("model", "params"),
    [
        (Model(rotary_dim=0, has_slopes=True), attention.Tile(2)),
        (Model(), attention.Tile(3, 1)),
        (Model(), attention.Tile(2, 2)),
        (Model(), attention.Tile(2, 2, in_turn=False, blocks=3)),
        (Model(), attention.Tile(3, 2, pad=0, blocks=3)),
        (Model(), attention.Tile(2, 3, pad=2, blocks=1)),
        (INT8, attention.Tile(1)),
        (INT8, attention.Tile(3, 1)),
        (INT8, attention.Tile(2, 2, blocks=5)),
    ],
    ids=str,
)
def test_a_large_step_goes_on_from_tile_to_tile(
    model: Model, params: attention.Tile, define: Define, kernels: Kernels
) -> None:
    machine = Machine(model, (270, 30))
    rows: list[Row] = [*((0, i) for i in range(270)), *((1, i) for i in range(9))]
    for start in (0, 139):
        machine.check(rows[start : start + 140], define, kernels(model, 140, params))


@pytest.mark.parametrize(("model", "m"), [*((Model(), m) for m in (2, 3, 16, 40)), (INT8, 3), (INT8, 40)], ids=str)
def test_a_step_of_one_sequence_takes_its_own_keys_from_qkv(
    model: Model, m: int, define: Define, kernels: Kernels
) -> None:
    for end in (m, 64 + m // 2, 200):
        Machine(model, (end,)).check([(0, i) for i in range(end - m, end)], define, kernels(model, m))


@pytest.mark.parametrize("model", [Model(), INT8], ids=str)
def test_a_step_may_take_up_any_positions_of_a_sequence_again(model: Model, define: Define, kernels: Kernels) -> None:
    rows: list[Row] = [(0, 63), (0, 7), (0, 64), (1, 5), None, (0, 199), (1, 4), (0, 128)]
    Machine(model, (200, 6)).check(rows, define, kernels(model, 8))


@pytest.mark.parametrize(
    ("splits", "least", "team"), [(1, 1, 4), (3, 1, 4), (3, 2, 4), (1, 1, 2), (3, 1, 2), (2, 1, 1)]
)
def test_any_number_of_splits_and_warps_gives_the_same(
    splits: int, least: int, team: int, define: Define, kernels: Kernels
) -> None:
    params = attention.Stream(splits, 3, least, team=team)
    Machine(Model(), LENGTHS).check(STEP, define, kernels(Model(), 8, params))


@pytest.mark.parametrize("model", [model for model in MODELS if model.kv_dtype != "f32"], ids=str)
def test_a_unit_of_one_warp_or_two(model: Model, define: Define, kernels: Kernels) -> None:
    for team, slots in ((1, 4), (2, 5)):
        params = attention.Stream(1, slots, team=team)
        Machine(model, LENGTHS).check(STEP, define, kernels(model, 8, params))


@pytest.mark.parametrize("model", [m for m in MODELS if m.kv_dtype in ("bf16", "f16") and m.head_dim <= 128], ids=str)
def test_a_warp_that_takes_32_tokens_at_a_time_misses_none(model: Model, define: Define, kernels: Kernels) -> None:
    params = attention.Stream(1, 5, 1, together=2, ahead=1)
    Machine(model, LENGTHS).check(STEP, define, kernels(model, 8, params))


@pytest.mark.parametrize(("slots", "team"), [(2, 4), (3, 4), (3, 1)])
def test_any_room_will_do_for_32_tokens_at_a_time(slots: int, team: int, define: Define, kernels: Kernels) -> None:
    params = attention.Stream(3, slots, 1, team=team, together=2, ahead=2)
    for at in (0, 15, 16, 47, 200, 383, 500):  # chunks of a split: none, one, odd and even numbers of a warp's
        Machine(Model(), (at + 1,)).check([(0, at)], define, kernels(Model(), 1, params))


def beside(model: Model, m: int) -> list[attention.Stream]:
    """The candidates that ask for something ahead, as those do that begin beside the product in front."""
    offered = list(attention.space(model.call(m), TARGET))
    return [params for params in offered if isinstance(params, attention.Stream) and params.ahead]


@pytest.mark.parametrize(("model", "length"), [*((Model(), n) for n in EDGES), (INT8, 513)], ids=str)
def test_one_row_is_attended_beside_the_product_in_front(
    model: Model, length: int, define: Define, kernels: Kernels
) -> None:
    for params in map(finest, beside(model, 1)):
        Machine(model, (length,)).check([(0, length - 1)], define, kernels(model, 1, params))


def test_blocks_of_few_registers_have_their_queries_in_shared_memory(define: Define, kernels: Kernels) -> None:
    params = attention.Stream(1, 4, resident=4)
    Machine(Model(), LENGTHS).check(STEP, define, kernels(Model(), 8, params))


@pytest.mark.parametrize("model", [Model(), INT8], ids=str)
def test_one_warp_meets_more_new_rows_than_a_group(model: Model, define: Define, kernels: Kernels) -> None:
    params = attention.Stream(2, 4, 1, team=1)
    Machine(model, (200, 6)).check([(0, i) for i in range(160, 200)], define, kernels(model, 40, params))


def test_rounded_keys_are_for_large_steps_and_caches_of_the_same_numbers() -> None:
    assert attention.match(Model(rounded=True).call(65), TARGET) is not None
    assert attention.match(Model(rounded=True).call(64), TARGET) is None
    assert attention.match(replace(INT8, rounded=True).call(65), TARGET) is None


def test_what_these_kernels_cannot_do_is_said() -> None:
    with pytest.raises(LlmcError, match="heads of 16, 32 … 512 elements, not 24"):
        attention.match(Model(head_dim=24, rotary_dim=0).call(1), TARGET)
    call = Model().call(1)
    int4 = tuple((name, "int4" if name == "kv_dtype" else value) for name, value in call.attributes)
    with pytest.raises(LlmcError, match="a KV cache of int4"):
        attention.match(replace(call, attributes=int4), TARGET)
