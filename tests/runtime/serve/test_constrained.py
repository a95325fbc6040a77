"""Texts of which some tokens alone are allowed, among others: on the project's own runtime with a toy's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llmc
from llmc.runtime.binding import Model
from llmc.runtime.generation import GREEDY, How, Mask
from llmc.runtime.serve.job import Ask, Job
from tests.runtime import toy_artifact as toy
from tests.runtime.serve.served import CONTEXT, DRAWN, Served, prompt


class Climb:
    """A constraint that allows only tokens above the last one, and is over at a limit."""

    def __init__(self, limit: int = toy.VOCAB) -> None:
        self.limit, self.last = limit, -1

    def allowed(self) -> Mask:
        tokens = np.arange(32 * -(-toy.VOCAB // 32))
        return np.packbits((tokens > self.last) & (tokens < toy.POISON), bitorder="little").view(np.uint32)

    look = allowed

    def forced(self, most: int) -> list[int]:
        """Nothing is; but guesses may be wrong, as long as they are allowed."""
        return list(range(self.last + 1, min(self.last + 1 + most, toy.POISON)))

    def foresee(self, guesses: Sequence[int]) -> tuple[list[int], Mask]:
        last, places = self.last, []
        for guess in guesses:
            places.append(self.allowed())
            self.last = guess
        self.last = last
        return list(guesses), np.stack(places)

    def take(self, token: int) -> None:
        self.last = token

    @property
    def is_over(self) -> bool:
        return self.last >= self.limit


def climbing(served: Served, n: int, how: How, limit: int) -> Job:
    constraint: Any = Climb(limit)
    return Job(
        Ask(prompt(n, n), 15, how, ignore_eos=True), served.engine.room, None, served.news.append, constraint=constraint
    )


def check_climbs(model: Model, *jobs: Job) -> None:
    for job in jobs:
        constraint: Any = Climb(getattr(job.constraint, "limit", 0))
        stream = model.stream(job.ask.prompt, 15, job.ask.how, ignore_eos=True, constraint=constraint)
        assert job.tokens == list(stream) == sorted(job.tokens)
        assert job.finish == "stop"


@pytest.mark.parametrize("kv_tokens", [0, CONTEXT + 2])
def test_constrained_texts_say_what_they_say_alone(toy_so: Path, kv_tokens: int) -> None:
    with llmc.load(toy_so, threads=1, kv_tokens=kv_tokens) as model:
        served = Served(model)
        jobs = [climbing(served, 9, GREEDY, 20), climbing(served, 4, How(50.0, seed=3), 30)]
        others = [served.job(prompt(7), 12), served.job(prompt(7, 20), 12, DRAWN)]
        served.submit(*jobs, *others)
        served.finish(*jobs, *others)
        served.check(*others)
        check_climbs(model, *jobs)
        served.leave()


def test_a_grammar_that_gives_up_fails_its_own_text(model: Model) -> None:
    served = Served(model)
    broken, other = climbing(served, 5, GREEDY, toy.VOCAB), served.job(prompt(7), 14)
    assert broken.constraint
    broken.constraint.take(toy.POISON - 3)  # two tokens are above it
    served.submit(broken, other)
    while not other.finish:
        served.turn()
    assert [said.job for said in served.news if said.error] == [broken]
    served.check(other)
    served.leave()


def test_a_gpu_that_runs_ahead_waits_for_constrained_texts(gpu_model: Model) -> None:
    served = Served(gpu_model)
    job, other = climbing(served, 9, GREEDY, 20), served.job(prompt(5), 20)
    served.submit(job, other)
    served.finish(job, other)
    served.check(other)
    check_climbs(gpu_model, job)
    served.leave()
