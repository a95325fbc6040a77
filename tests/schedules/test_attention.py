"""Paged attention against a float64 reference and its definition, and the promise of the same bits in any step."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from llmc import schedules
from llmc.compiler.kernel import PAGE_TOKENS, Call, TensorType
from llmc.compiler.ops import APPENDED_ATTENTION, DOMAIN, OPERATORS, PAGED_ATTENTION, WHOLE_PAGED_ATTENTION
from llmc.compiler.target import Target
from llmc.runtime.errors import LlmcError
from llmc.schedules.attention_call import INPUTS, LATENT, LATENT_INPUTS
from llmc.schedules.cpu.attention import rule as attention
from llmc.schedules.cpu.attention.shape import SPLIT_PAGES
from llmc.schedules.execute import Executable

Array = np.ndarray[Any, Any]
Run = Callable[..., list[Array]]
Row = tuple[int, int] | None
"""(sequence, position) of a row of a step, or None for a row that pads it."""

N_PAGES, PAGES = 24, 19
KV_DTYPES = ("f32", "bf16", "int8")
TOLERANCE = {"f32": 4e-6, "bf16": 2e-3, "int8": 2e-3}
"""bf16: the weights of the values are rounded too.  int8: a key on the edge of two steps may fall either way."""
LENGTHS = (1, 2, 63, 64, 65, 127, 128, 129, 200, 500)


@dataclass(frozen=True)
class Model:
    """An attention layer, the second of two."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    rotary_dim: int = 64
    interleaved: int = 0
    softcap: float = 0.0
    window: int = 0  # negative: a chunk
    kv_dtype: str = "f32"
    epsilon: float | None = None  # of the norm of queries and keys
    has_sinks: bool = False
    has_slopes: bool = False  # biases by distance
    own_value_dim: int = 0  # as many elements as a key
    norms_values: bool = False
    other_bytes: int = 0  # of the layer in front, where that is of another size: test_attention_sizes.py

    @property
    def value_dim(self) -> int:
        return self.own_value_dim or self.head_dim

    @property
    def columns(self) -> int:
        return (self.heads + self.kv_heads) * self.head_dim + self.kv_heads * self.value_dim

    def call(self, m: int, n_pages: int = 1) -> Call:
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
        if self.other_bytes:
            own = replace(self, other_bytes=0).call(m)
            own_bytes = schedules.implement(own, Target("cpu", "x86-64-v3")).kv_layer_bytes
            attributes["page_bytes"] = self.other_bytes + own_bytes
        caches = [f32(n_pages, self.kv_heads, PAGE_TOKENS, size) for size in (self.head_dim, self.value_dim)]
        results = (f32(m, self.heads * self.value_dim), *caches)
        norm, norms, turned, turns = "", [], "", []
        if self.epsilon is not None:
            attributes["epsilon"] = self.epsilon
            norm, norms = (
                "RMSNorm" + "Values" * self.norms_values,
                [TensorType((self.head_dim,), "f32", constant=True)] * 2,
            )
        if self.rotary_dim:
            attributes |= {"rotary_dim": self.rotary_dim, "interleaved": self.interleaved}
            turned, turns = "Rotary", [f32(m, self.rotary_dim // 2)] * 2
        of_heads = [TensorType((self.heads,), "f32", constant=True)] * (self.has_sinks + self.has_slopes)
        inputs = (f32(m, self.columns), *norms, *turns, *of_heads, *ids, *caches)
        name = f"llmc.{norm}{turned}{'Sink' * self.has_sinks}{'Alibi' * self.has_slopes}PagedAttention"
        return Call(name, inputs, results, tuple(sorted(attributes.items())))

    @property
    def sinks(self) -> list[Array]:
        """A score for each head, from one that counts for nothing to one that leaves nothing to the keys."""
        return [np.linspace(-3, 9, self.heads, dtype=np.float32)] * self.has_sinks

    @property
    def slopes(self) -> list[Array]:
        """What each head's scores grow by from key to key, as ALiBi has them."""
        return [np.float32(2) ** -np.arange(1, self.heads + 1, dtype=np.float32)] * self.has_slopes

    @property
    def norms(self) -> list[Array]:
        """The weights of the norms of queries and keys; none where there are none."""
        if self.epsilon is None:
            return []
        return list(np.random.default_rng(7).uniform(0.3, 1.7, (2, self.head_dim)).astype(np.float32))


@dataclass
class Tokens:
    """What a sequence's tokens bring to the layer: [length, …]."""

    qkv: Array
    cos: Array
    sin: Array
    pages: Array


@dataclass
class Machine:
    """A layer with its part of a cache of N_PAGES poisoned pages, and sequences whose pages are shuffled."""

    model: Model
    run: Run
    target: Target
    lengths: Sequence[int]
    pool: Array = field(init=False)
    layer: int = field(init=False)

    def __post_init__(self) -> None:
        self.layer = schedules.implement(self.model.call(1), self.target).kv_layer_bytes
        self.forget()
        generator = np.random.default_rng(sum(self.lengths))
        pages = list(generator.permutation(N_PAGES))
        self.sequences = []
        for length in self.lengths:
            angles = generator.uniform(0, 6, (length, self.model.rotary_dim // 2))
            numbers = generator.standard_normal((length, self.model.columns)) * 1.5
            own = [pages.pop() for _ in range(-(-length // PAGE_TOKENS))]
            qkv, cos, sin = (part.astype(np.float32) for part in (numbers, np.cos(angles), np.sin(angles)))
            table = np.array(own + [-1] * (PAGES - len(own)), np.int32)
            self.sequences.append(Tokens(qkv, cos, sin, table))

    def forget(self) -> None:
        page_bytes = self.first + self.layer
        raw = np.full(page_bytes * N_PAGES + 64, 0xFF, np.uint8)
        self.pool = raw[-raw.ctypes.data % 64 :][: page_bytes * N_PAGES]

    @property
    def first(self) -> int:
        """Bytes of a page in front of this layer's part."""
        return self.model.other_bytes or self.layer

    def inputs(self, rows: Sequence[Row]) -> list[Array]:
        """The step's inputs, without the caches; rows that pad it are poisoned."""
        chosen = [self.sequences[row[0]] if row else None for row in rows]
        at = [row[1] if row else -1 for row in rows]

        def column(name: str, width: int) -> Array:
            poison = np.full(width, np.nan, np.float32)
            return np.stack([getattr(s, name)[p] if s else poison for s, p in zip(chosen, at, strict=True)])

        turn = [column(name, self.model.rotary_dim // 2) for name in ("cos", "sin") if self.model.rotary_dim]
        no_pages = np.full(PAGES, -1, np.int32)
        table = np.stack([s.pages if s else no_pages for s in chosen])
        weights = [*self.model.norms, *turn, *self.model.sinks, *self.model.slopes]
        return [column("qkv", self.model.columns), *weights, np.array(at, np.int32), table]

    def step(self, rows: Sequence[Row], n_tasks: int = 1) -> Array:
        call = self.model.call(len(rows))
        caches = [np.zeros(kind.shape if kind else (), np.float32) for kind in call.inputs[-2:]]
        memory = self.pool[self.first :]
        out, *_ = self.run(call, *self.inputs(rows), *caches, target=self.target, n_tasks=n_tasks, kv=memory)
        return out

    def prefill(self, sequence: int, chunk: int, n_tasks: int = 1) -> Array:
        """The whole sequence in steps of `chunk` rows, the last one padded."""
        length = self.lengths[sequence]
        parts = []
        for start in range(0, length, chunk):
            rows: list[Row] = [(sequence, i) if i < length else None for i in range(start, start + chunk)]
            parts.append(self.step(rows, n_tasks))
        return np.concatenate(parts)[:length]

    def reference(self, sequence: int) -> Array:
        """softmax(scale q K^T) V in float64, of operands rounded as the cache is."""
        model, s = self.model, self.sequences[sequence]
        length = len(s.qkv)
        sizes = np.cumsum([model.heads * model.head_dim, model.kv_heads * model.head_dim])
        parts = np.split(s.qkv.astype(np.float64), sizes, axis=1)
        q, k, v = (x.reshape(length, n, -1) for x, n in zip(parts, (model.heads, *[model.kv_heads] * 2), strict=True))
        if model.epsilon is not None and model.norms_values:
            v = normalised(v, np.ones(model.value_dim), model.epsilon)
        if model.epsilon is not None:
            q, k = (normalised(x, w, model.epsilon) for x, w in zip((q, k), model.norms, strict=True))
        q, k = turned(model, s, q), turned(model, s, k)
        if model.kv_dtype == "bf16":
            q, k, v = (x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64) for x in (q, k, v))
        if model.kv_dtype == "int8":
            k, v = (in_steps(x, 127) for x in (k, v))
        k, v = (np.repeat(x, model.heads // model.kv_heads, axis=1) for x in (k, v))
        scores = np.einsum("thd,shd->hts", q, k) * model.head_dim**-0.5
        if model.softcap:
            scores = np.tanh(scores / model.softcap) * model.softcap
        ahead = np.arange(length)[None, :] - np.arange(length)[:, None]
        scores = scores + sum(slopes[:, None, None] * ahead for slopes in model.slopes)
        seen = (ahead <= 0) & (ahead > -model.window if model.window > 0 else True)
        if model.window < 0:
            chunk = np.arange(length) // -model.window
            seen &= chunk == chunk[:, None]
        largest = np.where(seen, scores, -np.inf).max(-1, keepdims=True)
        weights = np.exp(np.where(seen, scores, -np.inf) - largest)
        more = sum(np.exp(sinks.astype(np.float64)[:, None, None] - largest) for sinks in model.sinks)
        out = np.einsum("hts,shd->thd", weights / (weights.sum(-1, keepdims=True) + more), v)
        return np.asarray(out.reshape(length, -1))


def in_steps(x: Array, most: int) -> Array:
    """Each head's vector as multiples of its largest element / most."""
    step = np.abs(x).max(-1, keepdims=True) / most
    return np.asarray(np.rint(x / step) * step)


def normalised(x: Array, weight: Array, epsilon: float) -> Array:
    return np.asarray(x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weight)


def turned(model: Model, s: Tokens, x: Array) -> Array:
    half = model.rotary_dim // 2
    if not half:
        return x
    first, second = slice(0, half), slice(half, 2 * half)
    if model.interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    y, cos, sin = x.copy(), s.cos[:, None].astype(np.float64), s.sin[:, None].astype(np.float64)
    y[..., first] = x[..., first] * cos - x[..., second] * sin
    y[..., second] = x[..., second] * cos + x[..., first] * sin
    return y


MODELS = [
    Model(),
    Model(heads=3, kv_heads=3, head_dim=80, rotary_dim=40, interleaved=1),
    Model(heads=8, kv_heads=1, head_dim=16, rotary_dim=16, softcap=20.0, window=-50),
    Model(heads=4, kv_heads=2, head_dim=128, rotary_dim=0, window=100, has_slopes=True),
    Model(heads=7, kv_heads=1, head_dim=24, rotary_dim=0, window=30, has_sinks=True),
    Model(heads=2, kv_heads=1, head_dim=256, rotary_dim=64),
    Model(heads=5, kv_heads=1, head_dim=10, rotary_dim=6, has_sinks=True),
]


@pytest.mark.parametrize(
    ("kv_dtype", "model"),
    [("f32", model) for model in MODELS]
    + [("bf16", model) for model in (MODELS[1], MODELS[3], MODELS[5], MODELS[6])]
    + [("int8", model) for model in (MODELS[1], MODELS[2], MODELS[6])],
    ids=str,
)
def test_decode_and_prefill_agree_with_float64_and_with_each_other(
    run: Run, host: Target, model: Model, kv_dtype: str
) -> None:
    check_one_sequence(Machine(replace(model, kv_dtype=kv_dtype), run, host, (131,)))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_decode_and_prefill_are_right_on_every_level(run: Run, target: Target, kv_dtype: str) -> None:
    check_one_sequence(Machine(replace(MODELS[0], kv_dtype=kv_dtype, window=-50), run, target, (131,)))


def check_one_sequence(machine: Machine) -> None:
    alone = np.concatenate([machine.step([(0, position)]) for position in range(131)])
    expected = machine.reference(0)
    tolerance = TOLERANCE[machine.model.kv_dtype]
    assert np.abs(alone - expected).max() <= tolerance * np.abs(expected).max()
    machine.forget()
    np.testing.assert_array_equal(machine.prefill(0, 40, n_tasks=2), alone)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_prompt_of_any_length_has_the_same_bits_in_any_chunks(
    run: Run, host: Target, length: int, kv_dtype: str
) -> None:
    machine = Machine(Model(kv_dtype=kv_dtype), run, host, (length,))
    whole = machine.prefill(0, 512)
    for chunk in (40, 128):
        machine.forget()
        np.testing.assert_array_equal(machine.prefill(0, chunk), whole)
    machine.forget()
    machine.step([(0, i) if i < length - 1 else None for i in range(512)])
    np.testing.assert_array_equal(machine.step([(0, length - 1)])[0], whole[-1])  # prefill, then decode


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("window", [0, 70, -50])
def test_sequences_in_one_step_get_what_they_get_alone(run: Run, host: Target, kv_dtype: str, window: int) -> None:
    lengths = (150, 64, 1, 90)
    machine = Machine(Model(kv_dtype=kv_dtype, window=window), run, host, lengths)
    alone = [machine.prefill(sequence, 40) for sequence in range(4)]
    machine.forget()
    waiting = [[(s, position) for position in range(length)] for s, length in enumerate(lengths)]
    while any(waiting):
        rows: list[Row] = []
        for s, share in ((1, 13), (0, 17), (3, 9), (2, 1)):  # blocks that hold rows of several sequences
            rows += waiting[s][:share]
            waiting[s] = waiting[s][share:]
        rows = [None, *rows][:40]
        rows += [None] * (40 - len(rows))
        for row, result in zip(rows, machine.step(rows, n_tasks=3), strict=True):
            np.testing.assert_array_equal(result, alone[row[0]][row[1]] if row else 0 * result)


SPLIT = SPLIT_PAGES * PAGE_TOKENS
LONG = 2 * SPLIT + 76


@pytest.mark.parametrize(
    ("kv_dtype", "window", "of_heads"),
    [("f32", 0, {}), ("bf16", 0, {"has_sinks": True}), ("bf16", SPLIT + 100, {}),
     ("int8", 0, {"has_slopes": True, "rotary_dim": 0})],
)  # fmt: skip
def test_a_long_context_has_the_same_bits_however_its_splits_are_shared_out(
    run: Run, host: Target, kv_dtype: str, window: int, of_heads: dict[str, Any]
) -> None:
    machine = Machine(Model(kv_dtype=kv_dtype, window=window, **of_heads), run, host, (LONG, 70))
    whole, short = machine.prefill(0, 512), machine.prefill(1, 512)
    expected = machine.reference(0)
    assert np.abs(whole - expected).max() <= TOLERANCE[kv_dtype] * np.abs(expected).max()
    for position in (0, SPLIT - 1, SPLIT, 2 * SPLIT - 1, 2 * SPLIT, 2 * SPLIT + 1, LONG - 1):
        for n_tasks in (1, 2, 7):
            np.testing.assert_array_equal(machine.step([(0, position)], n_tasks)[0], whole[position])
    for start in (0, SPLIT - 5, 2 * SPLIT - 3, LONG - 8):  # one sequence: a block
        rows: list[Row] = [(0, start + i) for i in range(8)]
        for n_tasks in (1, 3):
            np.testing.assert_array_equal(machine.step(rows, n_tasks), whole[start : start + 8])
    mixed: list[Row] = [(0, 2 * SPLIT - 1), (1, 69), None, (0, 2 * SPLIT), (1, 3), (0, 7), None, (0, LONG - 1)]
    for n_tasks in (1, 2, 5):
        for row, result in zip(mixed, machine.step(mixed, n_tasks), strict=True):
            np.testing.assert_array_equal(result, (whole, short)[row[0]][row[1]] if row else 0 * result)


def test_every_choice_of_blocks_gives_the_same_bits(run: Run, host: Target) -> None:
    machine = Machine(Model(kv_dtype="int8"), run, host, (LONG,))
    whole = machine.prefill(0, 512)
    call = machine.model.call(8)
    rows: list[Row] = [*((0, 2 * SPLIT - 4 + i) for i in range(7)), None]
    cache = np.zeros((1, machine.model.kv_heads, PAGE_TOKENS, machine.model.head_dim), np.float32)
    choices = list(attention.space(call, host))
    assert {blocks.splits for blocks in choices} == {False, True}
    for blocks in choices:
        kernel = Executable(call, attention.implement(call, blocks, host), host)
        out, *_ = kernel.run(*machine.inputs(rows), cache, cache, n_tasks=3, kv=machine.pool[machine.layer :])
        np.testing.assert_array_equal(out[:7], whole[2 * SPLIT - 4 : 2 * SPLIT + 3])
        assert not out[7].any()


@pytest.mark.parametrize("n_tasks", [1, 2, 3, 7])
def test_any_number_of_tasks_gives_the_same_bits(run: Run, host: Target, n_tasks: int) -> None:
    machine = Machine(Model(kv_dtype="bf16"), run, host, (100,))
    expected = machine.prefill(0, 40)
    machine.forget()
    np.testing.assert_array_equal(machine.prefill(0, 40, n_tasks), expected)
    np.testing.assert_array_equal(machine.step([(0, 99)], n_tasks)[0], expected[99])


@pytest.mark.parametrize("m", [1, 40])
def test_rows_that_pad_a_step_write_nothing_and_give_zeros(run: Run, host: Target, m: int) -> None:
    machine = Machine(Model(), run, host, (1,))
    assert not machine.step([None] * m).any()
    assert (machine.pool == 0xFF).all()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_row_writes_its_own_slot_of_its_own_layer(run: Run, host: Target, kv_dtype: str) -> None:
    model = Model(kv_dtype=kv_dtype)
    machine = Machine(model, run, host, (1,))
    machine.step([(0, 0)])
    written = (machine.pool != 0xFF).reshape(N_PAGES, 2, machine.layer)
    page = machine.sequences[0].pages[0]
    number, scale = {"f32": (4, 0), "bf16": (2, 0), "int8": (1, 4)}[kv_dtype]
    n_bytes = 2 * model.kv_heads * (model.head_dim * number + scale)
    assert n_bytes * 0.97 <= written[page, 1].sum() <= n_bytes  # some bytes of a number are 0xFF too
    written[page, 1] = False
    assert not written.any()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("m", [1, 40])
def test_a_page_may_lie_gigabytes_from_the_first(run: Run, host: Target, m: int, kv_dtype: str, tmp_path: Path) -> None:
    machine = Machine(Model(kv_dtype=kv_dtype), run, host, (70,))
    expected = machine.prefill(0, m)
    page_bytes = 2 * machine.layer
    far = 6 * 2**30 // page_bytes
    with (tmp_path / "pool").open("w+b") as file:
        file.truncate((far + 2) * page_bytes)  # sparse: only what is touched takes room
        machine.pool = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)
    machine.sequences[0].pages[:2] = far, far + 1
    np.testing.assert_array_equal(machine.prefill(0, m), expected)


@pytest.mark.parametrize("model", [MODELS[0], MODELS[1], MODELS[2], MODELS[4]], ids=str)
def test_it_is_what_the_operator_is_defined_to_be(run: Run, define: Run, host: Target, model: Model) -> None:
    machine = Machine(model, run, host, (70, 5))
    rows: list[Row] = [*((0, i) for i in range(33)), None, *((1, i) for i in range(5)), (0, 33)]
    inputs = [np.nan_to_num(array) for array in machine.inputs(rows)]
    call = model.call(len(rows), N_PAGES)
    kept = {name: value for name, value in call.attributes if name not in ("n_layers", "kv_dtype", "page_tokens")}
    defined = Call(call.op, call.inputs, call.outputs, tuple({**kept, "layer": 0}.items()))
    cache = np.zeros((N_PAGES, model.kv_heads, PAGE_TOKENS, model.head_dim), np.float32)
    inputs[-2:] = [array.astype(np.int64) for array in inputs[-2:]]
    expected = define(defined, *inputs, cache, cache)[0]
    np.testing.assert_allclose(machine.step(rows), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "value"), [("kv_dtype", "f16"), ("page_tokens", 32), ("kv_num_heads", 3)])
def test_what_the_kernels_cannot_do_is_refused(host: Target, name: str, value: Any) -> None:
    assert attention.match(with_attribute(Model(), name, value), host) is None


@pytest.mark.parametrize(("kv_dtype", "head_dim"), [("bf16", 63), ("int8", 514)])
def test_heads_that_the_kernels_cannot_take_are_named(host: Target, kv_dtype: str, head_dim: int) -> None:
    with pytest.raises(LlmcError, match=f"not {head_dim}"):
        attention.match(with_attribute(Model(kv_dtype=kv_dtype), "head_dim", head_dim), host)


def with_attribute(model: Model, name: str, value: Any) -> Call:
    call = model.call(1)
    return Call(call.op, call.inputs, call.outputs, tuple({**dict(call.attributes), name: value}.items()))


def test_inputs_are_named_as_the_operators_name_them() -> None:
    names = (*PAGED_ATTENTION, *WHOLE_PAGED_ATTENTION, *APPENDED_ATTENTION)
    known = {name: inputs for name, inputs in INPUTS.items() if "Ahead" not in name}  # test_attention_ahead.py
    assert {f"{DOMAIN}.{name}": OPERATORS[name].inputs for name in names} == known
    assert OPERATORS[LATENT.removeprefix(f"{DOMAIN}.")].inputs == LATENT_INPUTS
