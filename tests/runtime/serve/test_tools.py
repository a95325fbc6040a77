"""Calls of functions: offered, demanded, found in texts."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer, grammar_from
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llmc.runtime.grammar import Grammar
from llmc.runtime.serve.calls import CallScanner
from llmc.runtime.serve.fields import ApiError, Fields
from llmc.runtime.serve.forms import Call, Form
from llmc.runtime.serve.job import Ask, Job
from llmc.runtime.serve.known_forms import (
    DEEPSEEK,
    DEEPSEEK_31,
    GEMMA,
    GLM,
    GLM_47,
    HARMONY,
    HERMES,
    KIMI,
    LLAMA,
    MINIMAX,
    MISTRAL,
    MISTRAL_11,
    MISTRAL_13,
    PLAIN,
    QWEN,
    SEED,
    form_of,
)
from llmc.runtime.serve.tools import Tools, read_tools
from llmc.runtime.text import load_tokenizer
from tests.runtime.serve.conftest import Server, events_of
from tests.runtime.stub_artifact import EOS, N_VOCAB, characters_json

CHATS = "/v1/chat/completions"
LETTERS = json.loads(characters_json())["model"]["vocab"]
TOWN = {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"], "additionalProperties": False}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "f", "parameters": {**TOWN, "$defs": {"n": {"enum": [1, 23]}}}}},
    {"type": "function", "function": {"name": "now"}},
]


def tools(choice: str = "auto") -> Tools:
    read = read_tools(Fields({"tools": TOOLS, "tool_choice": choice}))
    assert read is not None
    return read


def told(parts: list[str | Call]) -> tuple[str, list[Call]]:
    """What is said, and the calls."""
    said = "".join(part for part in parts if isinstance(part, str))
    return said, [part for part in parts if isinstance(part, Call)]


def scanned(text: str, form: Form, choice: str = "auto", size: int = 1) -> tuple[str, list[Call]]:
    """What is found in a text that comes in pieces of a size."""
    scanner, said, calls = CallScanner(tools(choice), form), "", list[Call]()
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    for piece, is_last in [*((piece, False) for piece in pieces), ("", True)]:
        more, found = told(scanner.push(piece, is_last))
        said, calls = said + more, calls + found
    assert scanner.n_calls == len(calls)
    return said, calls


F, NOW = Call("f", '{"n": 1}'), Call("now", "{}")
F_TEXT, NOW_TEXT = '{"name": "f", "arguments": {"n": 1}}', '{"name": "now", "arguments": {}}'


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize(
    ("form", "text", "said", "calls"),
    [
        (HERMES, "a <b> {c}", "a <b> {c}", []),
        (HERMES, f"so <tool_call>\n{F_TEXT}\n</tool_call>", "so ", [F]),
        (HERMES, f"<tool_call>{F_TEXT}</tool_call>\n<tool_call>\n{NOW_TEXT}\n</tool_call>\n", "", [F, NOW]),
        (HERMES, f"<tool_call>\n{F_TEXT}", "", [F]),
        (HERMES, "<tool_call>\n{no", "<tool_call>\n{no", []),
        (HERMES, f"<tool_call>{F_TEXT.replace('1', '1e999')}", f"<tool_call>{F_TEXT.replace('1', '1e999')}", []),
        (HERMES, "<tool_call>{no}</tool_call> b", "<tool_call>{no}</tool_call> b", []),
        (HERMES, "a <tool_", "a <tool_", []),
        (MISTRAL, f"[TOOL_CALLS] [{F_TEXT}, {NOW_TEXT}]", "", [F, NOW]),
        (MISTRAL, "[TOOL_CALLS] [3]", "[TOOL_CALLS] [3]", []),
        (MISTRAL_13, 'a[TOOL_CALLS]f[ARGS]{"n": 1}[TOOL_CALLS]now[ARGS]{}', "a", [F, NOW]),
        (MISTRAL_13, '[TOOL_CALLS]so[TOOL_CALLS]f[ARGS]{"n": 1}', "[TOOL_CALLS]so", [F]),
        (MISTRAL_13, "[TOOL_CALLS]f[ARGS]{no", "[TOOL_CALLS]f[ARGS]{no", []),
        (MISTRAL_13, "[TOOL_CALLS]g[ARGS]{} b", "[TOOL_CALLS]g[ARGS]{} b", []),
        (MISTRAL_13, '[TOOL_CALLS]f[ARGS]{"n": 1} b  c [TOOL_CA', "b  c [TOOL_CA", [F]),
        (MISTRAL_11, '[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"n": 1}[TOOL_CALLS]now[CALL_ID]1[ARGS]{}', "", [F, NOW]),
        (LLAMA, ' {"name": "f", "parameters": {"n": 1}}', "", [F]),
        (LLAMA, '{"name": "other", "parameters": {}}', '{"name": "other", "parameters": {}}', []),
        (LLAMA, 'It is {"name": "f", "parameters": {}}', 'It is {"name": "f", "parameters": {}}', []),
        (LLAMA, "  ", "  ", []),
    ],
)
def test_calls_are_told_from_what_is_said(form: Form, text: str, said: str, calls: list[Call], size: int) -> None:
    assert scanned(text, form, size=size) == (said, calls)


@pytest.mark.parametrize("size", [1, 1000])
def test_one_call_is_taken_where_no_more_may_be(size: int) -> None:
    read = read_tools(Fields({"tools": TOOLS, "parallel_tool_calls": False}))
    assert read is not None
    scanner = CallScanner(read, HERMES)
    text = f"a <tool_call>{F_TEXT}</tool_call><tool_call>{NOW_TEXT}</tool_call>"
    found = [part for i in range(0, len(text), size) for part in scanner.push(text[i : i + size], is_last=False)]
    assert told(found) == ("a ", [F])


@pytest.mark.parametrize(
    ("form", "call"),
    [(MISTRAL_13, ["f", "[ARGS]", '{"n":23}']), (MISTRAL_11, ["now", "[CALL_ID]", "abcdefghi", "[ARGS]", "{}"])],
)
def test_a_call_is_constrained_to_the_special_tokens_of_its_form(form: Form, call: list[str]) -> None:
    tokenizer, special = load_tokenizer(characters_json(), ""), {"[ARGS]": 1, "[CALL_ID]": 0}
    grammar = tools("required").grammar(form, {token: mark for mark, token in special.items()})
    known = LLTokenizer(tokenizer.to_str(), n_vocab=N_VOCAB, eos_token=EOS)
    matcher = LLMatcher(known, grammar_from("lark", grammar.source), log_level=0)
    for part in call:
        for token in [special[part]] if part in special else tokenizer.encode(part).ids:
            assert matcher.consume_token(token), part
    assert matcher.is_stopped()


def test_special_tokens_of_a_form_have_a_text() -> None:
    tokenizer = Tokenizer.from_str(characters_json())
    a, begin = tokenizer.encode("a").ids[0], 1
    ask = Ask((a,), 9, shown={begin: "[TOOL_CALLS]"})
    job = Job(ask, 40, tokenizer, print, tells="tokens")
    said = [job.take(token, False) for token in (a, begin, a)]
    assert [one.text for one in said if one] == ["a", "[TOOL_CALLS]", "a"]


def test_a_call_that_has_to_come_needs_no_opening() -> None:
    assert scanned(f"{F_TEXT}\n</tool_call>", HERMES, "required") == ("", [F])
    assert scanned(f"[{F_TEXT}]", MISTRAL, "required") == ("", [F])
    quoting = '{"name": "f", "arguments": {"n": "</tool_call>"}}'
    assert scanned(f"{quoting}\n</tool_call>", HERMES, "required") == ("", [Call("f", '{"n": "</tool_call>"}')])
    assert scanned(F_TEXT[:-3], PLAIN, "required") == (F_TEXT[:-3], [])  # max_tokens cut it off


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("… <tool_call> …", HERMES),
        ("<tool_call> <function= … <parameter=", QWEN),
        ("<tool_call> <invoke name=", None),
        ("<seed:tool_call>\n<function= … <parameter=", SEED),
        ("<tool_call>{function-name}\n<arg_key>{key}</arg_key>\n<arg_value>", GLM),
        ("<tool_call>{{ name }}<arg_key>{{ key }}</arg_key><arg_value>", GLM_47),
        ("<minimax:tool_call>", MINIMAX),
        ("'<|tool_call>call:' + name", GEMMA),
        ("<|channel|>commentary", HARMONY),
        ("'<｜tool▁calls▁begin｜>' … '```json'", DEEPSEEK),
        ("'<｜tool▁calls▁begin｜>' … '<｜tool▁sep｜>'", DEEPSEEK_31),
        ("<|tool_calls_section_begin|>", KIMI),
        ("[TOOL_CALLS]", MISTRAL),
        ("[TOOL_CALLS] name + [ARGS]", MISTRAL_13),
        ("[TOOL_CALLS] name + [CALL_ID] + [ARGS]", MISTRAL_11),
        ('in the format {"name": function name, "parameters": …}', LLAMA),
        ("{{ messages }}", None),
    ],
)
def test_templates_show_how_calls_are_written(template: str, form: Form | None) -> None:
    assert form_of(template) is form


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [3]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": 3}}]}, "tools[0].function.parameters"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ],
)
def test_wrong_tools_are_named(body: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as error:
        read_tools(Fields(body))
    assert error.value.param == param


BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "tools": TOOLS, "temperature": 0}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}])
def test_a_call_comes_where_one_has_to(talking: Server, choice: object) -> None:
    status, said = talking.ask("POST", CHATS, {**BODY, "tool_choice": choice, "n": 3, "temperature": 1, "seed": 5})
    assert status == 200, said
    for one in said["choices"]:
        assert (one["finish_reason"], one["message"]["content"]) == ("tool_calls", None)
        [call] = one["message"]["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        assert (call["type"], len(call["id"])) == ("function", 9)
        assert call["function"]["name"] == "now" or arguments["n"] in (1, 23)
        assert call["function"]["name"] == "f" or choice == "required"


def test_a_call_is_streamed(talking: Server) -> None:
    body = {**BODY, "tool_choice": "required", "temperature": 0}
    whole = talking.ask("POST", CHATS, body)[1]["choices"][0]["message"]["tool_calls"][0]["function"]
    with talking.open("POST", CHATS, {**body, "stream": True}) as response:
        _, *chunks, _ = events_of(response)
    [call] = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert (call["index"], call["function"]) == (0, whole)
    ends = [(chunk["choices"][0]["delta"], chunk["choices"][0]["finish_reason"]) for chunk in chunks]
    assert [end for end in ends if end[1]] == [({}, "tool_calls")]  # a chunk of its own, as OpenAI's clients want it


def test_an_answer_without_calls_is_text(talking: Server) -> None:
    thoughtless = {str(Tokenizer.from_str(characters_json()).token_to_id(letter)): -100 for letter in "HI"}
    body = {**BODY, "max_tokens": 9, "ignore_eos": True, "logit_bias": thoughtless}
    said = talking.ask("POST", CHATS, body)[1]["choices"][0]
    assert "tool_calls" not in said["message"]
    assert (len(said["message"]["content"]), said["finish_reason"]) == (9, "length")


def test_earlier_calls_reach_the_template_as_objects(talking: Server) -> None:
    call = {"id": "123456789", "type": "function", "function": {"name": "f", "arguments": '{"n": 1}'}}
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "ok", "tool_call_id": "123456789"},
    ]
    status, said = talking.ask("POST", CHATS, {**BODY, "messages": talk, "max_tokens": 1})
    assert (status, said["usage"]["prompt_tokens"]) == (200, len("2<tool_call>userhiassistant2toolok"))
    call["function"] = {"name": "f", "arguments": "{"}
    assert (
        talking.ask("POST", CHATS, {**BODY, "messages": talk})[1]["error"]["param"]
        == "messages[1].tool_calls[0].function.arguments"
    )


ANSWER = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("form", [HERMES, MISTRAL, MISTRAL_13, MISTRAL_11, LLAMA])
def test_an_answer_has_its_format_or_is_calls(form: Form) -> None:
    calls = {
        HERMES: f"<tool_call>\n{F_TEXT}\n</tool_call>\n<tool_call>\n{NOW_TEXT}\n</tool_call>",
        MISTRAL: f"[TOOL_CALLS][{F_TEXT}, {NOW_TEXT}]",
        MISTRAL_13: '[TOOL_CALLS]f[ARGS]{"n": 1}[TOOL_CALLS]now[ARGS]{}',
        MISTRAL_11: '[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"n": 1}[TOOL_CALLS]now[CALL_ID]123456789[ARGS]{}',
        LLAMA: F_TEXT.replace("arguments", "parameters"),
    }[form]
    vocabulary = {"</s>": 0} | {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)}
    level = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    level.decoder = decoders.ByteLevel()
    known = LLTokenizer(level.to_str(), n_vocab=len(vocabulary), eos_token=0)
    source = tools().grammar(form, {}, Grammar.of_schema(ANSWER)).source
    assert scanned(calls, form)[0] == ""
    for text, goes in ((calls, True), ('{"ok": true}', True), ("Well", False), ('{"ok": 3}', False)):
        matcher = LLMatcher(known, grammar_from("lark", source), log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        n_taken = matcher.try_consume_tokens(level.encode(text).ids)
        assert (n_taken == len(text) and matcher.is_accepting()) == goes, (text, n_taken)


def test_tools_may_be_called_where_an_answer_has_a_format(talking: Server) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": ANSWER}}
    for letter, is_call in ((LETTERS["M"], True), (LETTERS["{"], False)):
        body = {**BODY, "response_format": form, "logit_bias": {str(letter): 20}, "parallel_tool_calls": False}
        status, said = talking.ask("POST", CHATS, body)
        assert status == 200, said
        [choice] = said["choices"]
        if is_call:
            assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
        else:
            assert json.loads(choice["message"]["content"]).keys() == {"ok"}
    status, said = talking.ask("POST", CHATS, {**BODY, "guided_regex": "a+"})
    assert (status, said["error"]["param"]) == (400, "guided_regex")
