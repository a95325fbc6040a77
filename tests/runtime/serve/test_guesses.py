"""Guesses in a server's steps: what is said is what each text says alone, in fewer steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.runtime import LlmcError
from llmc.runtime.binding import Model
from llmc.runtime.generation import GREEDY, How
from llmc.runtime.serve.job import Job, Thinking
from llmc.runtime.speculate import TextGuesses
from tests.runtime.serve.served import CONTEXT, DRAWN, Served, prompt


class Oracle:
    """Guesses right, but for every so manieth token of the text."""

    def __init__(self, text: Sequence[int], wrong: int) -> None:
        self.text, self.wrong = text, wrong

    def guess(self, text: Sequence[int], how: How, most: int) -> list[int]:
        places = range(len(text), min(len(text) + most, len(self.text)))
        return [3 if i % self.wrong == 0 else self.text[i] for i in places]

    def close(self) -> None: ...


def foreseen(served: Served, job: Job, wrong: int) -> Job:
    """With guesses at what it says alone."""
    ask = job.ask
    said = served.model.stream(ask.prompt, ask.max_tokens, ask.how, ignore_eos=True)
    oracle = Oracle([*ask.prompt, *said, 3, 3, 3], wrong)
    job.guesses = TextGuesses(oracle, served.engine.batch.guesses.most)
    return job


@pytest.mark.parametrize("wrong", [2, 5, 100])
def test_texts_say_what_they_say_alone(model: Model, wrong: int) -> None:
    served = Served(model, max_batch=3, speculate=4)
    asked = ((3, GREEDY), (17, DRAWN), (1, GREEDY), (13, GREEDY), (9, DRAWN))
    jobs = [foreseen(served, served.job(prompt(n, n), 12, how), wrong) for n, how in asked]
    for job in jobs:
        served.submit(job)
        served.turn()
    served.finish(*jobs)
    served.check(*jobs)
    counts = served.engine.meters.counts
    assert counts["generated_tokens"] == 5 * 12
    assert 0 < counts["right_guesses"] <= counts["guessed_tokens"] < 5 * 12 * 4
    if wrong == 100:
        assert counts["right_guesses"] == counts["guessed_tokens"] > 12
    served.leave()


def test_guesses_are_left_out_where_pages_are_few_and_logits_are_looked_at(toy_so: Path) -> None:
    with llmc.load(toy_so, threads=1, kv_tokens=CONTEXT + 2) as model:  # 8 pages
        served = Served(model, speculate=6)
        jobs = [served.job(prompt(7, salt), 14, how) for salt, how in ((0, GREEDY), (20, DRAWN), (40, GREEDY))]
        jobs = [foreseen(served, job, 7) for job in jobs]
        served.submit(*jobs)
        served.finish(*jobs)
        served.check(*jobs)
        served.leave()
        looked_at = foreseen(served, served.scored(prompt(5), 6, 2), 100)
        penalized = foreseen(served, served.job(prompt(5), 6, How(presence_penalty=1.0)), 100)
        before = served.engine.meters.counts["guessed_tokens"]
        served.submit(looked_at, penalized)
        served.finish(looked_at, penalized)
        assert served.engine.meters.counts["guessed_tokens"] == before
        served.leave()


def test_a_text_that_ends_among_guesses_ends_there(model: Model) -> None:
    served = Served(model, speculate=7)
    said = list(model.stream(prompt(4), 12, GREEDY, ignore_eos=True))
    stop = next(i for i, token in enumerate(said) if i > 3 and token not in said[:i])
    job = foreseen(served, served.job(prompt(4), 12), 100)
    job.ask = replace(job.ask, ignore_eos=False)
    served.engine.batch._is_end[said[stop]] = True
    served.submit(job)
    served.finish(job)
    assert job.tokens == said[: stop + 1]
    served.leave()


def test_a_text_is_looked_up_in_itself(model: Model) -> None:
    served = Served(model, speculate=4)
    job = served.job([1, 2, 3, 1, 2, 3, 1, 2], 12)
    served.submit(job)
    served.finish(job)
    served.check(job)
    assert served.engine.meters.counts["guessed_tokens"] > 0
    served.leave()


def test_a_draft_guesses_at_all_texts_and_holds_nothing_behind_them(model: Model, toy_so: Path) -> None:
    with llmc.load(toy_so, threads=1, kv_tokens=4 * CONTEXT) as draft:
        served = Served(model, max_batch=3, speculate=7, draft=draft)
        served.engine.batch.guesses.draft_chunk = 5  # of the longest prompt, which it reads in several turns
        jobs = [served.job(prompt(n, n), 12, how) for n, how in ((3, GREEDY), (17, DRAWN), (5, GREEDY))]
        for job in jobs:
            served.submit(job)
            served.turn()
        served.finish(*jobs)
        counts = served.engine.meters.counts
        assert counts["guessed_tokens"] > 12
        assert counts["right_guesses"] > 0.9 * counts["guessed_tokens"]  # but for those behind a text's end
        gone = served.job(prompt(6, 9), 12)
        served.submit(gone)
        for _ in range(4):
            served.turn()
        assert draft.info.kv_tokens_free < draft.info.kv_tokens
        served.engine.cancel([gone])
        served.turn()
        assert draft.info.kv_tokens_free == draft.info.kv_tokens
        served.check(*jobs)
        served.leave()


def test_a_draft_speaks_the_models_language(model: Model, stub: Path) -> None:
    with llmc.load(stub, threads=1) as draft, pytest.raises(LlmcError, match="in its vocabulary"):
        Served(model, speculate=4, draft=draft)


def test_a_gpu_checks_guesses_instead_of_running_ahead(gpu_model: Model) -> None:
    served = Served(gpu_model, speculate=4)
    job = foreseen(served, served.job(prompt(4), 12), 5)
    served.submit(job)
    served.finish(job)
    served.check(job)
    assert served.engine.meters.counts["right_guesses"] > 3
    served.leave()


@pytest.mark.parametrize(("which", "speculate"), [("model", 4), ("gpu_model", 0)])
def test_a_thought_ends_whatever_is_guessed_or_runs_ahead(
    which: str, speculate: int, request: pytest.FixtureRequest
) -> None:
    served = Served(request.getfixturevalue(which), speculate=speculate)
    job, other = served.job(prompt(4), 12), served.job(prompt(9, 3), 12)
    said = list(served.model.stream(job.ask.prompt, 12, ignore_eos=True))
    closing = next(token for token in range(99) if token not in said)
    ending = np.zeros(-(-served.model.info.n_vocab // 32), np.uint32)
    ending[closing // 32] = 1 << closing % 32
    ask = replace(job.ask, thinking=Thinking(None, closing, True, 5, ending))
    thinking = Job(ask, served.engine.room, None, served.news.append)
    if speculate:
        foreseen(served, thinking, 100)
    served.submit(thinking, other)
    served.finish(thinking, other)
    assert thinking.tokens[:6] == [*said[:5], closing]
    assert thinking.n_thought == 6
    assert len(thinking.tokens) == 12
    served.check(other)
    served.leave()
