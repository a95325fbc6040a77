"""Attention of an encoder on the emulator, against its ONNX definition: every row over all of its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmc.compiler.kernel import Implementation
from llmc.compiler.target import Target
from llmc.schedules.cuda.attention import rule as attention
from tests.emulator.emulate import EmulatedExecutable
from tests.schedules.cuda import test_attention
from tests.schedules.cuda.test_attention import TARGET, Define, Machine, Model, Row
from tests.schedules.cuda.test_attention_norm import NormedMachine
from tests.schedules.cuda.test_mutants import Case, is_noticed

Array = np.ndarray[Any, Any]
GENERIC = Target("cuda", "sm_80")
BERT = Model(heads=2, kv_heads=2, rotary_dim=0, both_ways=True)
WINDOW = Model(heads=2, kv_heads=2, window=40, both_ways=True)
MODELS = {
    "bert": BERT,
    "bert in float32": replace(BERT, kv_dtype="f32", tiled=False),
    "minilm": Model(heads=3, kv_heads=3, head_dim=32, rotary_dim=0, rounded=True, both_ways=True),
    "a narrow window": Model(heads=3, kv_heads=1, head_dim=32, rotary_dim=32, window=3, both_ways=True),
    "a window in float32": replace(WINDOW, kv_dtype="f32", tiled=False),
    "a window of pages": Model(heads=2, kv_heads=1, head_dim=128, rotary_dim=128, window=90, both_ways=True),
    "gemma": Model(heads=2, kv_heads=1, head_dim=256, rotary_dim=256, window=40, epsilon=1e-6, both_ways=True),
    "in int8": replace(WINDOW, kv_dtype="int8"),
    "mpnet": replace(BERT, has_biases=True),
    "mpnet in float32": replace(BERT, has_biases=True, kv_dtype="f32", tiled=False),
    "mpnet in int8, capped": replace(BERT, has_biases=True, kv_dtype="int8", softcap=5.0),
    "in f16": Model(heads=2, kv_heads=2, head_dim=16, rotary_dim=16, kv_dtype="f16", both_ways=True),
}
LENGTHS = (70, 1, 33, 5, 64, 130)
"""Texts that begin and end within tiles and pages, and on their edges."""


def step(lengths: Sequence[int], n_padding: int = 0) -> list[Row]:
    """Texts of these lengths one behind the other."""
    return [*((text, i) for text, length in enumerate(lengths) for i in range(length)), *[None] * n_padding]


def check(
    define: Define,
    model: Model,
    lengths: Sequence[int],
    target: Target = TARGET,
    n_padding: int = 0,
    params: Any = None,
) -> None:
    """A step of texts of these lengths.  params: None for the rule's own."""
    rows = step(lengths, n_padding)
    call = model.call(len(rows))
    params = params or attention.match(call, target)
    kind = Machine if model.epsilon is None else NormedMachine
    run = EmulatedExecutable(call, attention.implement(call, params, target), target)
    kind(model, lengths).check(rows, define, run)


@pytest.mark.parametrize("target", [TARGET, GENERIC], ids=lambda target: target.level)
@pytest.mark.parametrize("kind", MODELS)
def test_each_row_sees_all_of_its_text(kind: str, target: Target, define: Define) -> None:
    check(define, MODELS[kind], LENGTHS, target, n_padding=3)


@pytest.mark.parametrize("m", [1, 20, 64, 65])
def test_a_step_of_any_size_attends_what_a_launch_in_front_has_appended(m: int, define: Define) -> None:
    assert isinstance(attention.match(BERT.call(m), TARGET), attention.Tile)
    check(define, BERT, (m,))


@pytest.mark.parametrize("model", [BERT, WINDOW], ids=["all", "a window"])
@pytest.mark.parametrize(
    "params",
    [
        attention.Tile(2),
        attention.Tile(3, 1),
        attention.Tile(2, 2, in_turn=False, blocks=3),
        attention.Tile(3, 3, pad=1, blocks=1),
    ],
    ids=str,
)
def test_a_text_goes_on_from_tile_to_tile(model: Model, params: attention.Tile, define: Define) -> None:
    """Its end is several tiles further, or in the next, or there."""
    check(define, model, (20, 290, 6), params=params)


def test_the_end_of_a_long_text_is_found_from_its_beginning(define: Define, monkeypatch: pytest.MonkeyPatch) -> None:
    """In three rounds: more than 1024 rows are behind it."""
    monkeypatch.setattr(test_attention, "PAGES", 20)
    check(define, replace(BERT, heads=1, kv_heads=1, head_dim=16), (1100, 20), GENERIC)


def whole_case(model: Model, target: Target, lengths: Sequence[int] = LENGTHS) -> Case:
    """A step of whole texts, to break."""
    rows, machine = step(lengths), Machine(model, lengths)
    call, inputs, pool = model.call(len(rows)), machine.inputs(rows), machine.pool(rows)
    zeros = np.zeros_like(machine.caches[0])
    params = attention.match(call, target)
    assert params is not None

    def run(implementation: Implementation) -> list[Array]:
        after = pool.copy()
        kv = after.reshape(-1)[pool.shape[1] // 2 :]
        out, *_ = EmulatedExecutable(call, implementation, target).run(*inputs, zeros, zeros, kv=kv)
        return [out, after]

    return Case(attention.implement(call, params, target), target, run, ())


def test_no_bias_is_looked_up_beyond_the_longest_text() -> None:
    """For rows of a tile behind it, as of no distance that there is."""
    model = replace(BERT, heads=1, kv_heads=1, head_dim=16, has_biases=True)
    case = whole_case(model, GENERIC, (30, 64 * test_attention.PAGES))
    assert is_noticed(case, "attention_slopes.cuh", "min(max(query, 0), Shape::reach - 1)", "query")


WIDE = replace(WINDOW, window=90)
"""16 rows see all of some pages."""
MISTAKES = [
    (BERT, "attention_texts.cuh", "positions[row + i] == at + i", "positions[row + i] > at"),
    (BERT, "attention_texts.cuh", "row + i < Shape::rows && ", ""),
    (BERT, "attention_texts.cuh", "stride * (lane_index() + 1)", "stride * lane_index()"),
    (WINDOW, "attention_texts.cuh", "at + Shape::window - 1", "at + Shape::window"),
    (WIDE, "attention_rows.cuh", "token > last_position<Shape>(rows) - Shape::window", "true"),
    (WIDE, "attention_rows.cuh", "token + kPageTokens - 1 <= last_in_sight<Shape>(rows.first, rows.last)", "true"),
    (WIDE, "attention_rows.cuh", "token <= last_in_sight<Shape>(at, rows.last)", "true"),
    (BERT, "attention_ring.cuh", "stretch.last += rows.behind", "stretch.last += 0"),
    (BERT, "attention_ring.cuh", "if (stretch.end == n) ", ""),
]


@pytest.mark.parametrize(("model", "header", "old", "new"), MISTAKES)
def test_no_mistake_passes(model: Model, header: str, old: str, new: str) -> None:
    assert is_noticed(whole_case(model, GENERIC if model is WIDE else TARGET), header, old, new)
