"""compiler/memory.py"""

import random

import pytest

from llmc.compiler.memory import ALIGNMENT, Buffer, aligned, lay_out


def buffers(seed: int) -> list[Buffer]:
    rng = random.Random(seed)
    made = []
    for index in range(rng.randint(1, 60)):
        first = rng.randint(0, 40)
        made.append(Buffer(f"b{index}", rng.randint(1, 5000), first, first + rng.randint(0, 12)))
    return made


@pytest.mark.parametrize("seed", range(20))
def test_buffers_alive_together_do_not_overlap(seed: int) -> None:
    made = buffers(seed)
    offsets, end = lay_out(made, start=128)
    for index, a in enumerate(made):
        assert offsets[a.name] >= 128
        assert offsets[a.name] % ALIGNMENT == 0
        assert offsets[a.name] + a.n_bytes <= end
        for b in made[index + 1 :]:
            alive_together = a.first <= b.last and b.first <= a.last
            apart = offsets[a.name] + a.n_bytes <= offsets[b.name] or offsets[b.name] + b.n_bytes <= offsets[a.name]
            assert apart or not alive_together


@pytest.mark.parametrize("seed", range(20))
def test_arena_is_close_to_the_most_that_is_alive_at_once(seed: int) -> None:
    made = buffers(seed)
    alive = max(sum(aligned(b.n_bytes) for b in made if b.first <= step <= b.last) for step in range(60))
    _, end = lay_out(made)
    assert alive <= end <= 1.5 * alive


def test_buffers_that_never_live_together_share_memory() -> None:
    offsets, end = lay_out([Buffer("a", 64, 0, 1), Buffer("b", 64, 1, 2), Buffer("c", 64, 2, 3)])
    assert offsets["a"] == offsets["c"] != offsets["b"]
    assert end == 128


def test_no_buffers_need_no_memory() -> None:
    assert lay_out([], start=192) == ({}, 192)
