"""Marks that are tokens with a text, as Qwen's <tool_call> is: added, but not special."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llmc.runtime.grammar import Grammar, Guide
from tests.runtime.serve.conftest import Server, serving
from tests.runtime.serve.test_forms import byte_level
from tests.runtime.stub_artifact import characters_json, stub_code, write_stub

MARKS = "<tool_call>", "</tool_call>", "<think>", "</think>"
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("now", "then")]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Of a model that writes calls as Qwen does."""
    tokenizer = json.loads(characters_json())
    vocabulary = tokenizer["model"]["vocab"]
    for letter, mark in zip("HIJK", MARKS, strict=True):
        vocabulary[mark] = vocabulary.pop(letter)
    for letter, mark in zip("LMNO", "Ġ_=Ċ", strict=True):
        vocabulary[mark] = vocabulary.pop(letter)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"] += [{"id": vocabulary[mark], "content": mark, **flags} for mark in MARKS]
    template = "{{ tools and 'u' }}{% if x %}<think></think><tool_call>{% endif %}"
    path = tmp_path_factory.mktemp("qwen") / "a.so"
    write_stub(
        path,
        chat={"template": template, "tokens": {}},
        tokenizer=json.dumps(tokenizer),
        code=stub_code(n_context=320),
    )
    with serving(path) as server:
        yield server


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "then"}}])
def test_a_call_that_has_to_come_ends_in_its_token(qwen: Server, choice: Any) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": TOOLS, "tool_choice": choice, "temperature": 0}
    status, said = qwen.ask("POST", "/v1/chat/completions", {**body, "return_token_ids": True})
    assert status == 200, said
    [answer] = said["choices"]
    [call] = answer["message"]["tool_calls"]
    assert call["function"]["name"] in ("now", "then")
    vocabulary = json.loads(characters_json())["model"]["vocab"]
    assert vocabulary["I"] in answer["token_ids"]


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        (Grammar.of_regex("<think>a</think>"), "<think>a</think>"),
        (Grammar.of_choice(["<think>"]), "<think>"),
        (Grammar.of_schema({"const": {"<think>": "</think>"}}), '{"<think>":"</think>"}'),
        (Grammar.of_lark("start: <[258]> /a/ <[257]>"), "</think>a<think>"),
        (Grammar.of_rules('root ::= "<b>" [a] "<s>"'), "<b>a<s>"),
    ],
)
def test_a_text_may_have_to_have_tags_that_are_tokens(grammar: Grammar, text: str) -> None:
    tokenizer = byte_level(("</s>",))
    tokenizer.add_tokens(["<think>", "</think>"])
    info = SimpleNamespace(n_vocab=tokenizer.get_vocab_size(), check_masks=lambda place: None)
    model: Any = SimpleNamespace(info=info, path="m", tokenizer=tokenizer, manifest={}, is_eos=None)
    constraint, tokens = Guide(model).constraint(grammar), list[int]()
    while not constraint.is_over:
        bits = np.unpackbits(constraint.allowed().view(np.uint8), bitorder="little")
        tokens.append(int(bits.argmax()))
        constraint.take(tokens[-1])
    assert tokenizer.decode(tokens, skip_special_tokens=False) == text
