"""Attention of an encoder: every row over all of its text, against its definition, and the same bits in any company."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from llmc import schedules
from llmc.compiler.kernel import PAGE_TOKENS, Call, TensorType
from llmc.compiler.target import Target
from tests.schedules.test_amx import AMX, needs_amx

Array = np.ndarray[Any, Any]
Run = Callable[..., list[Array]]
N_PAGES, PAGES = 24, 5
TOLERANCE = {"f32": 2e-6, "bf16": 1.2e-2, "int8": 2.5e-2}
"""Of the definition, which is float32 throughout: queries, keys and values are not rounded there."""


@dataclass(frozen=True)
class Model:
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    rotary_dim: int = 32
    window: int = 0
    kv_dtype: str = "f32"
    norm: bool = False
    biased: bool = False

    @property
    def columns(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def call(self, m: int, n_pages: int = 1) -> Call:
        def f32(*shape: int, constant: bool = False) -> TensorType:
            return TensorType(shape, "f32", constant=constant)

        attributes: dict[str, Any] = {
            "num_heads": self.heads,
            "kv_num_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "scale": self.head_dim**-0.5,
            "softcap": 0.0,
            "window": self.window,
            "n_layers": 1,
            "kv_dtype": self.kv_dtype,
            "page_tokens": PAGE_TOKENS,
            **({"epsilon": 1e-6} if self.norm else {}),
            **({"rotary_dim": self.rotary_dim, "interleaved": 0} if self.rotary_dim else {}),
        }
        norms = [f32(self.head_dim, constant=True)] * 2 * self.norm
        turns = [f32(m, self.rotary_dim // 2)] * 2 * bool(self.rotary_dim)
        ids = (TensorType((m,), "i32"), TensorType((m, PAGES), "i32"))
        caches = [f32(n_pages, self.kv_heads, PAGE_TOKENS, self.head_dim)] * 2
        of_rows = f"{'RMSNorm' * self.norm}{'Rotary' * bool(self.rotary_dim)}{'Distance' * self.biased}"
        name = f"llmc.{of_rows}BidirectionalPagedAttention"
        biases = [f32(self.heads, 2 * PAGES * PAGE_TOKENS, constant=True)] * self.biased
        inputs = (f32(m, self.columns), *norms, *turns, *biases, *ids, *caches)
        results = (f32(m, self.heads * self.head_dim), *caches)
        return Call(name, inputs, results, tuple(sorted(attributes.items())))


class Texts:
    """Rows of texts, each the same whatever step it is in, and pages for them."""

    def __init__(self, model: Model, lengths: Sequence[int]) -> None:
        self.model, self.lengths = model, lengths

    def inputs(self, which: Sequence[int], m: int) -> list[Array]:
        """Of a step of m rows with these texts one behind the other; rows that pad it are poisoned."""
        pages = list(np.random.default_rng(3).permutation(N_PAGES))
        qkv, angles = list[Array](), list[Array]()
        positions, table = list[int](), list[list[int]]()
        for index in which:
            generator, length = np.random.default_rng(index), self.lengths[index]
            own = [pages.pop() for _ in range(-(-length // PAGE_TOKENS))]
            qkv.append(generator.standard_normal((length, self.model.columns)) * 1.5)
            angles.append(generator.uniform(0, 6, (length, self.model.rotary_dim // 2)))
            positions += range(length)
            table += [own + [-1] * (PAGES - len(own))] * length
        padding = m - len(positions)
        qkv.append(np.full((padding, self.model.columns), np.nan))
        angles.append(np.full((padding, self.model.rotary_dim // 2), np.nan))
        table += [[-1] * PAGES] * padding
        turned = np.concatenate(angles)
        turns = [np.cos(turned), np.sin(turned)] * bool(self.model.rotary_dim)
        norms = [np.random.default_rng(9).uniform(0.3, 1.7, self.model.head_dim)] * 2 * self.model.norm
        shape = (self.model.heads, 2 * PAGES * PAGE_TOKENS)
        biases = [np.random.default_rng(8).normal(0, 3, shape)] * self.model.biased
        floats = [part.astype(np.float32) for part in (np.concatenate(qkv), *norms, *turns, *biases)]
        at = np.array(positions + [-1] * padding, np.int32)
        return [*floats, at, np.array(table, np.int32).reshape(m, PAGES)]

    def step(self, run: Run, target: Target, which: Sequence[int], m: int, n_tasks: int = 1) -> list[Array]:
        """The results of each text, in a step of m rows whose cache is poisoned, and those of the rows that pad it."""
        call = self.model.call(m)
        caches = [np.zeros(kind.shape if kind else (), np.float32) for kind in call.inputs[-2:]]
        page_bytes = schedules.implement(call, target).kv_layer_bytes
        raw = np.full(page_bytes * N_PAGES + 64, 0xFF, np.uint8)
        memory = raw[-raw.ctypes.data % 64 :][: page_bytes * N_PAGES]
        out, *_ = run(call, *self.inputs(which, m), *caches, target=target, n_tasks=n_tasks, kv=memory)
        ends = np.cumsum([self.lengths[index] for index in which])
        return np.split(out, ends)

    def defined(self, define: Run, which: Sequence[int], m: int) -> Array:
        call, model = self.model.call(m, N_PAGES), self.model
        kept = {name: value for name, value in call.attributes if name not in ("n_layers", "kv_dtype", "page_tokens")}
        inputs = [np.nan_to_num(array) for array in self.inputs(which, m)]
        inputs[-2:] = [array.astype(np.int64) for array in inputs[-2:]]
        cache = np.zeros((N_PAGES, model.kv_heads, PAGE_TOKENS, model.head_dim), np.float32)
        defined = Call(call.op, call.inputs, call.outputs, tuple({**kept, "layer": 0}.items()))
        return define(defined, *inputs, cache, cache)[0]


LENGTHS = (70, 1, 33, 5, 64, 200)
MODELS = {
    "plain": Model(),
    "no rotary": Model(heads=3, kv_heads=3, head_dim=20, rotary_dim=0),
    "a window": Model(heads=4, kv_heads=4, window=17),
    "biases": Model(heads=4, kv_heads=2, head_dim=20, rotary_dim=0, biased=True),
    "a window of pages, norms": Model(heads=4, kv_heads=1, head_dim=64, rotary_dim=64, window=90, norm=True),
}


@pytest.mark.parametrize(
    ("kind", "kv_dtype"),
    [*((kind, "f32") for kind in MODELS), ("a window", "bf16"), ("a window", "int8"), ("biases", "bf16")],
)
def test_it_is_what_the_operator_is_defined_to_be(
    run: Run, define: Run, host: Target, kind: str, kv_dtype: str
) -> None:
    check(Texts(Model(**{**vars(MODELS[kind]), "kv_dtype": kv_dtype}), LENGTHS), run, define, host)


def test_it_is_right_on_every_level(run: Run, define: Run, target: Target) -> None:
    check(Texts(Model(window=40, kv_dtype="bf16"), (70, 5)), run, define, target)


@needs_amx
def test_it_is_right_in_tiles(run: Run, define: Run) -> None:
    check(
        Texts(Model(heads=6, kv_heads=2, head_dim=48, rotary_dim=16, window=40, kv_dtype="bf16"), LENGTHS),
        run,
        define,
        AMX,
    )


def check(texts: Texts, run: Run, define: Run, target: Target) -> None:
    which = list(range(len(texts.lengths)))
    m = sum(texts.lengths) + 3
    found = texts.step(run, target, which, m)
    expected = texts.defined(define, which, m)
    error = np.abs(np.concatenate(found) - expected).max()
    assert error <= TOLERANCE[texts.model.kv_dtype] * np.abs(expected).max()
    assert not found[-1].any()
    for index in which:  # alone and behind another, in steps of another size; on several threads
        np.testing.assert_array_equal(texts.step(run, target, [index], 300, n_tasks=3)[0], found[index])
        other = [1, index] if index != 1 else [0, 1]
        np.testing.assert_array_equal(texts.step(run, target, other, 300, n_tasks=2)[1], found[index])
    filled = len(which) - 1
    length = texts.lengths[filled]
    np.testing.assert_array_equal(texts.step(run, target, [filled], length)[0], found[filled])
