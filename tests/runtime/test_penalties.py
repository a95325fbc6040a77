"""Penalties, biases and min-p in the project's own runtime, against Hugging Face's definitions of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llmc
from llmc.runtime import LlmcError
from llmc.runtime.binding import Model
from llmc.runtime.generation import GREEDY, History, How
from tests.runtime import toy_artifact as toy
from tests.runtime.stub_artifact import write_stub
from tests.runtime.toy_cuda import FakeCuda

PROMPT = [(7 * i * i + 3) % toy.POISON for i in range(9)]


@pytest.fixture(scope="module")
def model(toy_so: Path) -> Iterator[Model]:
    with llmc.load(toy_so, threads=1) as model:
        yield model


def scores_of(text: list[int], n_prompt: int, how: How) -> Any:
    """float32 [1, VOCAB]: the toy's logits as Hugging Face's processors change them, whose frequency and presence
    penalties are vLLM's: it has none."""
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as processors

    scores, ids = torch.tensor(toy.oracle(text)[-1:], dtype=torch.float32), torch.tensor([text])
    biases = {(token,): bias for token, bias in how.logit_bias}
    if biases:
        scores = processors.SequenceBiasLogitsProcessor(biases)(ids, scores)
    scores = processors.RepetitionPenaltyLogitsProcessor(how.repetition_penalty)(ids, scores)
    counts = torch.bincount(ids[0, n_prompt:], minlength=toy.VOCAB)[None]
    return scores - how.frequency_penalty * counts - how.presence_penalty * (counts > 0)


@pytest.mark.parametrize(
    "how",
    [
        How(repetition_penalty=1.5),
        How(repetition_penalty=0.7),
        How(presence_penalty=3.0),
        How(frequency_penalty=1.25),
        How(frequency_penalty=-2.0, logit_bias=((4, 2.5), (11, -30.0))),
        How(0.0, 0, 1.0, 0, 0.0, 1.25, 0.5, 0.75, ((1, 8.0), (2, 7.5), (3, 7.0))),
    ],
)
def test_greedy_tokens_are_those_of_hugging_faces_scores(model: Model, how: How) -> None:
    text = list(PROMPT)
    while len(text) < len(PROMPT) + 15:
        text.append(int(scores_of(text, len(PROMPT), how).argmax()))
    assert list(model.stream(PROMPT, 15, how, ignore_eos=True)) == text[len(PROMPT) :]
    assert text[len(PROMPT) :] != model.tokens(PROMPT, 15, ignore_eos=True)


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(0, 1.0, 0.2), (9, 1.0, 0.5), (0, 0.8, 0.3), (12, 0.6, 0.05)])
def test_what_may_be_drawn_is_what_hugging_faces_warpers_leave(
    model: Model, top_k: int, top_p: float, min_p: float
) -> None:
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as processors

    temperature, biases = 6.0, tuple((token, token / 50) for token in range(toy.VOCAB))  # no two logits are the same
    scores = scores_of(PROMPT, len(PROMPT), How(logit_bias=biases)) / temperature
    warpers = [processors.TopPLogitsWarper(top_p), processors.MinPLogitsWarper(min_p)]
    for warper in ([processors.TopKLogitsWarper(top_k)] if top_k else []) + warpers:
        scores = warper(torch.tensor([PROMPT]), scores)
    kept = set(torch.isfinite(scores[0]).nonzero()[:, 0].tolist())
    with model.sequence() as sequence:
        sequence.feed(PROMPT)
        how = How(temperature, top_k, top_p, 0, min_p, logit_bias=biases)
        drawn = {sequence.sample(replace(how, seed=seed)) for seed in range(1000)}
    assert drawn == kept
    assert 1 < len(kept) < toy.VOCAB


def test_a_continued_sequence_has_its_tokens_from_its_history(model: Model) -> None:
    how, history = How(repetition_penalty=3.0, presence_penalty=2.0), History()
    with model.sequence() as sequence:
        first = list(model.stream(PROMPT, 5, how, ignore_eos=True, sequence=sequence, history=history))
        second = list(model.stream([first[-1], 5], 5, how, ignore_eos=True, sequence=sequence, history=history))
    assert second == list(model.stream([*PROMPT, *first, 5], 5, how, ignore_eos=True))


def test_a_gpu_leaves_the_choice_to_the_host(cuda: FakeCuda, cuda_so: Path, model: Model) -> None:
    how, history = How(presence_penalty=3.0, logit_bias=((4, 2.5),)), History(PROMPT)
    wanted = list(model.stream(PROMPT, 12, how, ignore_eos=True))
    with llmc.load(cuda_so) as gpu:
        assert list(gpu.stream(PROMPT, 12, how, ignore_eos=True)) == wanted
        with gpu.sequence() as one, gpu.sequence() as two:
            gpu.step([(one, PROMPT), (two, PROMPT)])
            for pair in zip(wanted, gpu.tokens(PROMPT, 12, ignore_eos=True), strict=True):
                assert tuple(gpu.advance([(one, how.after(history)), (two, GREEDY)])) == pair
                history.take(pair[0])


def test_tokens_beyond_the_vocabulary_are_refused(model: Model) -> None:
    with model.sequence() as sequence:
        sequence.feed(PROMPT)
        with pytest.raises(LlmcError, match="a vocabulary of"):
            sequence.sample(How(logit_bias=((toy.VOCAB, 1.0),)))
        with pytest.raises(LlmcError, match="a vocabulary of"):
            sequence.sample(How(presence_penalty=1.0).after(History([toy.VOCAB])))


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_p": -0.1},
        {"min_p": float("nan")},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e39},
        {"presence_penalty": float("nan")},
        {"frequency_penalty": float("inf")},
        {"logit_bias": ((1, 1e300),)},
    ],
)
def test_settings_that_are_none_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(LlmcError, match=" is "):
        How(**wrong)


def test_an_older_artifact_says_that_it_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with llmc.load(write_stub(tmp_path / "a.so")) as older:
        monkeypatch.setattr(Model, "info", older.info._replace(sampling_bytes=32))  # up to the allowed tokens
        assert older.tokens([5, 9], 3)
        with pytest.raises(LlmcError, match="cannot heed min-p, penalties or logit biases"):
            older.tokens([5, 9], 3, presence_penalty=1.0)
        with older.sequence() as sequence:
            sequence.feed([5, 9])
            mask = np.full(2, 0xFFFFFFFF, np.uint32)
            assert sequence.sample(GREEDY.among(mask)) == sequence.sample()


def test_a_history_grows() -> None:
    history = History([1, 2])
    for token in range(200):
        history.take(token)
    assert (history.ids.tolist(), history.n_prompt) == ([1, 2, *range(200)], 2)
    history.ask([7])
    assert (history.ids[-1], history.n_prompt) == (7, 203)
