"""Random inputs for a call, the same for the same call: products of about the size of 1, every number exact in the type
that it is stored in."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import cycle
from math import ceil, log2
from typing import Any

import numpy as np

from llmc.bench.gpu import kv_codes
from llmc.bench.gpu.bits import Codes, Stored, bits_of, e4m3_of, exact
from llmc.compiler.kernel import PAGE_TOKENS, Call, TensorType
from llmc.schedules.attention_call import LATENT, NORMS, OF_HEADS, input_places, is_both_ways
from llmc.schedules.cuda.deferred_norm import applies, n_plain_inputs
from llmc.schedules.states_call import DELTA_RULES, SELECTIVE_SCAN, is_stateful

Array = np.ndarray[Any, Any]
Constant = Array | Codes | Stored
POOL = 1 << 22
MOST_CONSTANTS = 40
"""So many constants are kept: models' calls have the same weights at every M, and making 100 million numbers takes a
while.
"""
RUNS = 2
"""Of a layer with a state, over the same rows: the first begins with slots of zeros, and the last one's result counts.
What a run leaves there, the next one finds."""
QUARTERS = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], np.float32)
"""Cosines and sines of quarter turns: what they turn stays exact."""


@dataclass
class Inputs:
    """arrays: an input by its index, f32 or i32; quantised weights as codes.  keys, values: for attention, what the
    cache holds before the step, f32 [pages, KH, tokens, D]; pages that nobody may read are NaN.  values None: they
    are the first part of the keys."""

    arrays: dict[int, Constant]
    keys: Array | None = None
    values: Array | None = None
    rows: list[tuple[int, int] | None] = field(default_factory=list)

    def array(self, index: int) -> Array:
        found = self.arrays[index]
        return found if isinstance(found, np.ndarray) else found.values()


@lru_cache(maxsize=1)
def pool() -> Array:
    """Normal numbers to take windows from: drawing a 7B's weights one by one would take minutes."""
    generator = np.random.Generator(np.random.SFC64(0))
    return generator.standard_normal(2 * POOL, dtype=np.float32)


@lru_cache(maxsize=8)
def pool_of(dtype: str, scale: float) -> Array:
    """The same as bits of `dtype`, made smaller by a power of two."""
    return bits_of(pool() * np.float32(scale), dtype)


def normal(name: str, shape: tuple[int, ...], numbers: Array | None = None) -> Array:
    """Rows are windows of the pool at places of their own."""
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    start, stride = (int.from_bytes(half, "little") for half in (digest[:8], digest[8:]))
    rows, columns = int(np.prod(shape[:-1], dtype=np.int64)), shape[-1]
    numbers = pool() if numbers is None else numbers
    values = np.empty((rows, columns), numbers.dtype)
    for row in range(rows):
        at = (start + row * (stride | 1)) % POOL
        values[row] = numbers[at : at + columns]
    return values.reshape(shape)


def make(call: Call, length: int | None = None) -> Inputs:
    """Inputs of a call.  length: for attention, the longest context."""
    if call.op == LATENT:
        return latent_inputs(call, length)
    if call.op.endswith("PagedAttention"):
        return attention_inputs(call, length)
    if is_stateful(call):
        return state_inputs(call)
    kinds = {index: kind for index, kind in enumerate(call.inputs) if kind is not None}
    arrays = {i: constant(i, k) if k.constant else tensor(f"{call} {i}", k) for i, k in kinds.items()}
    if applies(call):
        at = n_plain_inputs(call) + 1
        moments = arrays[at]
        assert isinstance(moments, np.ndarray)
        arrays[at] = np.abs(moments)  # squares among them are no negative numbers
    return Inputs(arrays)


@lru_cache(maxsize=MOST_CONSTANTS)
def constant(index: int, kind: TensorType, of_heads: str = "") -> Constant:
    """A call's constant: the same in all calls that have one of its kind there.

    of_heads: "sinks", which count beside some hundred keys, or "slopes", of ALiBi; "": anything else.
    """
    if of_heads == "sinks":
        return np.float32(5) + normal(f"{index} {kind}", kind.shape)
    if of_heads == "slopes":
        return np.exp2(-np.linspace(2, 8, kind.shape[0], dtype=np.float32))
    return tensor(f"{index} {kind}", kind)


def of_heads(call: Call, index: int) -> str:
    """Which of those an input is."""
    places = input_places(call)
    return next((name for name in OF_HEADS if places.get(name) == index), "")


def tensor(name: str, kind: TensorType) -> Constant:
    if kind.dtype in ("i8", "i4", "f8") and kind.constant:
        return codes(name, kind)
    if kind.dtype == "i32":
        return np.zeros(kind.shape, np.int32)
    if kind.constant and len(kind.shape) == 2:
        scale = 2.0 ** round(log2(kind.shape[-1]) / -2)
        if kind.dtype in ("bf16", "f16"):  # large ones: bits are drawn, and no number is ever computed
            return Stored(normal(name, kind.shape, pool_of(kind.dtype, scale)), kind.dtype)
        return exact(normal(name, kind.shape) * np.float32(scale), "bf16")
    values = normal(name, kind.shape)
    return exact(values, kind.dtype if kind.dtype in ("bf16", "f16") else "bf16")


def codes(name: str, kind: TensorType) -> Codes:
    """Codes of a normal weight, with scales of one size but for a little."""
    rows, k = kind.shape
    largest = {"i8": 127, "i4": 7, "f8": 448}[kind.dtype]
    values = np.clip(normal(name, kind.shape) * np.float32(largest / 3), -largest, largest)
    drawn = e4m3_of(values) if kind.dtype == "f8" else np.rint(values).astype(np.int8)
    groups = ceil(k / kind.group) if kind.group else 1
    size = np.float32(3 / largest * k**-0.5)
    scales = size * (1 + 0.1 * np.tanh(normal(f"{name} scales", (rows, groups))))
    stored = scales.astype(np.float16 if kind.dtype == "i4" else np.float32)
    return Codes(drawn, stored, kind.group, kind.dtype == "f8")


# -- attention --------------------------------------------------------------------------------------------------------


def attention_inputs(call: Call, length: int | None = None) -> Inputs:
    """A step of one sequence's run of tokens, others' single tokens, and a row that pads it."""
    places = input_places(call)
    kinds = [kind for kind in call.inputs if kind is not None]
    at = places["positions"]
    m = kinds[at].shape[0]
    rows, positions, tables, n_pages = step_of(call, length)
    heads, dim = call.attribute("kv_num_heads"), call.attribute("head_dim")
    dtype = call.attribute("kv_dtype")
    hold = kv_codes.kept if dtype == "int8" else partial(exact, dtype=dtype)
    qkv = exact(normal(f"{call} qkv", kinds[0].shape), call.outputs[0].dtype)
    if dtype == "int8":  # quarter turns change no code
        own = qkv.reshape(m, -1, dim)[:, -2 * heads :]
        own[:] = hold(own)
    arrays: dict[int, Constant] = {0: qkv}
    for name in places.keys() & {*NORMS, *OF_HEADS}:
        index = places[name]
        arrays[index] = constant(index, kinds[index], of_heads(call, index))
    if "cos" in places:
        arrays |= quarter_turns(call, positions)
    arrays[at], arrays[at + 1] = positions, tables
    shape = (n_pages, heads, PAGE_TOKENS, dim)
    keys, values = (hold(normal(f"{call} {name}", shape)) for name in "kv")
    return Inputs(arrays, keys, values, rows)


def latent_inputs(call: Call, length: int | None = None) -> Inputs:
    """The same of attention over latents."""
    places, dtype = input_places(call), call.attribute("kv_dtype")
    rows, positions, tables, n_pages = step_of(call, length)
    arrays: dict[int, Constant] = {places["positions"]: positions, places["page_table"]: tables}
    arrays |= quarter_turns(call, positions)
    for name in ("q", "absorbed", "kv", "norm"):
        kind = call.inputs[places[name]]
        assert kind is not None
        at = places[name]
        arrays[at] = constant(at, kind) if kind.constant else exact(normal(f"{call} {name}", kind.shape), dtype)
    shape = (n_pages, 1, PAGE_TOKENS, call.attribute("latent_dim") + call.attribute("rotary_dim"))
    return Inputs(arrays, exact(normal(f"{call} keys", shape), dtype), None, rows)


# -- layers with a state ----------------------------------------------------------------------------------------------


def state_inputs(call: Call) -> Inputs:
    """A step of the same kind; some sequences begin in it, the others go on.  The state is no array: it is zeros."""
    *kinds, positions, _, _ = call.inputs
    assert positions is not None
    rows = step_rows(positions.shape[0], positions.shape[0])
    arrays: dict[int, Constant] = {}
    for index, kind in enumerate(kinds):
        assert kind is not None
        arrays[index] = constant(index, kind) if kind.constant else exact(normal(f"{call} {index}", kind.shape), "bf16")
    if DELTA_RULES.get(call.op):  # rates, a scan's too, are of both signs: what is kept must not grow without end
        arrays[1] = np.float32(-6) + normal(f"{call} a", kinds[1].shape) if kinds[1] else arrays[1]
    elif call.op in DELTA_RULES:
        arrays[1] = -np.abs(normal(f"{call} g", kinds[1].shape)) if kinds[1] else arrays[1]
        arrays[2] = 1 / (1 + np.exp(-normal(f"{call} beta", kinds[2].shape))) if kinds[2] else arrays[2]
    elif call.op == SELECTIVE_SCAN:
        arrays[1] = np.float32(-8) + normal(f"{call} dt", kinds[1].shape) if kinds[1] else arrays[1]
    n = len(kinds)
    arrays[n] = np.array([row[1] if row else -1 for row in rows], np.int32)
    arrays[n + 1] = np.array([row[0] if row else -1 for row in rows], np.int32)
    return Inputs(arrays, rows=rows)


def step_of(call: Call, length: int | None) -> tuple[list[tuple[int, int] | None], Array, Array, int]:
    """Rows of a step, their positions and page tables, and how many pages there are."""
    kind = call.inputs[input_places(call)["page_table"]]
    assert kind is not None
    m, n_columns = kind.shape
    longest = min(length or n_columns * PAGE_TOKENS, n_columns * PAGE_TOKENS)
    rows = text_rows(m, longest) if is_both_ways(call) else step_rows(m, longest)
    positions = np.array([row[1] if row else -1 for row in rows], np.int32)
    return rows, positions, *page_tables(rows, n_columns)


def quarter_turns(call: Call, positions: Array) -> dict[int, Constant]:
    """Angles for each row, as cosines and sines."""
    places = input_places(call)
    kind = call.inputs[places["cos"]]
    assert kind is not None
    turns = np.resize(np.arange(4), kind.shape[1]) + positions[:, None]
    parts = {places[name]: QUARTERS[turns % 4][..., part] for part, name in enumerate(("cos", "sin"))}
    return {at: np.ascontiguousarray(part) for at, part in parts.items()}


def step_rows(m: int, longest: int) -> list[tuple[int, int] | None]:
    """(sequence, position) of each row: a run of sequence 0, single tokens of others, padding at the end."""
    n_padding = int(m > 2)
    n_single = min(8, (m - n_padding) // 2)
    n_run = min(m - n_padding - n_single, longest)
    last = [max(0, longest - 1 - 67 * i) for i in range(n_single)]
    run: list[tuple[int, int] | None] = [(0, longest - n_run + i) for i in range(n_run)]
    singles: list[tuple[int, int] | None] = [(1 + i, position) for i, position in enumerate(last)]
    return [*run, *singles, *[None] * (m - n_run - n_single)]


def text_rows(m: int, longest: int) -> list[tuple[int, int] | None]:
    """The same of texts that are in the step whole, one behind the other: a long one, and shorter ones."""
    n_padding = int(m > 2)
    rows: list[tuple[int, int] | None] = []
    for text, length in enumerate(cycle((max(1, min(longest, 3 * m // 5)), 1, 20, 3))):
        rows += [(text, position) for position in range(length)]
        if len(rows) >= m - n_padding:
            return [*rows[: m - n_padding], *[None] * n_padding]
    raise AssertionError("a cycle has no end")


def page_tables(rows: list[tuple[int, int] | None], n_columns: int) -> tuple[Array, int]:
    """Each row's pages, -1 beyond its sequence, and how many there are; a sequence's pages lie anywhere."""
    lengths: dict[int, int] = {}
    for sequence, position in filter(None, rows):
        lengths[sequence] = max(lengths.get(sequence, 0), position + 1)
    needed = {sequence: ceil(n / PAGE_TOKENS) for sequence, n in lengths.items()}
    n_pages = sum(needed.values())
    numbers = iter(np.random.default_rng(n_pages).permutation(n_pages))
    own = {s: [int(next(numbers)) for _ in range(n)] for s, n in needed.items()}
    tables = np.full((len(rows), n_columns), -1, np.int32)
    for index, row in enumerate(rows):
        if row:
            tables[index, : needed[row[0]]] = own[row[0]]
    return tables, n_pages
