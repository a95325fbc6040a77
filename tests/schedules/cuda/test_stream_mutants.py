"""Every barrier, wait and offset of attention of small steps is needed: when one is changed, it is noticed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llmc.schedules.cuda.attention import rule as attention
from tests.schedules.cuda.test_attention import STEP, Row
from tests.schedules.cuda.test_mutants import HOPPER, Case, attention_case, is_noticed, unnoticed

ROWS: list[Row] = [*((0, i) for i in range(40, 65)), *STEP[1:]]
"""A sequence's rows are in two groups of 16."""

BLOCKS, PAIRS, WARPS, INT8 = "four warps a unit", "two warps a unit", "a warp a unit", "int8"
MORE = "32 tokens at a time"
CASES: dict[str, Callable[[], Case]] = {
    BLOCKS: lambda: attention_case(
        ROWS,
        ("attention_stream.cuh", "attention_copies.cuh", "attention_merge.cuh"),
        HOPPER,
        spare=("__syncwarp",),  # before a slot is overwritten: it was read by ldmatrix, which lanes do together
    ),
    PAIRS: lambda: attention_case(ROWS, (), HOPPER, params=attention.Stream(3, 3, 1, team=2)),
    WARPS: lambda: attention_case(ROWS, (), HOPPER, params=attention.Stream(3, 4, 1, team=1)),
    INT8: lambda: attention_case(STEP, (), HOPPER, kv_dtype="int8"),
    MORE: lambda: attention_case(
        ROWS,
        ("attention_stream.cuh", "attention_copies.cuh"),
        HOPPER,
        params=attention.Stream(2, 3, 1, together=2, ahead=1),
        spare=("__syncwarp",),
    ),
}


@pytest.mark.parametrize("name", [BLOCKS, MORE])
def test_no_wait_can_be_left_out(name: str) -> None:
    assert unnoticed(CASES[name]()) == []


OFFSETS = [
    (BLOCKS, "attention_stream.cuh", "* kTokens + matrix / 2 * 8", "* kTokens + matrix % 2 * 8"),
    (BLOCKS, "attention_stream.cuh", "odd[0][i], s[1][i] += odd[1][i];", "odd[0][i];"),
    (BLOCKS, "attention_fresh.cuh", "own + is_value * S::D, place", "own, place"),
    (BLOCKS, "attention_fresh.cuh", "fmaf(pair.x, key.at[2 * i],", "fmaf(pair.x, key.at[0],"),
    (BLOCKS, "attention_merge.cuh", "own_scores[query], 1.f", "own_scores[0], 1.f"),
    (WARPS, "attention_unit.cuh", "* S::teams + team_index<Shape>()", "* S::teams"),
    (
        WARPS,
        "attention_stream.cuh",
        "team_barrier<Shape>();  // queries are there",
        ";",
    ),
    (
        WARPS,
        "attention_stream.cuh",
        "team_barrier<Shape>();  // 16 new keys are there",
        ";",
    ),
    (WARPS, "attention_stream.cuh", "team_barrier<Shape>();  // sums are there", ";"),
    (
        PAIRS,
        "attention_unit.cuh",
        "named_barrier(1 + team_index<Shape>(),",
        "named_barrier(1,",
    ),
    (
        PAIRS,
        "attention_copies.cuh",
        "kTokens * (team_warp<Shape>() + Stream<Shape>::team * i)",
        "kTokens * (team_warp<Shape>() + i)",
    ),
    (MORE, "attention_copies.cuh", "* kChunks + entry % kChunks", "* kChunks"),
    (MORE, "attention_copies.cuh", "kChunks == 1 || i < n_chunks", "true"),
    (MORE, "attention_stream.cuh", "cp_async_wait<Shape::slots - n>", "cp_async_wait<Shape::slots - 1>"),
    (INT8, "attention_fresh.cuh", "(e % 4) & 255) - 128)", "(e % 4) & 255) - 127)"),
    (
        INT8,
        "attention_fresh.cuh",
        "get_query<Shape>(q, query, chunk)",
        "load_16(q + 8 * (chunk * 16 + query))",
    ),
    (INT8, "attention_codes.cuh", "chunk % 4 * 2 + chunk % 2", "chunk % 4 * 2"),
    (
        INT8,
        "attention_codes.cuh",
        "+ 128) << 8 * e",
        "+ 128) << 8 * (3 - e)",
    ),
    (INT8, "attention_codes.cuh", "fmaxf(largest, fabsf(x.at[i]))", "fabsf(x.at[i])"),
    (INT8, "attention_codes.cuh", "pair ? 0x7362 : 0x5140", "pair ? 0x7632 : 0x5410"),
    (
        INT8,
        "attention_codes.cuh",
        "first + i / 2 * 8, 2 * t + i % 2",
        "first + i / 2 * 8, 2 * t + i % 2 * 0",
    ),
    (
        INT8,
        "attention_codes.cuh",
        "chunk / 8 * 4 + chunk % 2 * 2",
        "chunk / 8 * 4 + chunk % 2",
    ),
    (
        INT8,
        "attention_codes.cuh",
        "scaled, scales_of<Shape, kPitch>(values)",
        "scaled, scales_of<Shape, kPitch>(values) + 1",
    ),
]


@pytest.mark.parametrize(("name", "header", "old", "new"), OFFSETS)
def test_no_offset_can_be_another_and_nothing_be_missing(name: str, header: str, old: str, new: str) -> None:
    assert is_noticed(CASES[name](), header, old, new)
