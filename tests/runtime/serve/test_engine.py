"""The engine's turns, on the project's own runtime with a toy's kernels: what is said is what each text says alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.runtime.binding import Model
from llmc.runtime.errors import LlmcError
from llmc.runtime.generation import GREEDY, How
from llmc.runtime.serve.engine import Closing, Full
from llmc.runtime.serve.job import Job
from tests.runtime import toy_artifact as toy
from tests.runtime.serve.served import CONTEXT, DRAWN, PAGE, Served, prompt


def test_texts_that_join_while_others_go_on_say_what_they_say_alone(model: Model) -> None:
    served = Served(model, max_batch=3)
    asked = ((3, GREEDY), (17, DRAWN), (1, GREEDY), (22, GREEDY), (9, DRAWN))
    jobs = [served.job(prompt(n, n), 8, how) for n, how in asked]
    for job in jobs:
        served.submit(job)
        served.turn()
    served.finish(*jobs)
    served.check(*jobs)
    assert served.engine.meters.counts["generated_tokens"] == 5 * 8
    served.leave()


def test_a_long_prompt_lets_others_go_on(model: Model) -> None:
    served = Served(model, chunk=4)
    first, late = served.job(prompt(2), 12), served.job(prompt(24, 1), 2)
    served.submit(first)
    served.turn()
    served.submit(late)
    said = []
    while not late.n_said:
        served.turn()
        said.append(first.n_said)
    assert said == list(range(1, len(said) + 1))
    assert len(said) >= 24 // 4
    served.finish(first, late)
    served.check(first, late)


def test_who_has_to_give_way_goes_on_later_and_says_the_same(toy_so: Path) -> None:
    with llmc.load(toy_so, threads=1, kv_tokens=CONTEXT + 2) as model:  # 8 pages
        served = Served(model)
        jobs = [served.job(prompt(7, salt), 14, how) for salt, how in ((0, GREEDY), (20, DRAWN), (40, GREEDY))]
        served.submit(*jobs)
        served.finish(*jobs)
        served.check(*jobs)
        assert served.engine.meters.counts["preemptions"] > 0
        served.leave()


def test_texts_are_begun_in_the_order_they_came(toy_so: Path) -> None:
    with llmc.load(toy_so, threads=1, kv_tokens=CONTEXT + 2) as model:
        served = Served(model)
        large, larger, small = served.job(prompt(18), 2), served.job(prompt(20, 3), 2), served.job(prompt(2, 9), 2)
        served.submit(large, larger, small)
        served.turn()
        assert (large.sequence is not None, larger.sequence, small.sequence) == (True, None, None)
        assert served.engine.state[:2] == (1, 2)
        served.finish(large, larger, small)
        served.check(large, larger, small)


def test_a_text_ends_where_the_context_or_the_cache_does(toy_so: Path) -> None:
    with llmc.load(toy_so, threads=1, kv_tokens=3 * PAGE) as model:
        served = Served(model)
        job = served.job(prompt(5), 100)
        served.submit(job)
        served.finish(job)
        assert job.finish == "length"
        assert job.n_said == 3 * PAGE - 5 + 1  # the last one needs no room
        served.leave()


def test_prompts_that_begin_alike_share_pages(model: Model) -> None:
    served = Served(model)
    first, second = (served.job((*prompt(11), last), 4) for last in (1, 2))
    served.submit(first)
    while not first.n_said:
        served.turn()
    served.submit(second)
    served.finish(first, second)
    third = served.job((*first.ids[:13], 5), 4)  # a conversation that goes on
    served.submit(third)
    served.finish(third)
    served.check(first, second, third)
    assert [job.n_reused for job in (first, second, third)] == [0, 2 * PAGE, 3 * PAGE]
    served.leave()


def test_prompts_that_begin_alike_are_read_once_even_when_they_come_together(model: Model) -> None:
    served = Served(model, chunk=4)
    jobs = [served.job((*prompt(21), last), 4) for last in (1, 2, 3)]
    served.engine.batch.prompt_chunk = 8
    served.submit(*jobs)
    served.finish(*jobs)
    served.check(*jobs)
    assert [job.n_reused for job in jobs] == [0, 4 * PAGE, 5 * PAGE]
    assert served.engine.meters.counts["reused_tokens"] == 9 * PAGE
    served.leave()


def test_a_text_looks_for_its_prefix_once_unless_others_read_meanwhile(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, looked = Served(model, chunk=4), list[Job]()
    begin = served.engine.batch.pages.begin

    def counted(job: Job, running: Iterable[Job]) -> None:
        looked.append(job)
        begin(job, running)

    monkeypatch.setattr(served.engine.batch.pages, "begin", counted)
    first, late, later = (served.job(prompt(9, salt), 4) for salt in (0, 20, 40))
    served.submit(first)
    served.turn()
    served.submit(late, later)  # one of them waits while the other is read
    served.finish(first, late, later)
    assert [looked.count(job) for job in (first, late, later)] == [1, 1, 2]
    served.check(first, late, later)


def test_ended_texts_are_given_up_when_their_pages_are_needed(toy_so: Path) -> None:
    with llmc.load(toy_so, threads=1, kv_tokens=CONTEXT + 2) as model:
        served = Served(model)
        first, *others = jobs = [served.job(prompt(15, 5 * salt), 3) for salt in range(4)]
        for job in jobs:
            served.submit(job)
            served.finish(job)
        last, again = (served.job(job.ask.prompt, 1) for job in (others[-1], first))
        for job in (last, again):
            served.submit(job)
            served.finish(job)
        assert last.n_reused > 0
        assert again.n_reused == 0
        served.check(*jobs)
        assert served.engine.meters.counts["preemptions"] == 0
        served.leave()


def test_several_texts_of_a_prompt_read_it_once(model: Model) -> None:
    served = Served(model)
    jobs = [served.job(prompt(6), 5, How(1.0, seed=seed)) for seed in (1, 2, 3)]
    jobs[0].followers = jobs[1:]
    served.submit(jobs[0])
    assert served.engine.state.waiting == 3
    served.finish(*jobs)
    served.check(*jobs)
    assert served.engine.meters.counts["prompt_tokens"] == 6
    served.leave()


@pytest.mark.parametrize("kv_tokens", [0, CONTEXT + 2])
def test_probabilities_are_those_of_the_logits(toy_so: Path, kv_tokens: int) -> None:
    with llmc.load(toy_so, threads=1, kv_tokens=kv_tokens) as model:
        served = Served(model)
        other, job, silent = (
            served.job(prompt(9), 6),
            served.scored(prompt(9), 7, 3),
            served.scored(prompt(12, 1), 0, 0),
        )
        served.submit(other, job, silent)
        served.finish(other, job, silent)
        served.leave()
        assert silent.tokens == [] == silent.probs
        for one in (job, silent):
            logits = model.logits(one.ids).astype(np.float64)
            logprobs = logits - np.log(np.exp(logits - logits.max(1)[:, None]).sum(1))[:, None] - logits.max(1)[:, None]
            probs = [*one.prompt_probs, *one.probs]
            assert [prob.token for prob in probs] == one.ids
            assert probs[0].logprob is None
            for row, prob in zip(logprobs, probs[1:], strict=False):
                assert prob.logprob == pytest.approx(row[prob.token])
                assert [top.logprob for top in prob.top] == pytest.approx(sorted(row, reverse=True)[: one.ask.n_top])


def test_cancelled_texts_free_their_pages_before_the_next_step(model: Model) -> None:
    served = Served(model, max_batch=1)
    running, waiting, last = (served.job(prompt(9, salt), 9) for salt in (0, 1, 2))
    waiting.followers = [served.job(prompt(9, 1), 9) for _ in range(2)]
    served.submit(running, waiting, last)
    served.turn()
    served.engine.cancel([running, waiting])
    served.turn()
    assert running.sequence is None
    assert last.sequence is not None
    served.finish(last)
    served.check(last)
    assert served.engine.meters.counts["cancelled"] == 4
    served.leave()


def test_a_full_queue_refuses_and_loses_nobody(model: Model) -> None:
    served = Served(model, max_batch=1, queue=2)
    jobs = [served.job(prompt(3, salt), 3) for salt in range(3)]
    served.submit(*jobs)
    with pytest.raises(Full):
        served.submit(served.job(prompt(2)))
    served.finish(*jobs)
    served.check(*jobs)


def test_who_comes_before_a_turn_takes_a_free_place(model: Model) -> None:
    served = Served(model, max_batch=4, queue=0)
    jobs = [served.job(prompt(2, salt), 2) for salt in range(4)]
    for job in jobs:
        served.submit(job)
    with pytest.raises(Full):
        served.submit(served.job(prompt(2)))
    served.finish(*jobs)
    served.check(*jobs)


def test_room_that_never_comes_is_not_waited_for(toy_so: Path) -> None:
    with llmc.load(toy_so, threads=1, kv_tokens=CONTEXT + 2) as model:
        served, others = Served(model), model.sequence()
        others.feed(prompt(PAGE + 1))
        served.submit(served.job(prompt(CONTEXT)))
        served.turn()
        [said] = served.news
        assert "the KV cache is full" in str(said.error)
        others.close()
        served.leave()


def test_a_text_of_less_than_a_page_keeps_no_other_alive(model: Model) -> None:
    served = Served(model)
    old, new = prompt(PAGE + 1), prompt(PAGE + 1, 1)
    for ids in (old, new, prompt(1)):
        job = served.job(ids, 1)
        served.submit(job)
        served.finish(job)
    pages = served.engine.batch.pages
    assert pages.make_room(pages.n_free + 1)
    again = [served.job(ids, 1) for ids in (old, new)]
    served.submit(*again)
    served.finish(*again)
    assert [job.n_reused for job in again] == [0, PAGE]


def test_a_step_that_fails_ends_those_in_it_and_no_others(model: Model) -> None:
    served = Served(model)
    bad, good = served.job((1, 2, toy.POISON), 3), served.job(prompt(4), 3)
    served.submit(bad)
    served.turn()
    [said] = served.news
    assert said.job is bad
    assert isinstance(said.error, LlmcError)
    assert served.engine.failure is said.error
    served.news.clear()
    served.submit(good)
    served.finish(good)
    served.check(good)
    assert served.engine.failure is None
    served.leave()


def test_a_panic_ends_texts_and_not_the_engine(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        """As pyo3's: no Exception."""

    def panic() -> None:
        raise Panic("out of range")

    served = Served(model)
    with monkeypatch.context() as patch:
        patch.setattr(served.engine.batch, "turn", panic)
        served.submit(served.job(prompt(3)))
        served.turn()
    [said] = served.news
    assert str(said.error) == "out of range"
    served.news.clear()
    good = served.job(prompt(3))
    served.submit(good)
    served.finish(good)
    served.check(good)


def test_a_closed_engine_tells_those_who_wait(model: Model) -> None:
    served = Served(model, max_batch=1)
    jobs = [served.job(prompt(3, salt), 20) for salt in range(2)]
    served.submit(*jobs)
    served.turn()
    served.engine.start()
    served.engine.close()
    ended = {id(said.job): said for said in served.news}
    assert all(job.finish or isinstance(ended[id(job)].error, Closing) for job in jobs)
    with pytest.raises(Closing):
        served.submit(jobs[0])


def test_a_gpu_that_runs_ahead_says_the_same(gpu_model: Model) -> None:
    served = Served(gpu_model)
    asked = ((3, GREEDY), (12, How(1.0, top_k=20, seed=2)), (5, GREEDY))
    jobs = [served.job(prompt(n, n), 3 + n, how) for n, how in asked]
    served.submit(*jobs[:2])
    for _ in range(6):
        served.turn()
    served.submit(jobs[2])
    served.finish(*jobs)
    served.check(*jobs)
    served.leave()


PENALIZED = How(repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=0.5, logit_bias=((5, 3.0),))


@pytest.mark.parametrize("kv_tokens", [0, CONTEXT + 2])
def test_penalties_see_a_text_as_it_is_alone(toy_so: Path, kv_tokens: int) -> None:
    """Whatever was read again after it gave its pages up, was read by others before, or forked from another."""
    with llmc.load(toy_so, threads=1, kv_tokens=kv_tokens) as model:
        served = Served(model)
        drawn = [replace(PENALIZED, temperature=5.0, seed=seed, min_p=0.1) for seed in (1, 2)]
        jobs = [served.job(prompt(9), 9, how) for how in (PENALIZED, *drawn)]
        jobs[0].followers = jobs[1:]
        later = served.job(prompt(9), 12, replace(PENALIZED, repetition_penalty=0.5))
        served.submit(jobs[0], served.job(prompt(6, 20), 10))
        served.turn()
        served.submit(later)
        served.finish(*jobs, later)
        assert (served.engine.meters.counts["preemptions"] > 0) == bool(kv_tokens)
        assert later.n_reused > 0 or kv_tokens
        served.check(*jobs, later)
        served.leave()


def test_beside_penalties_a_gpu_does_not_run_ahead(gpu_model: Model) -> None:
    served = Served(gpu_model)
    asked = ((5, 9, PENALIZED), (12, 15, How(1.0, top_k=20, seed=2)), (3, 4, GREEDY))
    jobs = [served.job(prompt(n, n), n_tokens, how) for n, n_tokens, how in asked]
    served.submit(*jobs)
    served.finish(*jobs)
    served.check(*jobs)
    served.leave()


def test_a_gpu_that_fails_fails_every_text_and_is_not_healthy(gpu_model: Model) -> None:
    served = Served(gpu_model)
    jobs = [served.job(prompt(12, 12), 15, DRAWN), served.job(prompt(3), 20)]  # the first draws the poisonous token
    served.submit(*jobs)
    while len(served.news) < 2:
        served.turn()
    assert {said.job for said in served.news} == set(jobs)
    assert all(isinstance(said.error, LlmcError) for said in served.news)
    assert isinstance(served.engine.failure, LlmcError)
    assert not served.engine.batch.running
