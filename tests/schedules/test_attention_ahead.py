"""Attention of rows that see what is behind them, as a picture's do: its definition, and the same bits in any step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from llmc.compiler.kernel import PAGE_TOKENS, Call, TensorType
from llmc.compiler.ops import AHEAD_PAGED_ATTENTION, DOMAIN, OPERATORS
from llmc.compiler.target import Target
from llmc.schedules.attention_call import INPUTS
from tests.schedules.test_attention import KV_DTYPES, N_PAGES, SPLIT, Machine, Model, Row
from tests.schedules.test_attention_whole import TOLERANCE

Array = np.ndarray[Any, Any]
Run = Callable[..., list[Array]]
PICTURES = ((3, 9), (20, 52), (60, 130), (130, 133))
"""Of the first sequence: positions from, and up to before."""


@dataclass(frozen=True)
class AheadModel(Model):
    """The layer whose rows are told up to where they see."""

    def call(self, m: int, n_pages: int = 1) -> Call:
        plain = super().call(m, n_pages)
        inputs = (*plain.inputs[:-4], TensorType((m,), "i32"), *plain.inputs[-4:])
        return Call(plain.op.replace("Paged", "AheadPaged"), inputs, plain.outputs, plain.attributes)


@dataclass
class AheadMachine(Machine):
    """pictures: of the first sequence; the others have none."""

    pictures: Sequence[tuple[int, int]] = PICTURES

    def inputs(self, rows: Sequence[Row]) -> list[Array]:
        *others, positions, table = super().inputs(rows)
        return [*others, np.array([self.sees(row) for row in rows], np.int32), positions, table]

    def sees(self, row: Row) -> int:
        if row is None:
            return -1
        sequence, position = row
        within = [end - 1 for start, end in self.pictures if sequence == 0 and start <= position < end]
        return within[0] if within else position

    def read(self, sizes: Sequence[int], n_tasks: int = 1) -> Array:
        """The first sequence in steps of these sizes, which cut no picture, each filled up to a multiple of 8 rows."""
        parts, start = list[Array](), 0
        for size in sizes:
            rows: list[Row] = [(0, start + i) for i in range(size)]
            parts.append(self.step([*rows, *[None] * (-size % 8)], n_tasks)[:size])
            start += size
        assert start == self.lengths[0]
        return np.concatenate(parts)


MODELS = [
    AheadModel(),
    AheadModel(heads=3, kv_heads=3, head_dim=80, rotary_dim=0, epsilon=1e-6),
    AheadModel(heads=4, kv_heads=1, head_dim=32, rotary_dim=32, window=80, epsilon=1e-6, softcap=20.0),
]


@pytest.mark.parametrize(("model", "kv_dtype"), list(zip(MODELS, KV_DTYPES, strict=True)), ids=str)
def test_it_is_what_the_operator_is_defined_to_be(
    run: Run, define: Run, host: Target, model: AheadModel, kv_dtype: str
) -> None:
    model = replace(model, kv_dtype=kv_dtype)
    machine = AheadMachine(model, run, host, (141, 9))
    rows: list[Row] = [*((0, i) for i in range(141)), None, *((1, i) for i in range(9)), None]
    inputs = [np.nan_to_num(array) for array in machine.inputs(rows)]
    inputs[-3:] = [array.astype(np.int64) for array in inputs[-3:]]
    call = model.call(len(rows), N_PAGES)
    kept = {name: value for name, value in call.attributes if name not in ("n_layers", "kv_dtype", "page_tokens")}
    defined = Call(call.op, call.inputs, call.outputs, tuple({**kept, "layer": 0}.items()))
    cache = np.zeros((N_PAGES, model.kv_heads, PAGE_TOKENS, model.head_dim), np.float32)
    expected = define(defined, *inputs, cache, cache)[0]
    found = machine.step(rows, n_tasks=2)
    assert np.abs(found - expected).max() <= 2 * TOLERANCE[kv_dtype] * np.abs(expected).max()
    plain = Machine(Model(**vars(model)), run, host, (141, 9)).step(rows)
    differs = np.abs(found - plain).max(axis=1) > 0.01
    looks = [row is not None and machine.sees(row) > row[1] for row in rows]
    assert differs[looks].mean() > 0.9


@pytest.mark.parametrize(("kv_dtype", "window"), [("bf16", 0), ("int8", 80)])
def test_a_text_without_pictures_has_the_bits_of_attention_that_looks_back(
    run: Run, host: Target, kv_dtype: str, window: int
) -> None:
    plain = Machine(Model(kv_dtype=kv_dtype, window=window), run, host, (131,)).prefill(0, 40)
    ahead = AheadMachine(AheadModel(kv_dtype=kv_dtype, window=window), run, host, (131,), pictures=())
    np.testing.assert_array_equal(ahead.prefill(0, 40), plain)
    np.testing.assert_array_equal(ahead.step([(0, 130)])[0], plain[-1])


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_the_bits_are_the_same_in_any_steps_that_cut_no_picture(run: Run, host: Target, kv_dtype: str) -> None:
    machine = AheadMachine(AheadModel(kv_dtype=kv_dtype), run, host, (141,))
    whole = machine.read([141])
    for sizes in ([2, 7, 11, 40, 70, 3, 8], [1, 1, 1, 17, 32, 8, 73, 8]):
        machine.forget()
        np.testing.assert_array_equal(machine.read(sizes, n_tasks=3), whole)


def test_company_changes_no_bit(run: Run, host: Target) -> None:
    machine = AheadMachine(AheadModel(kv_dtype="bf16"), run, host, (141, 70))
    alone, other = machine.read([141]), machine.prefill(1, 40)
    machine.forget()
    for start, end, at in ((0, 20, 0), (20, 52, 13), (52, 60, 30), (60, 133, 31), (133, 141, 60)):
        share: list[Row] = [(1, at + i) for i in range(min(9, 70 - at))]
        for i in range(at):  # what stands before it is there already, or is written again
            share = [(1, i), *share] if i not in (row[1] for row in share if row) else share
        rows: list[Row] = [*sorted(row for row in share if row), None, *((0, i) for i in range(start, end)), None]
        for row, result in zip(rows, machine.step(rows, n_tasks=2), strict=True):
            expected = 0 * result if row is None else (alone, other)[row[0]][row[1]]
            np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(("kv_dtype", "window"), [("f32", 0), ("int8", 300)])
def test_a_picture_far_into_a_text_may_end_in_another_split(run: Run, host: Target, kv_dtype: str, window: int) -> None:
    pictures = ((SPLIT - 3, SPLIT + 4), (2 * SPLIT - 5, 2 * SPLIT + 1))
    model = AheadModel(kv_dtype=kv_dtype, window=window)
    machine = AheadMachine(model, run, host, (2 * SPLIT + 20,), pictures=pictures)
    whole = machine.read([2 * SPLIT + 20])
    for start, end in pictures:  # small steps, whose splits may be units of work
        rows: list[Row] = [(0, i) for i in range(start, end)]
        for n_tasks in (1, 5):
            np.testing.assert_array_equal(machine.step([*rows, None], n_tasks)[:-1], whole[start:end])


def test_inputs_are_named_as_the_operators_name_them() -> None:
    names = AHEAD_PAGED_ATTENTION.values()
    known = {name: inputs for name, inputs in INPUTS.items() if "Ahead" in name}
    assert {f"{DOMAIN}.{name}": OPERATORS[name].inputs for name in names} == known
