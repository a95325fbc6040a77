"""Texts that follow a grammar, on the stub model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.runtime.binding import Model
from llmc.runtime.errors import LlmcError
from llmc.runtime.generation import How
from llmc.runtime.grammar import Grammar, in_one_line
from tests.runtime.stub_artifact import EOS, characters_json, write_stub

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["yes", "no"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
PROMPT = [5, 9]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with llmc.load(write_stub(tmp_path_factory.mktemp("a") / "a.so", tokenizer=characters_json())) as model:
        yield model


def said(model: Model, grammar: Grammar, seed: int = 0) -> str:
    return "".join(model.generate(PROMPT, 46, temperature=float(seed > 0), seed=seed, grammar=grammar))


@pytest.mark.parametrize("seed", range(4))
def test_a_text_is_what_its_schema_says(model: Model, seed: int) -> None:
    value = json.loads(said(model, Grammar.of_schema(SCHEMA), seed))
    assert value.keys() == {"a", "b"}
    assert 0 <= value["a"] <= 99
    assert value["b"] in ("yes", "no")


@pytest.mark.parametrize(
    ("grammar", "texts"),
    [
        (Grammar.of_choice(["left", "right"]), {"left", "right"}),
        (Grammar.of_regex("ab{2,3}"), {"abb", "abbb"}),
        (Grammar.of_rules('root ::= "x" [yz]'), {"xy", "xz"}),
    ],
)
def test_other_grammars_are_followed_too(model: Model, grammar: Grammar, texts: set[str]) -> None:
    assert {said(model, grammar, seed) for seed in range(6)} <= texts


def test_what_is_foreseen_is_what_is_allowed_one_token_after_the_other(model: Model) -> None:
    one, other = (model.guide.constraint(Grammar.of_schema(SCHEMA)) for _ in range(2))
    text = model.encode('{"a":7,"b":"no"}')
    for place in range(len(text)):
        forced = one.forced(4)
        assert forced == text[place : place + len(forced)]  # `no` is forced behind its n
        guesses, allowed = one.foresee([*text[place : place + 3], *[0] * 3])
        assert guesses == text[place : place + 3]
        ahead = other.copy()
        for guess, mask in zip(guesses, allowed, strict=True):
            assert (ahead.allowed() == mask).all()
            ahead.take(guess)
        assert (one.allowed() == other.allowed()).all()
        one.take(text[place])
        other.take(text[place])
    assert one.is_over
    assert len(text) == 16


def test_the_text_of_the_last_token_is_no_end_tokens(model: Model) -> None:
    grammar = Grammar.of_choice(["left", "right"])
    generation = model.stream(PROMPT, 46, constraint=model.guide.constraint(grammar))
    tokens = list(generation)
    assert (generation.stop, EOS in tokens) == ("grammar", False)
    assert model.decode(tokens) == said(model, grammar)


def test_a_text_that_may_end_ends_with_an_end_token(model: Model) -> None:
    constraint = model.guide.constraint(Grammar.of_regex("a+"))
    a, b = model.encode("ab")
    constraint.take(a)
    assert constraint.allowed()[0] >> EOS & 1
    assert not constraint.is_over
    other = constraint.copy()
    constraint.take(EOS)
    assert (constraint.is_over, other.is_over) == (True, False)
    other.take(b)
    with pytest.raises(LlmcError, match="the grammar gave up"):
        other.allowed()


@pytest.mark.parametrize(
    ("text", "is_followed"),
    [
        ('{"a":1,"b":"no"}', True),
        ('{ "a": 1,\n  "b": "no" }', True),
        ("{\n" + " " * 40, True),
        ("{\n" + " " * 41, False),
        ("{  ", False),
    ],
)
def test_json_may_be_indented_but_not_blank_for_ever(tmp_path: Path, text: str, is_followed: bool) -> None:
    tokenizer = characters_json().replace('"K"', '"Ġ"').replace('"L"', '"Ċ"')
    with llmc.load(write_stub(tmp_path / "b.so", tokenizer=tokenizer)) as model:
        constraint = model.guide.constraint(Grammar.of_schema(SCHEMA))
        for n, token in enumerate(model.encode(text)):
            if not constraint.allowed()[token // 32] >> token % 32 & 1:
                assert (n, is_followed) == (len(text) - 1, False)
                return
            constraint.take(token)
        assert is_followed


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar.of_schema({"type": "strin"}),
        Grammar.of_schema({"not": {"type": "string"}}),
        Grammar.of_schema({"$defs": {"x": {"$ref": "#/$defs/x"}}, "$ref": "#/$defs/x"}),
        Grammar.of_regex("a("),
        Grammar.of_rules("root ::= nobody"),
        Grammar.of_regex("é"),
    ],
)
def test_what_is_no_grammar_is_refused_in_a_line(model: Model, grammar: Grammar) -> None:
    with pytest.raises(LlmcError, match=r"^the grammar cannot be used: ") as error:
        said(model, grammar)
    assert "\n" not in error.value.fact


def test_where_llguidance_was_is_nobodys_business() -> None:
    assert in_one_line("panic: too many\n<backtrace>\n0: <unknown>") == "panic: too many"


def test_llguidance_is_needed_for_grammars_alone(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with llmc.load(write_stub(tmp_path / "b.so")) as other:
        assert other.tokens(PROMPT, 3)
        with pytest.raises(ModuleNotFoundError, match="llguidance"):
            other.guide  # noqa: B018


def test_an_older_artifact_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with llmc.load(write_stub(tmp_path / "b.so")) as older:
        monkeypatch.setattr(Model, "info", older.info._replace(sampling_bytes=0))
        with pytest.raises(LlmcError, match="cannot choose among some tokens only"):
            said(older, Grammar.of_schema(SCHEMA))
        with older.sequence() as sequence:
            sequence.feed(PROMPT)
            among = How().among(np.full(2, 0xFFFFFFFF, np.uint32))
            with pytest.raises(LlmcError, match="cannot choose among some tokens only"):
                sequence.sample(among)
