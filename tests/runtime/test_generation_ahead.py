"""Generating on a GPU, where the step on a token runs while the caller has it: nothing of that shows but the time."""

from __future__ import annotations

import ctypes as c
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmc
from llmc.bench.steps import step_seconds
from llmc.runtime import LlmcError, capi
from llmc.runtime.binding import Model
from llmc.runtime.generation import How
from llmc.runtime.sequence import Sequence
from tests.runtime import toy_artifact as toy
from tests.runtime.test_c_steps import TEXT
from tests.runtime.toy_cuda import FakeCuda

PROMPT = [3, 5, 9]
ENDS = [3, 5, 9, 11]


@pytest.fixture
def model(cuda: FakeCuda, cuda_so: Path) -> Iterator[Model]:
    with llmc.load(cuda_so) as model:
        assert model.runs_ahead
        yield model
        assert model.info.kv_tokens_free == model.info.kv_tokens, "a sequence was left open"


def greedy(prompt: list[int], n: int) -> list[int]:
    text = list(prompt)
    for _ in range(n):
        logits = toy.oracle(text)[-1]
        text.append(logits.index(max(logits)))
    return text[len(prompt) :]


def ending(most: int) -> tuple[list[int], int]:
    """A prompt whose text ends by itself, and after how many tokens, the end included."""
    for first in range(toy.VOCAB - 1):
        text = greedy([first, 2], most)
        if toy.EOS in text[2:] and toy.POISON not in text:
            return [first, 2], text.index(toy.EOS) + 1
    raise AssertionError("no text ends")


def test_tokens_are_those_of_the_cpu(model: Model, toy_so: Path) -> None:
    n = toy.CONTEXT - len(PROMPT)
    assert model.tokens(PROMPT, n, ignore_eos=True) == greedy(PROMPT, n)
    assert len(model.tokens(PROMPT, 100, ignore_eos=True)) == n + 1  # the last one is known, but has no room
    with llmc.load(toy_so) as other:
        assert not other.runs_ahead
        assert model.tokens(PROMPT, 6) == other.tokens(PROMPT, 6)


def test_a_step_is_made_for_each_token_that_has_a_successor(model: Model, cuda: FakeCuda) -> None:
    """The prompt, and for n tokens n - 1 steps: none is begun for the last of them."""
    cuda.calls()
    model.tokens(PROMPT, 5, ignore_eos=True)
    assert sum(line.startswith("graph") for line in cuda.calls()) == 2 + 4
    model.tokens(PROMPT, 1)
    assert sum(line.startswith("graph") for line in cuda.calls()) == 2


def test_an_end_token_leaves_the_sequence_as_if_no_step_had_begun(model: Model) -> None:
    prompt, n = ending(12)
    with model.sequence() as sequence:
        generation = model.stream(prompt, 20, sequence=sequence)
        tokens = list(generation)
        assert (tokens, generation.stop) == (greedy(prompt, n), "eos")
        assert sequence.length == len(prompt) + n - 1
        sequence.feed([11])
        assert sequence.logits().tolist() == toy.oracle([*prompt, *tokens[:-1], 11])[-1]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_generation_that_is_stopped_leaves_what_was_said_but_its_last_token(model: Model, n: int) -> None:
    with model.sequence() as sequence:
        generation = model.stream(PROMPT, 20, ignore_eos=True, sequence=sequence)
        tokens = [next(generation) for _ in range(n)]
        generation.close()
        assert sequence.length == len(PROMPT) + n - 1
        more = list(model.stream(tokens[-1:], 4, ignore_eos=True, sequence=sequence))
        assert tokens + more == greedy(PROMPT, n + 4)
        assert sequence.length == len(PROMPT) + n + 3
        assert sequence.sample() == more[-1]


def test_ctrl_c_leaves_the_model_usable(model: Model) -> None:
    with model.sequence() as sequence:
        generation = model.stream(PROMPT, 20, ignore_eos=True, sequence=sequence)

        def interrupted(inputs: list[tuple[Sequence, How]]) -> list[int]:
            Model.advance(model, inputs)
            raise KeyboardInterrupt  # as Python does when the call is back

        said = [next(generation)]
        model.advance = interrupted  # type: ignore[method-assign, assignment]
        with pytest.raises(KeyboardInterrupt):
            next(generation)
        del model.advance
        assert sequence.length == len(PROMPT)
        said += model.stream(said, 5, ignore_eos=True, sequence=sequence)
        assert said == greedy(PROMPT, 6)


def test_a_full_cache_is_met_where_the_cpu_meets_it(cuda: FakeCuda, cuda_so: Path, toy_so: Path) -> None:
    """The token whose step has no room is there; the refusal comes with the next one, unless there is room by then."""
    for path in (cuda_so, toy_so):
        with llmc.load(path, kv_tokens=8) as model, model.sequence() as holder, model.sequence() as sequence:
            holder.feed([1])
            generation = model.stream(PROMPT, 9, ignore_eos=True, sequence=sequence)
            with pytest.raises(LlmcError, match="the KV cache is full"):
                list(generation)
            assert (generation.tokens, sequence.length) == (greedy(PROMPT, 2), 4)
            sequence.truncate(0)
            generation = model.stream(PROMPT, 4, ignore_eos=True, sequence=sequence)
            tokens = [next(generation), next(generation)]
            holder.truncate(0)
            assert [*tokens, *generation] == greedy(PROMPT, 4)


def test_a_kernel_that_fails_is_reported_by_the_token_behind(cuda: FakeCuda, cuda_so: Path) -> None:
    cuda.set(kernel="turn_2")
    with llmc.load(cuda_so) as model:
        generation = model.stream(PROMPT, 9, ignore_eos=True)
        assert next(generation) == greedy(PROMPT, 1)[0]
        with pytest.raises(LlmcError, match=r"^a kernel failed on Fake GPU 0"):
            next(generation)


def test_a_model_closed_meanwhile_says_so(cuda: FakeCuda, cuda_so: Path) -> None:
    model = llmc.load(cuda_so)
    sequence = model.sequence()
    generation = model.stream(PROMPT, 20, ignore_eos=True, sequence=sequence)
    next(generation)
    model.close()
    with pytest.raises(LlmcError, match="the model is closed"):
        next(generation)


def test_two_generations_take_turns(model: Model) -> None:
    one, two = (model.stream(prompt, 6, ignore_eos=True) for prompt in (PROMPT, TEXT[4:9]))
    pairs = list(zip(one, two, strict=True))
    assert [list(tokens) for tokens in zip(*pairs, strict=True)] == [greedy(PROMPT, 6), greedy(TEXT[4:9], 6)]


def test_time_between_tokens_counts_where_the_model_works_meanwhile(model: Model, toy_so: Path) -> None:
    def timed(model: Model) -> float:
        generation = model.stream(PROMPT, 3, ignore_eos=True)
        for _ in generation:
            time.sleep(0.05)
        return generation.decode_s

    assert timed(model) > 0.1
    with llmc.load(toy_so) as other:
        assert timed(other) < 0.1


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_benchmarks_time_each_step_once(cuda: FakeCuda, cuda_so: Path, toy_so: Path, kind: str) -> None:
    """As many steps as times, whether the model runs ahead or not; the tokens of the last have been waited for."""
    prompts = [PROMPT, TEXT[4:9], TEXT[2:4]]
    with llmc.load(cuda_so if kind == "gpu" else toy_so) as model:
        sequences = [model.sequence() for _ in prompts]
        model.step(zip(sequences, prompts, strict=True))
        cuda.calls()
        seconds = step_seconds(model, sequences, 4)
        assert len(seconds) == 4
        assert min(seconds) > 0
        assert [sequence.length for sequence in sequences] == [len(prompt) + 4 for prompt in prompts]
        lines = cuda.calls()
        assert sum(line.startswith("graph") for line in lines) == 4 * (kind == "gpu")
        assert [i for i, line in enumerate(lines) if line == "wait"] == [len(lines) - 1] * (kind == "gpu")
        assert [sequence.sample() for sequence in sequences] == [greedy(prompt, 5)[-1] for prompt in prompts]


def test_an_artifact_that_is_older_takes_two_calls(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    has = capi.has
    monkeypatch.setattr(capi, "has", lambda api, name: name != "advance" and has(api, name))
    monkeypatch.setattr(model, "runs_ahead", False)
    assert model.tokens(PROMPT, 6, ignore_eos=True) == greedy(PROMPT, 6)
    with model.sequence() as one, model.sequence() as two:
        model.step([(one, PROMPT), (two, TEXT[4:9])])
        said = [model.advance([(one, How()), (two, How())]) for _ in range(4)]
        assert [list(tokens) for tokens in zip(*said, strict=True)] == [greedy(PROMPT, 4), greedy(TEXT[4:9], 4)]
        assert (one.length, two.length) == (len(PROMPT) + 4, 5 + 4)


def test_the_table_says_whether_it_has_the_function(model: Model) -> None:
    with model.running() as (api, _):
        table = capi.Api.from_buffer_copy(bytes(api))
    assert capi.has(table, "advance")
    table.size = capi.Api.advance.offset
    assert not capi.has(table, "advance")
    assert c.sizeof(capi.AdvanceInput) == c.sizeof(capi.SampleInput)


def test_a_profile_has_the_steps_that_were_made_ahead_of(model: Model) -> None:
    wanted = model.tokens(PROMPT, 4, ignore_eos=True)
    with model.profile() as profile:
        assert model.tokens(PROMPT, 4, ignore_eos=True) == wanted
    assert [(step.phase, step.n_tokens) for step in profile.steps] == [("prefill", 3), *[("decode", 1)] * 3]
    assert [len(step.events) for step in profile.steps] == [1 + 3 * toy.LAYERS + 3] * 4
    assert model.tokens(PROMPT, 4, ignore_eos=True) == wanted
