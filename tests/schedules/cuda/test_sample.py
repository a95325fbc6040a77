"""Choosing and drawing tokens on a GPU, emulated, against runtime/src/sample.c."""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from llmc.compiler.kernel import Implementation
from llmc.compiler.sampling import choose_call, draw_call
from llmc.compiler.target import Target
from llmc.runtime.capi import Sampling
from llmc.schedules.cuda import sample
from tests.emulator.emulate import EmulatedExecutable
from tests.runtime import toy_artifact as toy
from tests.schedules.cuda.test_mutants import Case, is_noticed

Array = np.ndarray[Any, Any]
HOPPER, AMPERE = Target("cuda", "sm_90a"), Target("cuda", "sm_80")
DRAW = np.dtype("<u8,<i4,<i4,<f4,<f4,<i4,<u4")
Reference = Callable[[Array, tuple[float, int, float, int], int], int]

HOST = """
#include "runtime.h"
__attribute__((visibility("default")))
int32_t reference(float *logits, int32_t n_vocab, const llmc_sampling *how, uint32_t position, candidate *candidates)
{
    static llmc_model model;
    llmc_sequence sequence = {.model = &model, .length = position, .has_logits = 1, .logits = logits};
    int32_t token = -1;
    model.plans.header.n_vocab = (uint32_t)n_vocab;
    model.candidates = candidates;
    model.device = &cpu_device;
    sample(&sequence, how, &token);
    return token;
}
"""


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The runtime's own choice on the host."""
    folder = tmp_path_factory.mktemp("sample")
    (folder / "reference.c").write_text(HOST)
    sources = [*toy.toy_sources(folder), folder / "reference.c"]
    library = c.CDLL(str(toy.compile_c(folder / "reference.so", sources, "-O2", "-shared")))

    def choose(logits: Array, how: tuple[float, int, float, int], position: int) -> int:
        row, memory = np.ascontiguousarray(logits, np.float32), np.zeros(2 * len(logits), np.float32)
        sampling = Sampling(c.sizeof(Sampling), *how)
        arguments = (c.c_void_p(row.ctypes.data), len(row), c.byref(sampling), position, c.c_void_p(memory.ctypes.data))
        return int(library.reference(*arguments))

    return choose


def choose(logits: Array, target: Target = HOPPER, *, checked: bool = True) -> list[int]:
    """By clusters of blocks on Hopper, by a block a row on Ampere."""
    call = choose_call(*logits.shape)
    implementation = sample.implement_choose(call, logits.shape[1], target)
    return agreed(EmulatedExecutable(call, implementation, target, checked=checked).run(logits))


def agreed(places: Sequence[Array]) -> list[int]:
    """What was written to chosen, next and told."""
    chosen, following, told = ([int(token) for token in place] for place in places)
    assert chosen == told
    assert following == [max(token, 0) for token in chosen]
    return chosen


def draw(logits: Array, draws: list[tuple[int, int, tuple[float, int, float, int]]]) -> list[int]:
    """draws: row, position, (temperature, top_k, top_p, seed)."""
    records = [(seed, row, position, t, p, k, 0) for row, position, (t, k, p, seed) in draws]
    call = draw_call(len(draws), *logits.shape)
    executable = EmulatedExecutable(call, sample.implement_draw(call, logits.shape[1], HOPPER), HOPPER)
    return agreed(executable.run(logits, np.array(records, DRAW).view(np.uint8).reshape(len(draws), -1)))


def random_logits(n_rows: int, n_vocab: int, scale: float = 3) -> Array:
    return (scale * np.random.default_rng(n_vocab).standard_normal((n_rows, n_vocab))).astype(np.float32)


TARGETS = pytest.mark.parametrize("target", [HOPPER, AMPERE], ids=str)


@TARGETS
@pytest.mark.parametrize("n_vocab", [1, 7, 1000, 4099, 32000, 68004])
def test_the_most_likely_token_is_chosen(n_vocab: int, target: Target) -> None:
    logits = random_logits(3, n_vocab)
    assert choose(logits, target, checked=n_vocab < 30000) == logits.argmax(1).tolist()


@TARGETS
@pytest.mark.parametrize("n_more", [0, 1])
def test_ties_take_the_lowest_token_and_what_is_no_number_is_never_chosen(n_more: int, target: Target) -> None:
    """n_more: columns that make their number one of whole fours."""
    inf, nan = np.inf, np.nan
    logits = np.array(
        [
            [nan, 1, 2, 2, 2, 0, nan],
            [nan, nan, nan, nan, nan, nan, nan],
            [-inf, -inf, nan, -inf, -inf, -inf, -inf],
            [-1, inf, nan, inf, 3, 4, 5],
            [-1, -0.0, 0.0, -0.0, -3, -4, -5],
        ],
        np.float32,
    )
    logits = np.pad(logits, ((0, 0), (0, n_more)), constant_values=nan)
    assert choose(logits, target) == [2, -1, 0, 1, 1]
    assert draw(logits, [(row, 1, (1.0, 0, 1.0, 9)) for row in (1, 3)]) == [-1, 1]


@TARGETS
@pytest.mark.parametrize("places", [(8, 4104), (4104, 8200), (4105, 4106), (4099, 4100), (3, 8199)], ids=str)
def test_the_first_of_the_largest_is_chosen_whoever_finds_it(places: tuple[int, int], target: Target) -> None:
    """One thread in two turns, in one four, or two threads, of a warp, of two, or of two blocks."""
    logits = np.minimum(random_logits(1, 8204), 9)
    logits[0, list(places)] = 9.5
    assert choose(logits, target, checked=False) == [places[0]]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    mbarrier_wait(&found.all, 0);", ""),
        ("    cluster_wait();", ""),
        ("&found.all, sizeof found.ranks", "&found.all, sizeof found.ranks - 16"),
        ("found.put(thread / 32, best)", "found.put(warp, best)"),
        ("rank * CHOOSER_THREADS + threadIdx.x", "threadIdx.x"),
        ("make_float4(high, low,", "make_float4(low, high,"),
        ("row = blockIdx.x / CHOOSER_BLOCKS", "row = 0"),
        ("    if (rank > 0 || warp > 0) return;", "    if (warp > 0) return;"),
    ],
)
def test_blocks_that_choose_together_need_each_of_their_waits_and_places(old: str, new: str) -> None:
    logits = np.stack([np.arange(4000, dtype=np.float32), np.arange(4000, 0, -1, dtype=np.float32)])
    call = choose_call(*logits.shape)

    def run(implementation: Implementation) -> list[Array]:
        return EmulatedExecutable(call, implementation, HOPPER).run(logits)

    case = Case(sample.implement_choose(call, logits.shape[1], HOPPER), HOPPER, run, (), ())
    assert is_noticed(case, "choose.cuh", old, new)


HOWS = [(1.0, 0, 1.0), (0.7, 40, 1.0), (1.0, 0, 0.9), (1.3, 50, 0.8), (0.5, 3, 0.5), (2.0, 5000, 0.999), (1.0, 1, 1.0)]


@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize("n_vocab", [61, 4099])
def test_draws_are_those_of_the_cpu(reference: Reference, how: tuple[float, int, float], n_vocab: int) -> None:
    """Equal but where a draw falls within rounding of a border: for none of these seeds."""
    logits = random_logits(2, n_vocab)
    draws = [(seed % 2, 10 + seed, (*how, 1000 + seed)) for seed in range(6)]
    wanted = [reference(logits[row], settings, position) for row, position, settings in draws]
    assert draw(logits, draws) == wanted


def test_ties_at_the_border_keep_the_lower_tokens(reference: Reference) -> None:
    logits = np.repeat(np.array([[3.0, 1.0, 2.0]], np.float32), 40, axis=1).reshape(1, 120)
    draws = [(0, seed, (1.0, 15, p, seed)) for seed in range(8) for p in (1.0, 0.5)]
    wanted = [reference(logits[0], settings, position) for _, position, settings in draws]
    assert draw(logits, draws) == wanted
    assert max(wanted) < 45


def test_what_is_no_number_does_not_count_for_top_k(reference: Reference) -> None:
    logits = random_logits(1, 61)
    logits[0, ::2] = np.nan
    draws = [(0, k, (1.0, k, 1.0, k)) for k in (29, 30, 31, 61)]
    assert draw(logits, draws) == [reference(logits[0], settings, position) for _, position, settings in draws]


def test_rows_that_pad_are_left_alone() -> None:
    assert draw(random_logits(1, 61), [(-1, 0, (1.0, 0, 1.0, 0)), (0, 0, (1e-30, 0, 1.0, 0))])[0] == -1
