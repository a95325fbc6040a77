"""Prompts that begin alike are read from where they differ, and what a file keeps never changes what is said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import llmc
from llmc.runtime import LlmcError
from llmc.runtime.binding import Model
from llmc.runtime.generation import GREEDY, How
from llmc.runtime.prompt_cache import PromptCache
from llmc.runtime.speculate import Speculation
from tests.runtime import toy_artifact as toy
from tests.runtime.stub_artifact import write_stub
from tests.runtime.test_c_steps import TEXT
from tests.runtime.test_speculate import Oracle, alone


@pytest.fixture
def model(toy_so: Path) -> Iterator[Model]:
    with llmc.load(toy_so, kv_tokens=640) as model:
        yield model
        assert model.info.kv_tokens_free == model.info.kv_tokens, "a page was not given back"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "prompt.seq"


def said(model: Model, prompt: list[int], cache: PromptCache) -> list[int]:
    tokens = list(model.stream(prompt, 4, ignore_eos=True, cache=cache))
    assert tokens == model.tokens(prompt, 4, ignore_eos=True)
    return tokens


def test_a_sequence_knows_its_tokens_and_keeps_a_note(model: Model, file: Path) -> None:
    with model.sequence() as sequence:
        assert (sequence.tokens, sequence.note, sequence.has_logits) == ([], b"", False)
        sequence.feed(TEXT[:5])
        sequence.save(file, b"any \0 bytes")
        assert sequence.note == b""
    with model.restore(file) as sequence:
        assert (sequence.tokens, sequence.note, sequence.has_logits) == (TEXT[:5], b"any \0 bytes", True)
        assert sequence.logits().tolist() == toy.oracle(TEXT[:5])[-1]
        sequence.truncate(4)
        assert not sequence.has_logits


def test_a_prompt_is_read_from_where_it_differs(model: Model, file: Path) -> None:
    """The file follows what has less than three quarters of its tokens in it, and stays as it is for others."""
    prompts = {
        (): (0, 12),
        (3,): (12, 12),  # longer, by little
        (5, 6, 7, 8, 9, 1, 2, 3): (12, 20),
        (5, 6, 7, 9): (15, 20),
    }
    for more, (n_found, n_kept) in prompts.items():
        cache = PromptCache(file)
        said(model, [*TEXT[:12], *more], cache)
        assert cache.n_found == n_found
        with model.restore(file) as sequence:
            assert sequence.length == n_kept
    shorter, other = PromptCache(file), PromptCache(file)
    said(model, TEXT[:9], shorter)  # its last token is read for its logits
    said(model, TEXT[9:15], other)
    assert (shorter.n_found, other.n_found) == (8, 0)
    with model.restore(file) as sequence:
        assert sequence.tokens == TEXT[9:15]


def test_the_same_prompt_is_not_read_at_all(model: Model, file: Path) -> None:
    first = model.tokens(TEXT[:12], 5, ignore_eos=True, prompt_cache=file)
    before = file.stat().st_mtime_ns
    with model.profile() as profile:
        assert model.tokens(TEXT[:12], 5, ignore_eos=True, prompt_cache=file) == first
    assert [step.phase for step in profile.steps] == ["decode"] * 4
    assert file.stat().st_mtime_ns == before
    how = How(0.8, seed=7)
    drawn = {tuple(model.stream(TEXT[:12], 5, how, cache=cache)) for cache in (None, PromptCache(file))}
    assert len(drawn) == 1


def test_guesses_go_on_from_a_file(model: Model, file: Path) -> None:
    text = alone(model, GREEDY, 15)
    for n_found in (0, 5):
        cache = PromptCache(file)
        guesses = Speculation(model, Oracle(text, 4), most=6)
        generation = model.stream(text[:5], 15, ignore_eos=True, speculation=guesses, cache=cache)
        assert list(generation) == text[5:]
        assert (cache.n_found, guesses.n_right > 0) == (n_found, True)


def test_a_file_that_is_not_to_be_written_is_not(model: Model, file: Path) -> None:
    said(model, TEXT[:6], PromptCache(file, read_only=True))
    assert not file.exists()
    said(model, TEXT[:6], PromptCache(file))
    before = file.read_bytes()
    cache = PromptCache(file, read_only=True)
    said(model, [*TEXT[:6], *TEXT[9:22]], cache)
    assert (cache.n_found, file.read_bytes() == before) == (6, True)


def test_nothing_else_is_written_over(model: Model, file: Path) -> None:
    file.write_bytes(b"somebody's notes, which are longer than any header of a file that this one could be " * 9)
    before = file.read_bytes()
    with pytest.raises(LlmcError, match="this is not a saved sequence"):
        model.tokens(TEXT[:6], prompt_cache=file)
    assert file.read_bytes() == before
    with model.sequence() as sequence:
        sequence.feed(TEXT[:5])
        sequence.save(file, b"of a conversation")
    with pytest.raises(LlmcError, match="this file keeps a conversation, and a prompt would take its place"):
        model.tokens(TEXT[:6], prompt_cache=file)
    cache = PromptCache(file, read_only=True)
    said(model, TEXT[:6], cache)
    assert cache.n_found == 5


def test_what_cannot_be_written_is_said_before_or_after_but_not_instead(model: Model, tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match="no file can be made in this folder") as error:
        model.tokens(TEXT[:6], prompt_cache=tmp_path / "none" / "x")
    assert error.value.place == str(tmp_path / "none")
    tokens: list[int] = []
    cache = PromptCache(tmp_path / ("x" * 254))  # no room in a name for what is written beside it
    generation = model.stream(TEXT[:6], 4, ignore_eos=True, cache=cache)
    with pytest.raises(LlmcError, match="the sequence cannot be saved: making a file beside it: File name too long"):
        tokens.extend(generation)
    assert tokens == model.tokens(TEXT[:6], 4, ignore_eos=True)
    with pytest.raises(LlmcError, match="the sequence cannot be saved"):  # also where nothing is to be said
        list(model.stream(TEXT[:6], 0, cache=cache))


def test_paths_that_are_none_are_refused(model: Model) -> None:
    with model.sequence() as sequence:
        for path in ("a\0b", "\udc00\ud800", ""):
            with pytest.raises(LlmcError, match="this is no path"):
                sequence.save(path)
    for path in ("", "a\0/b"):
        with pytest.raises(LlmcError, match="this is no path"):
            model.tokens(TEXT[:6], prompt_cache=path)


def test_another_models_sequence_is_not_continued(model: Model, toy_so: Path) -> None:
    with llmc.load(toy_so) as other, pytest.raises(LlmcError, match="the sequence is another model's"):
        model.stream(TEXT[:6], sequence=other.sequence())


def test_an_artifact_that_is_older_says_so(tmp_path: Path) -> None:
    with llmc.load(write_stub(tmp_path / "stub.so")) as model, model.sequence() as sequence:
        for call in (lambda: sequence.save(tmp_path / "x"), lambda: model.restore(tmp_path / "x")):
            with pytest.raises(LlmcError, match=r"the artifact's runtime cannot (save|restore) a sequence") as error:
                call()
            assert error.value.hint == "compile the model again with this llmc"
        with pytest.raises(LlmcError, match="cannot tell a sequence's tokens"):
            model.tokens([1, 2], prompt_cache=tmp_path / "x")
