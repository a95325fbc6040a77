"""The binding over the project's own C runtime, with a toy's kernels and an oracle of its logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.runtime import LlmcError
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
