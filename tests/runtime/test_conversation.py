"""Conversations with the stub model: each turn is the template's text, of which only what is new is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llmc
from llmc.runtime import LlmcError
from llmc.runtime.binding import Model
from llmc.runtime.conversation import Conversation, Piece
from llmc.runtime.generation import How
from tests.runtime import toy_artifact as toy
from tests.runtime.stub_artifact import EOS, characters_json, write_stub

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}"
    "{% if m.content == 'boo' %}{{ raise_exception('no boo') }}{% endif %}{% endfor %}{{ also }}a"
)
THINKING = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}{{ '<think>' if think }}"


def tokenizer_that_thinks() -> str:
    tokenizer = json.loads(characters_json())
    names = {"H": "<think>", "I": "</think>"}
    tokenizer["model"]["vocab"] = {names.get(word, word): i for word, i in tokenizer["model"]["vocab"].items()}
    ids = tokenizer["model"]["vocab"]
    first = tokenizer["added_tokens"][0]
    tokenizer["added_tokens"] += [{**first, "id": ids[name], "content": name} for name in names.values()]
    return json.dumps(tokenizer)


def chatting(path: Path, template: str = TEMPLATE, **changes: Any) -> Path:
    sections = {"chat": {"template": template, "tokens": {}}, "tokenizer": tokenizer_that_thinks()}
    return write_stub(path, **sections | changes)


def chatting_toy(folder: Path) -> Path:
    """One whose runtime is the project's own."""
    chat = json.dumps({"template": TEMPLATE, "tokens": {}}).encode()
    return toy.build_artifact(folder, "-O0", chat=chat, tokenizer=tokenizer_that_thinks().encode())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with llmc.load(chatting(tmp_path_factory.mktemp("chat") / "stub.so")) as model:
        yield model


def said(pieces: Iterator[Piece]) -> str:
    return "".join(piece.answer for piece in pieces)


def test_a_turn_is_what_the_template_writes_and_reads_what_is_new(model: Model) -> None:
    how = How(logit_bias=((EOS, -99.0),))  # no end
    with Conversation(model, "be", also=".") as talk:
        first = said(talk.ask("hi", 4, how))
        prompt = model.encode("sbeuhi.a", special=False)
        assert first == model.decode(model.tokens(prompt, 4, logit_bias={EOS: -99}), after=prompt)
        second = said(talk.ask("yo", 4, how))
        whole = model.encode(f"sbeuhia{first}</s>uyo.a", special=False)
        assert second == model.decode(model.tokens(whole, 4, logit_bias={EOS: -99}), after=whole)
        assert talk.generation is not None
        assert len(talk.generation.prompt) == len(whole) - len("sbeuhi")  # "." is written at the end alone
        assert [message["role"] for message in talk.messages] == ["system", "user", "assistant", "user", "assistant"]
        talk.begin_anew()
        assert said(talk.ask("hi", 4, how)) == first


def test_an_answer_that_is_cut_short_stays_as_far_as_it_was_said(model: Model) -> None:
    with Conversation(model) as talk:
        pieces = talk.ask("hi", 20, How(logit_bias=((EOS, -99.0),)))
        heard = next(pieces).answer + next(pieces).answer
        pieces.close()  # type: ignore[attr-defined]
        assert talk.messages[-1] == {"role": "assistant", "content": heard}
        talk.messages.pop()
        assert said(talk.answer(20, How(logit_bias=((EOS, -99.0),)))).startswith(heard)


def test_who_asks_again_ends_the_answer_before(model: Model) -> None:
    endless = How(logit_bias=((EOS, -99.0),))
    with Conversation(model) as talk, Conversation(model) as other:
        first = talk.ask("hi", 20, endless)
        heard = next(first).answer
        second = said(talk.ask("yo", 6, endless))
        assert list(first) == []
        assert [message["content"] for message in talk.messages] == ["hi", heard, "yo", second]
        other.messages += [*talk.messages, {"role": "user", "content": "so"}]
        assert said(talk.ask("so", 6, endless)) == said(other.answer(6, endless))


def test_an_answer_that_another_thread_says_is_not_ended(model: Model) -> None:
    talk = Conversation(model)
    refused: list[str] = []

    def ask_meanwhile(*_: object) -> None:
        with pytest.raises(LlmcError) as error:
            talk.ask("yo")
        refused.append(error.value.fact)
        talk.close()

    pieces = talk.ask("hi", 20, How(logit_bias=((EOS, -99.0),)))
    next(pieces)
    assert talk.generation is not None
    talk.generation._why_stop = ask_meanwhile  # type: ignore[assignment, method-assign]
    with pytest.raises(LlmcError, match="the sequence is closed"):
        list(pieces)
    assert refused[0] == "the last answer is still being said, by another thread"


def test_an_answer_outlives_its_model_in_silence(tmp_path: Path) -> None:
    with llmc.load(chatting(tmp_path / "stub.so")) as model:
        pieces = Conversation(model).ask("hi", 20, How(logit_bias=((EOS, -99.0),)))
        next(pieces)
    pieces.close()  # type: ignore[attr-defined]


def test_what_cannot_be_said_leaves_the_conversation_as_it_was(model: Model) -> None:
    with Conversation(model) as talk:
        for message, fact in (("boo", "no boo"), ("x" * 60, "context holds"), ("\ud800", "no valid Unicode")):
            with pytest.raises(LlmcError, match=fact):
                talk.ask(message)
        assert talk.messages == []
        talk.messages.append({"role": "user", "content": "boo"})
        with pytest.raises(LlmcError, match="no boo"):
            talk.answer()
        assert [message["content"] for message in talk.messages] == ["boo"]


def test_thoughts_come_apart_and_templates_leave_them_out(tmp_path: Path) -> None:
    with llmc.load(chatting(tmp_path / "a.so", THINKING)) as model, Conversation(model, think=True) as talk:
        closing = model.tokenizer.get_vocab()["</think>"]
        pieces = list(talk.ask("hi", 24, How(logit_bias=((closing, 2.0), (EOS, -99.0)))))
        thought = "".join(piece.thought for piece in pieces)
        answer = "".join(piece.answer for piece in pieces)
        assert thought
        assert answer
        assert talk.messages[-1] == {"role": "assistant", "content": answer, "reasoning_content": thought}


def test_who_has_no_template_is_told(tmp_path: Path) -> None:
    for changes, fact in (
        ({"chat": None}, "no chat template"),
        ({"tokenizer": None}, "no tokenizer"),
        ({"chat": {"template": "{% if", "tokens": {}}}, "cannot be read"),
    ):
        with llmc.load(chatting(tmp_path / "b.so", **changes)) as model, pytest.raises(LlmcError, match=fact):
            Conversation(model)


TOY_HOW = How(logit_bias=((toy.EOS, -9999.0), (toy.POISON, -9999.0)))


@pytest.fixture(scope="module")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with llmc.load(chatting_toy(tmp_path_factory.mktemp("toy"))) as model:
        yield model


def test_a_conversation_goes_on_from_its_file(toy_model: Model, tmp_path: Path) -> None:
    file = tmp_path / "talk.seq"
    with Conversation(toy_model, "be") as talk:
        said(talk.ask("hi", 4, TOY_HOW))
        pieces = talk.ask("yo", 9, TOY_HOW)
        next(pieces)  # and the rest is not listened to
        talk.save(file)
        third = said(talk.ask("so", 4, TOY_HOW))
    with Conversation(toy_model) as other:
        said(other.ask("else", 2, TOY_HOW))
        other.restore(file)
        assert [message["role"] for message in other.messages] == ["system", *["user", "assistant"] * 2]
        assert said(other.ask("so", 4, TOY_HOW)) == third
        assert other.messages == talk.messages
        assert other.generation is not None
        assert talk.generation is not None
        assert other.generation.prompt == talk.generation.prompt  # no more is read than there
        other.begin_anew()
        assert other.messages == [{"role": "system", "content": "be"}]
        other.save(file)
    with toy_model.restore(file) as sequence:
        assert sequence.tokens == []  # of what was said before nothing is kept


NOTES = (b"", b"{", b"[]", b'{"messages": 7}', b'{"messages": [7]}', b'{"messages": [{"role": "user"}]}', b"\xff")


@pytest.mark.parametrize("note", [*NOTES, b'{"messages": [{"role": 7, "content": ""}]}', b"[" * 9999])
def test_a_file_of_something_else_leaves_the_conversation(toy_model: Model, tmp_path: Path, note: bytes) -> None:
    with toy_model.sequence() as sequence:
        sequence.feed([3, 4])
        sequence.save(tmp_path / "x", note)
    with Conversation(toy_model) as talk:
        first = said(talk.ask("hi", 2, TOY_HOW))
        with pytest.raises(LlmcError, match="this file keeps a text, and no conversation"):
            talk.restore(tmp_path / "x")
        assert [message["content"] for message in talk.messages] == ["hi", first]
        said(talk.ask("yo", 2, TOY_HOW))
    assert toy_model.info.kv_tokens_free == toy_model.info.kv_tokens
