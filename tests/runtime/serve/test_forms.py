"""Calls of functions in the forms that models have for them: read, and constrained."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer, grammar_from
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from llmc.runtime.grammar import Grammar
from llmc.runtime.serve.calls import CallScanner
from llmc.runtime.serve.chat import ChatTemplate
from llmc.runtime.serve.fields import ApiError
from llmc.runtime.serve.forms import Call, Form
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
    MISTRAL_13,
    QWEN,
    SEED,
)
from llmc.runtime.serve.thoughts import HARMONY as CHANNELS
from llmc.runtime.serve.tools import Tools, framed
from tests.runtime.serve.conftest import Server, serving
from tests.runtime.stub_artifact import characters_json, stub_code, write_stub

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "of": {"type": "object", "properties": {"all": {"type": "boolean"}, "n": {"type": "array"}}},
        "unit": {"enum": ["c", "f"]},
    },
    "required": ["city"],
}
TOOLS = Tools((), {"weather": PARAMETERS, "now": {"type": "object", "properties": {}}}, must_call=False)
FORCED = Tools((), TOOLS.functions, must_call=True)
GRAZ = Call("weather", '{"city": "Graz, \\"A\\"\\n8010", "days": 3, "of": {"all": true, "n": [1, 2]}, "unit": "c"}')
NOW = Call("now", "{}")
VALUES = 'Graz, "A"\n8010', "3", '{"all": true, "n": [1, 2]}', "c"


def fields(before: str, middle: str, behind: str) -> str:
    pairs = zip(PARAMETERS["properties"], VALUES, strict=True)
    return "".join(f"{before}{key}{middle}{value}{behind}" for key, value in pairs)


QWEN_FIELDS = fields("<parameter=", ">\n", "\n</parameter>\n")
SEED_FIELDS = fields("<parameter=", ">", "</parameter>\n")
MINIMAX_FIELDS = fields('<parameter name="', '">', "</parameter>\n")
GLM_FIELDS = fields("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n")
CALL, ENDS, SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
CALLS: dict[Form, tuple[str, str]] = {
    QWEN: (
        f"<tool_call>\n<function=weather>\n{QWEN_FIELDS}</function>\n</tool_call>",
        "\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
    ),
    SEED: (
        f"<seed:tool_call>\n<function=weather>\n{SEED_FIELDS}</function>\n</seed:tool_call>",
        "\n<seed:tool_call>\n<function=now>\n</function>\n</seed:tool_call>",
    ),
    GLM: (f"<tool_call>weather\n{GLM_FIELDS}</tool_call>", "\n<tool_call>now\n</tool_call>"),
    GLM_47: (
        f"<tool_call>weather{fields('<arg_key>', '</arg_key><arg_value>', '</arg_value>')}</tool_call>",
        "<tool_call>now</tool_call>",
    ),
    MINIMAX: (
        f'<minimax:tool_call>\n<invoke name="weather">\n{MINIMAX_FIELDS}</invoke>',
        '\n<invoke name="now">\n</invoke>',
    ),
    GEMMA: (
        '<|tool_call>call:weather{city:<|"|>Graz, "A"\n8010<|"|>,days:3,of:{all:true,n:[1,2]},unit:<|"|>c<|"|>}'
        "<tool_call|>",
        "<|tool_call>call:now{}<tool_call|>",
    ),
    DEEPSEEK: (
        f"<｜tool▁calls▁begin｜>{CALL}function{SEP}weather\n```json\n{GRAZ.arguments}\n```{ENDS}",
        f"{CALL}function{SEP}now\n```json\n{{}}\n```{ENDS}",
    ),
    DEEPSEEK_31: (
        f"<｜tool▁calls▁begin｜>{CALL}weather{SEP}{GRAZ.arguments}{ENDS}",
        f"{CALL}now{SEP}{{}}{ENDS}",
    ),
    KIMI: (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        f"{GRAZ.arguments}<|tool_call_end|>",
        "<|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|>",
    ),
}
"""Two calls in each form; where they share a closing, without it."""


def closed(form: Form, *calls: str) -> str:
    return "".join(calls) + (form.closing if form.within else "")


def scanned(text: str, form: Form, tools: Tools = TOOLS, size: int = 1) -> tuple[str, list[Call]]:
    scanner = CallScanner(tools, form)
    parts = [part for i in range(0, len(text), size) for part in scanner.push(text[i : i + size], False)]
    parts += scanner.push("", True)
    calls = [part for part in parts if isinstance(part, Call)]
    return "".join(part for part in parts if isinstance(part, str)), calls


@pytest.mark.parametrize("size", [1, 5, 10_000])
@pytest.mark.parametrize("form", CALLS)
def test_calls_are_read(form: Form, size: int) -> None:
    assert scanned(f"Well. {closed(form, *CALLS[form])}\n", form, size=size) == ("Well. ", [GRAZ, NOW])


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (QWEN, "<tool_call>\n<function=other>\n</function>\n</tool_call>"),
        (QWEN, "<tool_call>\n<function=weather>\n<parameter=city>\nGraz\n</function>\n</tool_call>"),
        (QWEN, "<tool_call>\n<function=weather>\nGraz\n</function>\n</tool_call>"),
        (QWEN, "<tool_call>\n<function=now>\n</function>\n<function=now>\n</function>\n</tool_call>"),
        (GLM, "<tool_call>weather\n<arg_key>city</arg_key>Graz</tool_call>"),
        (GEMMA, '<|tool_call>call:weather{city:<|"|>Graz}<tool_call|>'),
        (GEMMA, "<|tool_call>call:weather{city:1e999}<tool_call|>"),
        (GEMMA, f"<|tool_call>call:weather{'{a:' * 5000}<tool_call|>"),
        (DEEPSEEK, "<｜tool▁calls▁begin｜>weather\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
        (KIMI, "<|tool_calls_section_begin|>x<|tool_calls_section_end|>"),
    ],
)
def test_what_only_looks_like_a_call_is_said(form: Form, text: str) -> None:
    assert scanned(text, form, size=1000) == (text, [])


def test_values_are_what_their_schema_takes() -> None:
    kinds = {
        "text": {"type": "string"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "either": {"type": ["integer", "string"]},
        "number": {"type": "number"},
        "any": {},
    }
    tools = Tools((), {"f": {"type": "object", "properties": kinds}}, must_call=False)

    def read(**fields: str) -> Any:
        written = "".join(f"<parameter={key}>{value}</parameter>" for key, value in fields.items())
        [call] = scanned(f"<tool_call><function=f>{written}</function></tool_call>", QWEN, tools)[1]
        return json.loads(call.arguments)

    said = read(text="12", maybe="null", either="12", number="12", any="[1]", unknown="x y")
    assert said == {"text": "12", "maybe": None, "either": 12, "number": 12, "any": [1], "unknown": "x y"}
    assert read(maybe="12", either="a", any="a b", number="many") == {
        "maybe": "12",
        "either": "a",
        "any": "a b",
        "number": "many",
    }
    assert read(text="\n\na\n\n") == {"text": "\na\n"}


def test_gemma_writes_json_in_its_own_quotes() -> None:
    text = (
        '<|tool_call>call:weather{city:Graz,days:"3",of:{<|"|>all<|"|>:null, n: [-1.5e3,<|"|><|"|>]},x:007}<tool_call|>'
    )
    [call] = scanned(text, GEMMA)[1]
    assert json.loads(call.arguments) == {
        "city": "Graz",
        "days": "3",
        "of": {"all": None, "n": [-1500.0, ""]},
        "x": "007",
    }


def byte_level(special: tuple[str, ...]) -> Tokenizer:
    """A tokenizer with a token for each byte, and some special ones."""
    vocabulary = {"</s>": 0} | {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in special])
    return tokenizer


def goes(tools: Tools, form: Form, text: str, is_special: bool) -> bool:
    """Whether the form's grammar takes a text whole."""
    return follows(text, (form.marks if is_special else ()), lambda special: tools.grammar(form, special))


def follows(text: str, special: tuple[str, ...], grammar: Callable[[dict[int, str]], Grammar]) -> bool:
    """Whether a grammar, made of the ids of special tokens, takes a text whole."""
    tokenizer = byte_level(special)
    ids = {tokenizer.encode(mark).ids[0]: mark for mark in special}
    known = LLTokenizer(tokenizer.to_str(), n_vocab=tokenizer.get_vocab_size(), eos_token=0)
    matcher = LLMatcher(known, grammar_from("lark", grammar(ids).source), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer.encode(text).ids
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize("is_special", [False, True])
@pytest.mark.parametrize("form", CALLS)
def test_a_call_that_has_to_come_is_one_that_is_read(form: Form, is_special: bool) -> None:
    first = closed(form, CALLS[form][0]).removeprefix(form.opening)
    assert goes(FORCED, form, first, is_special)
    assert scanned(first, form, FORCED) == ("", [GRAZ])
    for wrong in (first.replace("weather", "whether"), first.replace("3", '"3"'), f"{first} And so on."):
        assert not goes(FORCED, form, wrong, is_special), wrong


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (QWEN, "<function=weather>\n<parameter=city>\nGraz\n</parameter>\n</function>\n</tool_call>"),
        (GLM, "weather\n<arg_key>city</arg_key>\n<arg_value>Graz</arg_value>\n</tool_call>"),
        (GEMMA, 'call:weather{city:<|"|>Graz<|"|>}<tool_call|>'),
        (
            KIMI,
            '<|tool_call_begin|>functions.weather:12<|tool_call_argument_begin|>{"city": "Graz"}'
            "<|tool_call_end|><|tool_calls_section_end|>",
        ),
    ],
)
def test_what_is_required_has_to_be_there(form: Form, text: str) -> None:
    assert goes(FORCED, form, text, True)
    assert not goes(FORCED, form, text.replace("city", "unit").replace("Graz", "c"), True)


@pytest.mark.parametrize("is_special", [False, True])
@pytest.mark.parametrize("form", [QWEN, GLM, GEMMA])
def test_texts_are_as_long_as_they_may_be(form: Form, is_special: bool) -> None:
    schema = {"type": "object", "properties": {"t": {"type": "string", "maxLength": 3}}, "required": ["t"]}
    tools = Tools((), {"f": schema}, must_call=True)
    for text, is_fine in (("abc", True), ("", True), ("abcd", False)):
        call = {
            QWEN: f"<function=f>\n<parameter=t>\n{text}\n</parameter>\n</function>\n</tool_call>",
            GLM: f"f\n<arg_key>t</arg_key>\n<arg_value>{text}</arg_value>\n</tool_call>",
            GEMMA: f'call:f{{t:<|"|>{text}<|"|>}}<tool_call|>',
        }[form]
        assert goes(tools, form, call, is_special) == is_fine, call


def test_calls_of_gpt_oss_are_messages_to_functions() -> None:
    head = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    for address in (
        "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>",
        " to=functions.weather<|channel|>commentary json<|message|>",
    ):
        text, thought, said = f'{head}{address}{{"city": "Graz"}}', "", ""
        scanner = CHANNELS.scanner(False, has_calls=True)
        calls = CallScanner(TOOLS, HARMONY)
        parts: list[str | Call] = []
        for i in range(0, len(text) + 1, 3):
            more, rest = scanner.push(text[i : i + 3], i + 3 > len(text))
            thought += more
            parts += calls.push(rest, i + 3 > len(text))
        said = "".join(part for part in parts if isinstance(part, str))
        found = [part for part in parts if isinstance(part, Call)]
        assert (thought, said, found) == ("Hm.", "", [Call("weather", '{"city": "Graz"}')])
    for is_special in (False, True):
        assert goes(FORCED, HARMONY, f"weather <|constrain|>json<|message|>{GRAZ.arguments}", is_special)
    assert scanned("now <|constrain|>json<|message|>{}", HARMONY, FORCED) == ("", [NOW])


OFFERED = [
    {"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in TOOLS.functions.items()
]
ANSWER = Grammar.of_schema({"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]})


@pytest.mark.parametrize("is_special", [False, True])
def test_an_answer_in_channels_has_its_format_behind_a_thought(is_special: bool) -> None:
    marks = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>") if is_special else ()
    thought = "<|channel|>analysis<|message|>Well, {that}.<|end|><|start|>assistant"
    answer, call = '<|channel|>final<|message|>{"ok": true}', "<|channel|>commentary to=functions.now"
    call += " <|constrain|>json<|message|>{}"
    for text, with_tools, without in (
        (answer, True, True),
        (thought + answer, True, True),
        (thought + call, True, False),
        (thought, False, False),
        (answer.replace("true", "3"), False, False),
        ("<|channel|>final<|message|>Well", False, False),
    ):
        assert follows(text, marks, lambda ids: framed(ANSWER, CHANNELS.frame, ids)) == without, text
        assert follows(text, marks, lambda ids: TOOLS.grammar(HARMONY, ids, ANSWER, CHANNELS.frame)) == with_tools, text


def test_a_template_may_take_arguments_as_text() -> None:
    template = ChatTemplate("{% for m in messages %}{{ 'x' + m.tool_calls[0].function.arguments }}{% endfor %}", {})
    calls = [{"type": "function", "function": {"name": "now", "arguments": {"a": "ü"}}}]
    assert template.render([{"role": "assistant", "tool_calls": calls}], {}) == 'x{"a": "ü"}'
    with pytest.raises(ApiError, match="refuses these messages"):
        template.render([{"role": "assistant"}], {})


def test_two_forms_are_never_taken_for_each_other() -> None:
    for form in (HERMES, LLAMA, MISTRAL_13, *CALLS):
        for other, texts in CALLS.items():
            if other is not form and {form, other} not in ({QWEN, SEED}, {GLM, GLM_47}):
                assert scanned(closed(other, *texts), form, size=100)[1] == [], (form, other)


@pytest.fixture(scope="module")
def harmony(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Of a model that can write messages in channels."""
    tokenizer = json.loads(characters_json())
    vocabulary, marks = tokenizer["model"]["vocab"], (*CHANNELS.special, "<|constrain|>")
    for letter, word in zip("HIJKLMNO", (*marks, "Ġ", "_", "="), strict=True):
        vocabulary[word] = vocabulary.pop(letter)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    tokenizer["added_tokens"] += [{"id": vocabulary[mark], "content": mark, **flags} for mark in marks]
    template = "{{ tools and 'u' }}{% if x %}<|channel|>commentary<|channel|>final<|message|>{% endif %}"
    chat = {"template": template, "tokens": {}}
    path = tmp_path_factory.mktemp("harmony") / "a.so"
    write_stub(path, chat=chat, tokenizer=json.dumps(tokenizer), code=stub_code(n_context=320))
    with serving(path) as server:
        yield server


@pytest.mark.parametrize(
    ("changes", "letter", "wanted"),
    [
        ({}, "", {"content", "reasoning_content"}),
        ({"tools": OFFERED}, "f", {"content"}),
        ({"tools": OFFERED}, "c", {"tool_calls"}),
        ({"tools": OFFERED, "tool_choice": "required"}, "", {"tool_calls"}),
    ],
)
def test_a_model_with_channels_calls_or_answers_in_its_format(
    harmony: Server, changes: dict[str, Any], letter: str, wanted: set[str]
) -> None:
    bias = {str(json.loads(characters_json())["model"]["vocab"][letter]): 50} if letter else {}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": json.loads(ANSWER.source)}}
    body = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "response_format": schema}
    status, said = harmony.ask("POST", "/v1/chat/completions", {**body, **changes, "logit_bias": bias})
    assert status == 200, said
    [choice] = said["choices"]
    message = {key: value for key, value in choice["message"].items() if value is not None and key != "role"}
    assert message.keys() == wanted
    if "content" in message:
        assert json.loads(message["content"]).keys() == {"ok"}
    else:
        [call] = message["tool_calls"]
        assert call["function"]["name"] == "now" or "city" in json.loads(call["function"]["arguments"])
