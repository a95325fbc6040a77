"""What a model thinks before it answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmc.runtime.serve.chat import ChatTemplate
from llmc.runtime.serve.fields import ApiError
from llmc.runtime.serve.job import Ask, Job, Thinking
from llmc.runtime.serve.requests import Effort
from llmc.runtime.serve.thoughts import COMMAND, GEMMA, HARMONY, SEED, THINK, Marks, marks_of
from llmc.runtime.text import load_tokenizer
from tests.runtime.serve.conftest import Server, events_of
from tests.runtime.serve.test_tools import CHATS, TOOLS
from tests.runtime.stub_artifact import characters_json

LETTERS = json.loads(characters_json())["model"]["vocab"]
OPENING, CLOSING = LETTERS["H"], LETTERS["I"]
THOUGHTLESS: dict[str, Any] = {"logit_bias": {str(token): -100 for token in (0, 1, 2, OPENING, CLOSING)}}
"""Nor says what has no text."""


HEAD, FINAL = "<|channel|>analysis<|message|>", "<|start|>assistant<|channel|>final<|message|>"


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("marks", "text", "is_open", "thought", "answer"),
    [
        (THINK, "<think>\nI am.\n\n</think>\n\nYes. ", False, "I am.", "Yes. "),
        (THINK, " \n<think> a </thin k</think>b", False, "a </thin k", "b"),
        (THINK, "plain <think>x</think>", False, "", "plain <think>x</think>"),
        (THINK, "I am \n</think>\n\nyes", True, "I am", "yes"),
        (THINK, "cut off", True, "cut off", ""),
        (THINK, "<think></think>", False, "", ""),
        (THINK, " <thi", False, "", " <thi"),
        (THINK, "", True, "", ""),
        (GEMMA, "<|channel>thought\nI am.\n<channel|>Yes.", False, "I am.", "Yes."),
        (GEMMA, "I am.<channel|>Yes.", True, "I am.", "Yes."),
        (GEMMA, "<|channel>thou", False, "", "<|channel>thou"),
        (HARMONY, f"{HEAD}I am <|e<|end|>{FINAL}Yes.", False, "I am <|e", "Yes."),
        (HARMONY, f"{HEAD}cut <|en", False, "cut <|en", ""),
        (HARMONY, "<|channel|>final<|message|>Yes.", False, "", "Yes."),
        (HARMONY, "<|channel|>commentary <|constrain|>json<|message|>{}", False, "", "{}"),
        (HARMONY, "<b> no head", False, "", "<b> no head"),
        (HARMONY, "<|chan", False, "", "<|chan"),
        (HARMONY, "<|channel|>fin", False, "", ""),
        (HARMONY, f"{HEAD}I am<|end|><|start|>assistant", False, "I am", ""),
    ],
)
def test_thoughts_are_told_from_answers(
    marks: Marks, text: str, is_open: bool, thought: str, answer: str, size: int
) -> None:
    scanner = marks.scanner(is_open)
    pieces = [scanner.push(text[i : i + size], False) for i in range(0, len(text), size)]
    pieces.append(scanner.push("", True))
    assert tuple("".join(parts) for parts in zip(*pieces, strict=True)) == (thought, answer)


def test_templates_show_their_marks() -> None:
    assert marks_of("… <think>") is None
    assert marks_of("'<|channel>thought\\n<channel|>'") is GEMMA
    assert marks_of("{%- set think_end_token = '</seed:think>' -%}") is SEED
    assert marks_of("<|START_THINKING|>{{ thought }}<|END_THINKING|>") is COMMAND
    assert GEMMA.is_open("<|turn>model\n<|channel>thought\n")
    assert GEMMA.is_over("<|turn>model\n<|channel>thought\n<channel|>")
    assert marks_of("{% if x %}<think>\\n\\n</think>{% endif %}") is THINK
    assert marks_of(f"{{{{ '{FINAL}' + message.content + '<|end|>' }}}}") is HARMONY


def test_how_much_is_thought_is_told_to_templates_that_ask() -> None:
    template, high = ChatTemplate("{{ reasoning_effort or 'medium' }}", {}), Effort("high", "reasoning_effort")
    assert template.render([], template.variables(high, None, {})) == "high"
    assert template.render([], template.variables(None, None, {})) == "medium"
    with pytest.raises(ApiError, match="'reasoning_effort' is not supported"):
        ChatTemplate("x", {}).variables(high, None, {})
    assert ChatTemplate("x", {}).variables(Effort("high", None), None, {}) == {}
    switched = ChatTemplate("{{ enable_thinking }}", {})
    assert switched.variables(Effort("none", "reasoning_effort"), None, {}) == {"enable_thinking": False}
    assert switched.variables(None, True, {"enable_thinking": False}) == {"enable_thinking": False}


BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "hi"}],
    "chat_template_kwargs": {"think": True},
    "temperature": 0,
    "ignore_eos": True,
    "max_tokens": 40,
    "logit_bias": {str(CLOSING): 2},
}


def answer(talking: Server, **changes: Any) -> dict[str, Any]:
    status, said = talking.ask("POST", CHATS, {**BODY, **changes})
    assert status == 200, said
    return dict(said)


def test_a_thought_is_no_part_of_the_content(talking: Server) -> None:
    said = answer(talking, return_token_ids=True)
    [choice] = said["choices"]
    thought, _, rest = answer(talking, reasoning_format="none")["choices"][0]["message"]["content"].partition(
        "</think>"
    )
    assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == (thought.strip(), rest.lstrip())
    assert thought
    n_thought = choice["token_ids"].index(CLOSING) + 1
    assert said["usage"]["completion_tokens_details"] == {"reasoning_tokens": n_thought}
    assert "reasoning_content" not in answer(talking, include_reasoning=False)["choices"][0]["message"]
    with talking.open("POST", CHATS, {**BODY, "stream": True}) as response:
        deltas = [chunk["choices"][0]["delta"] for chunk in list(events_of(response))[1:-1]]
    for name in ("reasoning_content", "content"):
        assert "".join(delta.get(name, "") for delta in deltas) == choice["message"][name]


@pytest.mark.parametrize(
    ("think", "biases"), [(True, {CLOSING: 2}), (None, {OPENING: 16, CLOSING: 20}), (False, {OPENING: -99})]
)
def test_a_format_is_the_answers_and_not_the_thoughts(talking: Server, think: bool | None, biases: Any) -> None:
    changes = {"logit_bias": biases, "chat_template_kwargs": {"think": think}, "guided_choice": ["yes", "no"]}
    [choice] = answer(talking, **changes)["choices"]
    assert choice["message"]["content"] in ("yes", "no")
    assert ("reasoning_content" in choice["message"]) == bool(think)
    ids = answer(talking, **changes, return_token_ids=True)["choices"][0]["token_ids"]
    assert (CLOSING in ids) == (think is not False)


@pytest.mark.parametrize(("said", "n_thought"), [("HaI", 3), ("LHabIa", 4), ("aHaI", 0), ("Ha", 2)])
def test_tokens_of_a_thought_are_counted(said: str, n_thought: int) -> None:
    tokenizer = characters_json().replace('"L"', '"Ċ"')
    job = Job(
        Ask((LETTERS["a"],), 9, thinking=Thinking(OPENING, CLOSING, False)), 40, load_tokenizer(tokenizer, ""), print
    )
    for letter in said:
        job.take(LETTERS[letter], False)
    assert job.n_thought == n_thought


@pytest.mark.parametrize(("think", "n"), [(True, 0), (True, 3), (None, 3)])
def test_a_thought_ends_when_it_has_its_tokens(talking: Server, think: bool | None, n: int) -> None:
    biases = {"logit_bias": {str(CLOSING): -100} | ({} if think else {str(OPENING): 100})}
    changes = {"chat_template_kwargs": {"think": think}, "return_token_ids": True, "thinking_token_budget": n}
    said = answer(talking, **changes, **biases)
    ids = said["choices"][0]["token_ids"]
    assert (ids.index(CLOSING), ids.count(CLOSING)) == (n + (think is None), 1)
    endless = {**changes, **biases, "thinking_token_budget": None, "thinking_budget_tokens": -1}
    assert answer(talking, **endless)["choices"][0]["message"]["content"] == ""


def test_where_a_call_has_to_come_nothing_is_thought(talking: Server) -> None:
    [choice] = answer(talking, tools=TOOLS, tool_choice="required", max_tokens=60)["choices"]
    assert choice["message"]["tool_calls"]
    assert "reasoning_content" not in choice["message"]
