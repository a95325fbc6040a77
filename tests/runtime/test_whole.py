"""Models that read a text whole: all of it in one input, of an empty sequence, in one body."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.runtime import LlmcError
from llmc.runtime import format as fmt
from llmc.runtime.binding import Model
from llmc.runtime.plan import unpack_plan
from llmc.runtime.profile import Profile
from tests.runtime import toy_artifact as toy
from tests.runtime.test_c_steps import TEXT

BODIES = (4, 16, 32)


class WholePlan(toy.ToyPlan):
    """The toy's plan, of the format whose texts are read whole; its tokens see what is before them all the same."""

    def __init__(self, bodies: tuple[int, ...] = BODIES) -> None:
        super().__init__(bodies)
        self.header = self.header._replace(n_tokens=toy.VOCAB - 1, is_whole=True)


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("code")
    sources = toy.toy_sources(folder, plan=WholePlan())
    return toy.link_c(folder / "code.so", sources, "-O2", "-shared").read_bytes()


def written(folder: Path, code: bytes, plan: bytes) -> Path:
    (folder / "whole.so").write_bytes(toy.pack_sections(toy.toy_sections(code, plan=plan)))
    return folder / "whole.so"


@pytest.fixture
def model(tmp_path: Path, code: bytes) -> Iterator[Model]:
    with llmc.load(written(tmp_path, code, WholePlan().pack())) as model:
        yield model
        assert model.info.kv_tokens_free == model.info.kv_tokens


def test_texts_share_a_step_and_none_is_cut(model: Model) -> None:
    assert (model.is_whole, model.info.n_tokens, model.info.n_vocab) == (True, toy.VOCAB - 1, toy.VOCAB)
    texts = [TEXT[:n] for n in (3, 11, 30, 1, 16, 15, 2)]
    with model.profile() as profile:
        sequences = [model.sequence() for _ in texts]
        model.step(list(zip(sequences, texts, strict=True)))
    for sequence, text in zip(sequences, texts, strict=True):
        assert sequence.logits().tolist() == toy.oracle(text)[-1]
        sequence.close()
    assert bodies(profile) == [16, 32, 32, 4], "3 + 11, 30 + 1, 16 + 15, 2 tokens"


def bodies(profile: Profile) -> list[int]:
    """Rows of the bodies that ran, by their first call."""
    events = profile.steps[0].events
    firsts = {first: rows for kind, rows, first, _ in WholePlan().plans if kind == 0}
    calls = [int(call) for call, task in zip(events["call"], events["task"], strict=True) if task == 0]
    return [firsts[call] for call in calls if call in firsts]


def test_a_sequence_that_has_tokens_takes_no_more(model: Model) -> None:
    with model.sequence() as sequence, model.sequence() as other:
        sequence.feed(TEXT[:5])
        fact = "the model reads a text whole, and input 1 of the step is to go on after 5 tokens"
        with pytest.raises(LlmcError, match=fact) as error:
            model.step([(other, TEXT[:2]), (sequence, TEXT[5:6])])
        assert error.value.hint == "give each text in one input, to a sequence of its own"
        assert (sequence.length, other.length) == (5, 0)
        assert sequence.logits().tolist() == toy.oracle(TEXT[:5])[-1]
        sequence.truncate(0)
        assert sequence.feed_for_logits(TEXT).tolist() == toy.oracle(TEXT)


def test_no_token_is_chosen_and_none_is_beyond_those_that_there_are(model: Model) -> None:
    with model.sequence() as sequence:
        sequence.feed(TEXT[:5])
        with pytest.raises(LlmcError, match="reads texts whole, and chooses no tokens"):
            sequence.sample()
        sequence.truncate(0)
        with pytest.raises(LlmcError, match=f"token {toy.VOCAB - 1} is out of range"):
            sequence.feed([toy.VOCAB - 1])
        with pytest.raises(LlmcError, match=f"the vocabulary has {toy.VOCAB - 1}"):
            model.run_step([(sequence, np.array([toy.VOCAB - 1], np.int32), None)])


def test_nothing_of_a_text_is_kept_in_a_file(model: Model, tmp_path: Path) -> None:
    with model.sequence() as sequence:
        sequence.feed(TEXT[:5])
        for call in (sequence.save, model.restore):
            with pytest.raises(LlmcError, match="the model reads texts whole, and keeps nothing of them to save"):
                call(tmp_path / "text.seq")
    assert not (tmp_path / "text.seq").exists()


def test_an_artifact_that_reads_texts_whole_says_so_in_its_version() -> None:
    plan = WholePlan().pack()
    assert plan[4] == fmt.FORMAT_WHOLE
    assert unpack_plan(plan, len(toy.weights_section()), "x").header.n_tokens == toy.VOCAB - 1
    assert fmt.unpack_plan_header(toy.ToyPlan().pack()).n_tokens == 0


@pytest.mark.parametrize("n_bytes", [120, 124, 127])
def test_a_header_that_is_cut_off_is_refused(tmp_path: Path, code: bytes, n_bytes: int) -> None:
    refuse(written(tmp_path, code, WholePlan().pack()[:n_bytes]), WholePlan().pack()[:n_bytes])


@pytest.mark.parametrize("n_tokens", [0, 2**31])
def test_hostile_numbers_are_refused(tmp_path: Path, code: bytes, n_tokens: int) -> None:
    plan = bytearray(WholePlan().pack())
    plan[120:124] = n_tokens.to_bytes(4, "little")
    refuse(written(tmp_path, code, bytes(plan)), bytes(plan))


def test_a_text_that_fits_no_step_is_refused(tmp_path: Path) -> None:
    plan = WholePlan((4, 16))
    sources = toy.toy_sources(tmp_path, plan=plan)
    code = toy.link_c(tmp_path / "code.so", sources, "-O2", "-shared").read_bytes()
    with pytest.raises(LlmcError, match="a text of 30 tokens does not fit the largest step, of 16"):
        llmc.load(written(tmp_path, code, plan.pack()))


def refuse(path: Path, plan: bytes) -> None:
    """By the runtime, and by what reads a plan in Python."""
    with pytest.raises(LlmcError, match="the plan"):
        llmc.load(path)
    with pytest.raises(LlmcError, match="the plan section is not valid"):
        unpack_plan(plan, len(toy.weights_section()), "x")
