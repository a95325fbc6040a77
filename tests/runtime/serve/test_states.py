"""The engine's turns on a model with states: a slot for each text, and what has ended is taken up as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import llmc
from llmc.runtime.binding import Model
from tests.runtime import toy_states
from tests.runtime.serve.served import Served, prompt


@pytest.fixture(scope="module")
def states_so(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_states.build_artifact(tmp_path_factory.mktemp("states"))


@pytest.fixture
def model(states_so: Path) -> Iterator[Model]:
    with llmc.load(states_so, threads=1, kv_tokens=640, slots=9) as model:
        yield model


def leave(served: Served) -> None:
    served.leave()
    info = served.model.info
    assert info.n_slots_free == info.n_slots


@pytest.mark.parametrize("speculate", [0, 3])
def test_texts_that_join_while_others_go_on_say_what_they_say_alone(model: Model, speculate: int) -> None:
    served = Served(model, max_batch=3, speculate=speculate)
    jobs = [served.job(prompt(n, n), 8) for n in (3, 17, 1, 22, 9)]
    for job in jobs:
        served.submit(job)
        served.turn()
    served.finish(*jobs)
    served.check(*jobs)
    leave(served)


def test_a_conversation_goes_on_where_its_last_turn_ended(model: Model) -> None:
    """But a prompt that has only the beginning of another text is read by itself."""
    served = Served(model, max_batch=2)
    first = served.job(prompt(11), 4)
    served.submit(first)
    served.finish(first)
    goes_on, differs = served.job((*first.ids, 5, 9), 4), served.job((*first.ids[:12], 9), 4)
    served.submit(goes_on, differs)
    served.finish(goes_on, differs)
    assert [job.n_reused for job in (first, goes_on, differs)] == [0, 14, 0]  # all but the last token, which nobody fed
    served.check(first, goes_on, differs)
    leave(served)


def test_a_prompt_that_begins_with_all_of_a_running_text_forks_it(model: Model) -> None:
    served = Served(model, max_batch=2)
    first = served.job(prompt(6), 8)
    served.submit(first)
    while first.n_said < 3:
        served.turn()
    second = served.job((*first.ids, 9, 4), 6)
    served.submit(second)
    served.finish(first, second)
    assert second.n_reused >= 8
    served.check(first, second)
    leave(served)


def test_several_texts_of_a_prompt_go_on_from_its_state(model: Model) -> None:
    served = Served(model)
    jobs = [served.job(prompt(9), 6) for _ in range(3)]
    for job, seed in zip(jobs, (1, 2, 3), strict=True):
        job.ask = replace(job.ask, how=replace(job.ask.how, temperature=1.0, seed=seed))
        job._how = job.ask.how
    leader, *leader.followers = jobs
    served.submit(leader)
    served.finish(*jobs)
    assert [job.n_reused for job in jobs] == [0, 9, 9]
    served.check(*jobs)
    leave(served)


def test_slots_that_are_kept_are_given_up_for_texts_that_come(states_so: Path) -> None:
    with llmc.load(states_so, threads=1, kv_tokens=640, slots=5) as model:
        served = Served(model, max_batch=2)
        assert served.engine.batch.pages.most_kept == 1
        served.engine.batch.pages.most_kept = 5
        jobs = [served.job(prompt(5, salt), 3) for salt in range(8)]
        served.submit(*jobs)
        served.finish(*jobs)
        assert model.info.n_slots_free < 3
        served.check(*jobs)
        leave(served)


def test_who_finds_no_slot_waits(states_so: Path) -> None:
    with llmc.load(states_so, threads=1, kv_tokens=640, slots=2) as model:
        served = Served(model, max_batch=4)
        jobs = [served.job(prompt(5, salt), 6) for salt in range(3)]
        served.submit(*jobs)
        served.turn()
        assert served.engine.state[:2] == (2, 1)
        served.finish(*jobs)
        served.check(*jobs)
        leave(served)


def test_a_text_that_guesses_led_beyond_its_end_is_not_kept(model: Model) -> None:
    served = Served(model, speculate=5)
    repeated = served.job(prompt(3) * 4, 9)
    served.submit(repeated)
    served.finish(repeated)
    for kept in served.engine.batch.pages._kept:
        assert kept.sequence.length == len(kept.ids)
    served.check(repeated)
    leave(served)


def test_a_state_is_kept_over_a_restart_with_its_text(model: Model, tmp_path: Path) -> None:
    served = Served(model, max_batch=2, prompt_cache=str(tmp_path))
    job = served.job(prompt(9), 3)
    served.submit(job)
    served.finish(job)
    served.engine.close()
    served = Served(model, max_batch=2, prompt_cache=str(tmp_path))
    goes_on = served.job((*job.ids, 5), 3)
    served.submit(goes_on)
    served.finish(goes_on)
    assert goes_on.n_reused == 9 + 3 - 1
    served.check(goes_on)
    leave(served)
