"""Calls of functions in lists, in lines, as Python writes them, and in what else there is: read, and constrained."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmc.runtime.serve.forms import Form
from llmc.runtime.serve.known_forms import (
    APERTUS,
    APRIEL,
    COMMAND,
    DSML,
    DSML_32,
    FUNCTION,
    FUNCTOOLS,
    GIGACHAT,
    GRANITE,
    HERMES,
    INTERN,
    LFM,
    LLAMA,
    MINICPM,
    MINIMAX_1,
    NEMOTRON,
    OLMO,
    PHI,
    PYTHON,
    QWEN,
    XLAM,
    form_of,
)
from llmc.runtime.serve.tools import Tools
from tests.runtime.serve.test_forms import FORCED, GRAZ, NOW, goes, scanned

G, ARGS = json.loads(GRAZ.arguments), GRAZ.arguments
WEATHER = f'{{"name": "weather", "arguments": {ARGS}}}'
IN_PYTHON = "weather(city=\"Graz, \\\"A\\\"\\n8010\", days=3, of={'all': True, 'n': [1, 2]}, unit='c')"
DSML_FIELDS = "".join(
    f'<｜DSML｜parameter name="{key}" string="{"true" if isinstance(value, str) else "false"}">'
    f"{value if isinstance(value, str) else json.dumps(value)}</｜DSML｜parameter>\n"
    for key, value in G.items()
)
DSML_CALLS = (
    f'<｜DSML｜invoke name="weather">\n{DSML_FIELDS}</｜DSML｜invoke>',
    '<｜DSML｜invoke name="now">\n</｜DSML｜invoke>',
)
PARAMS = "".join(
    f'<param name="{key}">{value if isinstance(value, str) else json.dumps(value)}</param>' for key, value in G.items()
)
CALLS: dict[Form, tuple[str, str]] = {
    **dict.fromkeys(
        (APRIEL, MINIMAX_1, NEMOTRON, GRANITE, PHI, FUNCTOOLS, XLAM, INTERN, GIGACHAT),
        (WEATHER, '{"name": "now", "arguments": {}}'),
    ),
    APERTUS: (f'{{"weather": {ARGS}}}', '{"now": {}}'),
    COMMAND: (
        f'{{"tool_call_id": "0", "tool_name": "weather", "parameters": {ARGS}}}',
        '{"tool_call_id": "1", "tool_name": "now", "parameters": {}}',
    ),
    **dict.fromkeys((LFM, OLMO, PYTHON), (IN_PYTHON, "now()")),
    FUNCTION: (f"weather>{ARGS}", "now>{}"),
    MINICPM: (f'weather">{PARAMS}', 'now">'),
    DSML: DSML_CALLS,
    DSML_32: DSML_CALLS,
}
"""Two calls in each form, without what stands around them."""


def written(form: Form, *calls: str) -> str:
    if form.within:
        inside = f"{form.within.before}{form.within.between.join(calls)}{form.within.behind}"
        return f"{form.opening}{inside}{form.closing}"
    return "".join(f"{form.opening}{call}{form.closing}" for call in calls[: 2 if form.repeats else 1])


@pytest.mark.parametrize("size", [1, 10_000])
@pytest.mark.parametrize("form", CALLS)
def test_calls_are_read(form: Form, size: int) -> None:
    before = "Well. " if form.opening else " "
    said, calls = scanned(before + written(form, *CALLS[form]), form, size=size)
    assert (said.rstrip(), calls) == (before.rstrip(), [GRAZ, NOW][: 2 if form.repeats else 1])


@pytest.mark.parametrize("is_special", [False, True])
@pytest.mark.parametrize("form", CALLS)
def test_a_call_that_has_to_come_is_one_that_is_read(form: Form, is_special: bool) -> None:
    said = written(form, CALLS[form][0]).removeprefix(form.opening)
    first = said.replace("'c'", '"c"').replace("{'all': True, 'n'", '{"all": true, "n"')  # the grammar has one way
    assert goes(FORCED, form, first, is_special)
    assert scanned(first, form, FORCED) == ("", [GRAZ])
    for wrong in (first.replace("weather", "whether"), first.replace("3", '"3"'), f"{first} And so on."):
        assert not goes(FORCED, form, wrong, is_special), wrong


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ '<tool_calls>[' }}", APRIEL),
        ("respond with <tool_calls></tool_calls> XML tags", MINIMAX_1),
        ("<TOOLCALL>", NEMOTRON),
        ("respond only with <|tool_call|> followed by", GRANITE),
        ("<|tool|>{{ tools }}<|/tool|>", PHI),
        ("{{ ' functools[' }}", FUNCTOOLS),
        ("<|START_ACTION|>[", COMMAND),
        ("{% set dsml_token = '｜DSML｜' %}{{ '<' + dsml_token + 'tool_calls>' }}", DSML),
        ("{% set dsml_token = '｜DSML｜' %}{{ '<' + dsml_token + 'function_calls>' }}", DSML_32),
        ("Respond in the format [func_name1(params_name1=params_value1...)]", PYTHON),
        ("{{ '<function=' + name + '>' }}", FUNCTION),
        ("<function=name>\n<parameter=key>", QWEN),
        ("<tool_calls>[ … ]</tool_calls> <tool_call>", APRIEL),
        ("[]", None),
    ],
)
def test_a_template_shows_its_form(template: str, form: Form | None) -> None:
    assert form_of(template) == form


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (PYTHON, "[1] See the list."),
        (PYTHON, "[now]"),
        (PYTHON, "[now(x=now())]"),
        (PYTHON, "[now('a')]"),
        (PYTHON, "[now(a=x)]"),
        (PYTHON, "[now(a='\\ud800')]"),
        (PYTHON, "[now(a='b)]"),
        (PYTHON, "[other()]"),
        (PYTHON, "[]"),
        (XLAM, '["now"]'),
        (APERTUS, '<|tools_prefix|>[{"now": {}, "weather": {}}]<|tools_suffix|>'),
        (APERTUS, '<|tools_prefix|>[{"now": []}]<|tools_suffix|>'),
        (FUNCTION, "<function=now>1</function>"),
        (DSML, '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="now">\n<x></｜DSML｜invoke>\n</｜DSML｜tool_calls>'),
    ],
)
def test_what_only_looks_like_a_call_is_said(form: Form, text: str) -> None:
    assert scanned(text, form, size=3) == (text, [])


def test_calls_one_behind_another_are_read_where_nothing_is_around_them() -> None:
    now = '{"name": "now", "parameters": {}}'
    for joint in ("", "; ", "\n", ", "):
        assert scanned(f"{now}{joint}{now}", LLAMA) == ("", [NOW, NOW])
    assert scanned(f"{now} and {now}", LLAMA) == (f"{now} and {now}", [])


def test_arguments_are_read_by_the_name_that_models_have_for_them() -> None:
    text = '{"name": "weather", "parameters": {"city": "Graz"}}'
    [call] = scanned(f"<tool_call>{text}</tool_call>", HERMES)[1]
    assert json.loads(call.arguments) == {"city": "Graz"}


def test_strings_of_python_are_read_with_its_escapes_and_those_of_json() -> None:
    text = (
        r"""[now(a='it\'s "A"', b="\u00e9\ud83c\udf89\/\x41\d", from="(x=1)", c=-1.5e3, d=None, e-f=[true, False])]"""
    )
    [call] = scanned(text, PYTHON)[1]
    assert json.loads(call.arguments) == {
        "a": 'it\'s "A"',
        "b": "é🎉/A\\d",
        "from": "(x=1)",
        "c": -1500,
        "d": None,
        "e-f": [True, False],
    }


def test_values_may_be_written_as_python_does() -> None:
    kinds: dict[str, Any] = {name: {"type": name} for name in ("boolean", "object", "null", "string")}
    kinds["maybe"] = {"type": ["boolean", "string"]}
    tools = Tools((), {"f": {"type": "object", "properties": kinds}}, must_call=False)
    said = {"boolean": "True", "object": "{'a': \"it's\", 'b': [None]}", "null": "None", "string": "True"}
    said |= {"maybe": "'a'", "unknown": "True"}
    fields = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in said.items())
    [call] = scanned(f"<tool_call>\n<function=f>\n{fields}</function>\n</tool_call>", QWEN, tools)[1]
    assert json.loads(call.arguments) == {
        "boolean": True,
        "object": {"a": "it's", "b": [None]},
        "null": None,
        "string": "True",
        "maybe": "'a'",
        "unknown": "True",
    }


def test_a_text_with_marks_of_its_own_may_be_quoted() -> None:
    city = "<![CDATA[<b>Graz</b></param>]]>"
    [call] = scanned(f'<function name="weather"><param name="city">{city}</param></function>', MINICPM)[1]
    assert json.loads(call.arguments) == {"city": "<b>Graz</b></param>"}
