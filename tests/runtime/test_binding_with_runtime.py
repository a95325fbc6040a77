"""The binding over the project's own C runtime, with a toy's kernels and an oracle of its logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llmc
from llmc.runtime import LlmcError
from llmc.runtime.generation import GREEDY, How
from tests.runtime import toy_artifact as toy

PROMPT = [(7 * i * i + 3) % toy.VOCAB for i in range(21)]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.build_artifact(tmp_path_factory.mktemp("toy"))


@pytest.mark.parametrize("threads", [1, 2])
def test_logits_and_tokens_are_the_oracles(artifact: Path, threads: int) -> None:
    text = list(PROMPT)
    while len(text) < toy.CONTEXT:
        text.append(int(np.argmax(toy.oracle(text)[-1])))
    with llmc.load(artifact, threads=threads) as model:
        assert (model.logits(text) == np.array(toy.oracle(text))).all()
        n = toy.CONTEXT - len(PROMPT)
        assert model.tokens(PROMPT, n, ignore_eos=True) == text[len(PROMPT) :]
        assert model.info.n_threads == threads
        assert model.info.kv_tokens_free == model.info.kv_tokens


def test_tokens_are_chosen_among_those_that_are_allowed(artifact: Path) -> None:
    n_words = -(-toy.VOCAB // 32)
    mask = np.random.default_rng(1).integers(0, 1 << 32, n_words, dtype=np.uint32)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[: toy.VOCAB].astype(bool)
    wanted = int(np.where(bits, toy.oracle(PROMPT)[-1], -np.inf).argmax())
    with llmc.load(artifact) as model, model.sequence() as sequence:
        sequence.feed(PROMPT)
        assert sequence.sample(GREEDY.among(mask)) == wanted
        drawn = {model.sample([(sequence, How(99.0, seed=seed, allowed=mask))])[0] for seed in range(50)}
        assert len(drawn) > 5
        assert bits[list(drawn)].all()
        wrong: Any
        for wrong in (mask[:-1], mask.astype(np.int32), np.zeros(2 * n_words, np.uint32)[::2]):
            with pytest.raises(LlmcError, match="the allowed tokens are"):
                sequence.sample(GREEDY.among(wrong))
        assert model.advance([(sequence, GREEDY.among(mask))]) == [wanted]
        assert sequence.length == len(PROMPT) + 1


def test_an_artifact_has_several_models_and_leaves_when_the_last_is_closed(artifact: Path) -> None:
    first, second = llmc.load(artifact), llmc.load(artifact)
    wanted = first.tokens(PROMPT, 5)
    first.close()
    assert second.tokens(PROMPT, 5) == wanted
    second.close()
    assert str(artifact) not in Path("/proc/self/maps").read_text()


def test_a_moved_artifact_goes_on_running(artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "moved.so"
    path.write_bytes(artifact.read_bytes())
    with llmc.load(path) as model:
        wanted = model.tokens(PROMPT, 5)
        path.unlink()
        assert model.tokens(PROMPT, 5) == wanted


def test_failures_of_the_runtime_name_the_artifact_by_its_path(artifact: Path) -> None:
    with llmc.load(artifact, kv_tokens=toy.PAGE_TOKENS) as model, pytest.raises(LlmcError) as refused:
        model.tokens(PROMPT)
    assert refused.value.place == str(artifact)
    assert refused.value.hint


def test_more_than_there_are_numbers_for_is_not_taken_for_less(artifact: Path) -> None:
    for n in ((1 << 64) + 64, 1 << 100):
        with pytest.raises(LlmcError, match="KV cache of 18446744073709551615 tokens"):
            llmc.load(artifact, kv_tokens=n)
    with pytest.raises(LlmcError, match="2147483647 threads"):
        llmc.load(artifact, threads=(1 << 32) + 1)
