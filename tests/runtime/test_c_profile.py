"""llmc_profile: every task of every call, with its times, in the caller's memory."""

from __future__ import annotations

import ctypes as c
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.runtime import LlmcError
from llmc.runtime.artifact import ArtifactFile
from llmc.runtime.binding import Model
from llmc.runtime.capi import Profile as RawProfile
from llmc.runtime.format import PLAN_KINDS
from llmc.runtime.profile import EVENT
from tests.runtime import toy_artifact as toy
from tests.runtime import toy_model
from tests.runtime.stub_artifact import write_stub

PROMPT = [3, 5, 9, 11, 2]


@pytest.fixture(params=[1, 3], ids=lambda n: f"{n} threads")
def model(toy_so: Path, request: pytest.FixtureRequest) -> Iterator[Model]:
    with llmc.load(toy_so, threads=request.param) as model:
        yield model


def test_a_step_has_an_event_for_each_task_of_each_call(model: Model, toy_so: Path) -> None:
    with ArtifactFile.open(toy_so) as file:
        tables = file.plan()
    with model.profile() as profile, model.sequence() as sequence:
        sequence.feed([3])
    (step,) = profile.steps
    plans = [plan for plan in tables.plans if (PLAN_KINDS[plan.kind], plan.n_rows) in (("body", 2), ("head", 1))]
    wanted = [call for plan in plans for call in range(plan.first_call, plan.first_call + plan.n_calls)]
    for run, plan in enumerate(plans, 1):
        for call in range(plan.first_call, plan.first_call + plan.n_calls):
            tasks = step.events["task"][(step.events["call"] == call) & (step.events["run"] == run)]
            assert sorted(tasks.tolist()) == list(range(len(tasks)))
            assert min(tables.calls[call].grid, model.info.n_threads) <= len(tasks) <= tables.calls[call].grid
    assert sorted(set(step.events["call"].tolist())) == wanted


def test_calls_begin_when_all_tasks_of_the_one_before_are_done(model: Model) -> None:
    with model.profile() as profile, model.sequence() as sequence:
        sequence.feed(PROMPT)
    for step in profile.steps:
        keys = list(dict.fromkeys(zip(step.events["run"].tolist(), step.events["call"].tolist(), strict=True)))
        spans = [step.events[(step.events["run"] == run) & (step.events["call"] == call)] for run, call in keys]
        assert all(before["end_ns"].max() <= after["start_ns"].min() for before, after in pairwise(spans))
        assert (step.events["start_ns"] <= step.events["end_ns"]).all()
        assert step.start_ns <= step.events["start_ns"].min()
        assert step.events["end_ns"].max() <= step.end_ns
        assert step.events["thread"].max() < model.info.n_threads


def test_prompts_are_prefill_and_single_tokens_decode(model: Model) -> None:
    with model.profile() as profile:
        model.tokens(PROMPT, 4, ignore_eos=True)
        model.tokens([1], 2, ignore_eos=True)
    assert [(step.phase, step.n_tokens) for step in profile.steps] == [
        ("prefill", 5),
        *[("decode", 1)] * 3,
        ("prefill", 1),
        ("decode", 1),
    ]
    assert [step.mean_context for step in profile.steps] == [3, 6, 7, 8, 1, 2]


def test_a_profile_changes_no_result_and_ends_with_its_block(model: Model) -> None:
    wanted = model.tokens(PROMPT, 6, ignore_eos=True)
    with model.profile() as profile:
        assert model.tokens(PROMPT, 6, ignore_eos=True) == wanted
    n = len(profile.steps)
    assert model.tokens(PROMPT, 6, ignore_eos=True) == wanted
    assert (len(profile.steps), profile.n_lost) == (n, 0)


def test_events_beyond_the_capacity_are_counted_not_written(toy_so: Path) -> None:
    events = np.zeros(8, EVENT)
    profile = RawProfile(c.sizeof(RawProfile), 5, 0, 0, events.ctypes.data)
    with toy_model.Model(toy_so) as model:
        model.check(model.api.profile(model.handle, c.byref(profile)))
        model.sequence([3])
        model.check(model.api.profile(model.handle, None))
    assert profile.n_events == 5
    assert profile.n_lost == len(toy.ToyPlan().body_calls(2)) + len(toy.ToyPlan().head_calls(1)) - 5
    assert (events["end_ns"][:5] > 0).all()
    assert not events["end_ns"][5:].any()


def test_a_profile_that_cannot_be_used_is_refused(toy_so: Path) -> None:
    size = c.sizeof(RawProfile)
    with toy_model.Model(toy_so) as model:
        for profile, said in (
            (RawProfile(4, 5, 0, 0, 0), "llmc_profile.size is 4"),
            (RawProfile(size, 5, 0, 0, 0), "the events are NULL"),
            (RawProfile(size, 5, 6, 0, 64), "there are more events than the capacity"),
        ):
            with pytest.raises(toy_model.Refused, match=said):
                model.check(model.api.profile(model.handle, c.byref(profile)))
        with pytest.raises(toy_model.Refused, match="the model is NULL"):
            model.check(model.api.profile(None, None))


def test_a_runtime_that_cannot_measure_says_so(tmp_path: Path) -> None:
    with llmc.load(write_stub(tmp_path / "a.so")) as model, pytest.raises(LlmcError) as refused, model.profile():
        pass
    assert refused.value.fact == "the artifact's runtime cannot measure its kernels"
