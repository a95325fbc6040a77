"""What keeps warpgroups that take tiles in turns, and quick ends, from mixing things up is all needed."""

from __future__ import annotations

import pytest

from llmc.schedules.cuda.linear.gemm_tiles import Tiling
from tests.schedules.cuda.test_mutants import Case, is_noticed, linear_case, unnoticed


def case() -> Case:
    """Two token tiles of 72, which 32 does not divide, so each block writes beside what the other one does."""
    return linear_case(
        "LinearBiasResidual",
        (130, 260, 200),
        ("gemm_tile.cuh", "gemm_turns.cuh"),
        params=Tiling(72, 3, 2, shared=False, band=2, turns=2, quick=True),
        spare=("kTurnBarrier + turn % 2",),  # the last turn is taken for tidiness
        tiled_x=True,
    )


def test_no_barrier_of_an_end_and_of_a_turn_can_be_left_out() -> None:
    assert unnoticed(case()) == []


@pytest.mark.parametrize(
    ("header", "old", "new"),
    [
        ("gemm_wgmma.cuh", "stage / kStages & 1;", "0;"),
        ("gemm_wgmma.cuh", "own * (kTileBytes / 16)", "0"),
        ("gemm_wgmma.cuh", "4 * Tiling::kReaders * Tiling::kCluster", "8"),
        ("gemm_turns.cuh", "turn++ % 2 == group", "turn++ % 2 == 0"),
        ("gemm_quick_end.cuh", "first + 2 * kStagedTokens", "first + 3 * kStagedTokens"),
        ("gemm_quick_end.cuh", "min(L::kM, first_token + Tiling::kTokens)", "L::kM"),
        ("gemm_quick_end.cuh", "from[i * kStep * kStagedRow<L> + j]", "from[i * kStep + j]"),
    ],
)
def test_no_offset_can_be_another(header: str, old: str, new: str) -> None:
    assert is_noticed(case(), header, old, new)
