"""Products of prompts on Hopper: what is offered beside the rule's own choice, and how long that takes on paper."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmc.compiler.target import Target
from llmc.schedules.cuda.linear import gemm, gemm_prompts, gemm_tiles
from llmc.schedules.cuda.linear.call import LinearOp
from llmc.schedules.cuda.linear.gemm_tiles import DEVICES, Tiling
from tests.schedules.cuda.test_gemm import LAYERS, layer

HOPPER, AMPERE = Target("cuda", "sm_90a"), Target("cuda", "sm_80")
DEVICE = DEVICES[HOPPER.arch]


MEASURED = [json.loads(line) for line in Path(__file__).with_name("measured_prompts.jsonl").read_text().splitlines()]
"""What an H200 took for products alone: the rules' own choices, and the fastest it knows."""


def op_of(record: dict[str, Any]) -> LinearOp:
    weight, _, group = record["weight"].partition("g")
    gated = "Gated" in record["op"]
    n = record["n"] // 2 if gated else record["n"]
    return LinearOp(record["m"], n, record["k"], "bf16", weight, int(group or 0), gated=gated, tiled_x=True)


@pytest.mark.parametrize(("m", "within"), [(128, 0.18), (512, 0.14), (1024, 0.09), (2048, 0.065)])
def test_paper_knows_what_was_measured(m: int, within: float) -> None:
    found = [record for record in MEASURED if record["m"] == m]
    assert len(found) > 15
    for record in found:
        paper_us = gemm_prompts.time_us(op_of(record), Tiling(**record["params"]), DEVICE)
        assert paper_us == pytest.approx(record["us"], rel=within), record


@pytest.mark.parametrize(("m", "within"), [(128, 1.05), (512, 1.04), (1024, 1.02), (2048, 1.03)])
def test_the_rules_own_choice_is_near_the_best_that_was_measured(m: int, within: float) -> None:
    """By its own time where it was measured, else on paper, which is so near."""
    products: dict[LinearOp, dict[Tiling, float]] = {}
    for record in MEASURED:
        if record["m"] == m:
            products.setdefault(op_of(record), {})[Tiling(**record["params"])] = record["us"]
    for op, times in products.items():
        own = gemm.default_params(op, HOPPER)
        own_us = times.get(own) or gemm_prompts.time_us(op, own, DEVICE)
        assert own_us <= within * min(times.values()), (op, own)
        assert own.tokens >= min(128, m)
        assert own.band <= 4


def test_paper_knows_that_blocks_at_different_places_of_a_long_k_have_nothing_in_common() -> None:
    op = layer(2048, 4096, 16384, False)
    rounds = Tiling(256, 4, 132, shared=False, band=4)
    assert gemm_prompts.apart_bytes(op, rounds) == 0
    assert gemm_prompts.apart_bytes(op, replace(rounds, shared=True)) / DEVICE.memory > 250
    assert gemm_prompts.apart_bytes(layer(2048, 12288, 4096, False), replace(rounds, shared=True)) == 0


def test_paper_knows_that_narrow_tiles_are_slow_in_clusters() -> None:
    """128 x 128 tiles of 512 tokens took 35.5 µs in clusters and 26.5 alone, 128 x 192 of 2048 334 µs in clusters."""
    alone = Tiling(128, 6, 128, shared=False, band=4)
    op = layer(512, 4096, 4096, False)
    assert gemm_prompts.time_us(op, alone, DEVICE) < 30.5
    assert gemm_prompts.time_us(op, replace(alone, cluster=2), DEVICE) == pytest.approx(35.5, rel=0.15)
    wide = Tiling(192, 5, 132, shared=False, band=11, cluster=2)
    assert gemm_prompts.time_us(layer(2048, 12288, 4096, False), wide, DEVICE) == pytest.approx(333.8, rel=0.05)


@pytest.mark.parametrize("m", [256, 1000, 2048])
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_all_that_may_be_faster_is_offered_beside_what_was_fastest(m: int, shape: tuple[int, int, bool]) -> None:
    op = layer(m, *shape)
    own, *others = gemm.space(op, HOPPER)
    assert own == gemm.default_params(op, HOPPER)
    assert replace(own, quick=False) in gemm_tiles.space(op, HOPPER)
    assert (own.turns, own.quick) == (0, op.gated)
    assert len(set(others)) == len(others)
    assert any(tiling.quick and not tiling.turns for tiling in others[:4])
    if m == 2048:
        assert others[0].turns == 2
    for tiling in others:
        assert tiling.shared_bytes(op) <= DEVICE.shared_bytes
        assert tiling.turns * tiling.tokens <= 2 * gemm_prompts.SUMS
        assert tiling.blocks % tiling.cluster == 0


def test_fewer_tokens_may_end_quickly_and_elsewhere_there_is_nothing_new() -> None:
    few, many = (layer(m, *LAYERS[0]) for m in (8, 2048))
    for op in (few, many):
        assert gemm.space(op, AMPERE) == gemm_tiles.space(op, AMPERE)
    own, quick, *others = gemm.space(few, HOPPER)
    assert [own, *others] == gemm_tiles.space(few, HOPPER)
    assert quick == replace(own, quick=True)


def test_turns_hide_every_end_but_the_last_on_paper() -> None:
    op = layer(2048, *LAYERS[0])
    together = Tiling(256, 4, 132, shared=False, band=4, quick=True)
    in_turns = Tiling(128, 6, 132, shared=False, band=8, turns=2, quick=True)
    end_us = gemm_prompts.end_us(op, in_turns)
    saved_us = gemm_prompts.time_us(op, together, DEVICE) - gemm_prompts.time_us(op, in_turns, DEVICE)
    assert saved_us == pytest.approx(5 * end_us + 6 * gemm_prompts.DRAIN_US)  # six rounds of 42 µs, or twelve of 21
