"""Stop strings, templates and counters, each alone."""

from __future__ import annotations

import asyncio
import datetime
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llmc.runtime.pictures import Picture
from llmc.runtime.serve.app import Service
from llmc.runtime.serve.chat import ChatTemplate
from llmc.runtime.serve.contents import content_of, pictures_in, pieces_of, size_of
from llmc.runtime.serve.fields import ApiError
from llmc.runtime.serve.meters import Meters, State
from llmc.runtime.serve.probs import TokenProb, token_prob
from llmc.runtime.serve.prompting import prompted
from llmc.runtime.serve.replies import listed
from llmc.runtime.serve.requests import read_chat
from llmc.runtime.serve.stops import StopScanner
from llmc.runtime.serve.tokenizing import read_text


@pytest.mark.parametrize(
    ("stops", "pieces", "shown"),
    [
        ((), ["ab", "c"], ["ab", "c"]),
        (("END",), ["aE", "N", "Db"], ["a", "", ""]),
        (("END",), ["aE", "Nx", "b"], ["a", "ENx", "b"]),
        (("aab",), ["a", "a", "a", "b", "c"], ["", "", "a", ""]),
        (("bc", "b"), ["ab", "c"], ["a"]),
        (("x", "longer"), ["lo", "ngex"], ["", "longe"]),
    ],
)
def test_text_is_held_back_only_while_it_may_begin_a_stop_string(
    stops: tuple[str, ...], pieces: list[str], shown: list[str]
) -> None:
    scanner, said = StopScanner(stops), []
    for piece in pieces:
        text, stopped = scanner.push(piece)
        said.append(text)
        if stopped:
            break
    assert said == shown


def test_nothing_is_held_back_at_the_end() -> None:
    scanner = StopScanner(("END",))
    assert scanner.push("aEN") == ("a", False)
    assert scanner.push("", is_last=True) == ("EN", False)


def test_templates_have_what_hugging_face_gives_them() -> None:
    source = (
        "{%- for m in messages %}\n    {%- if loop.index > 2 %}{% break %}{% endif %}\n"
        "{{ m | tojson }}{{ eos_token }}{%- endfor %}{{ strftime_now('%Y') | length }}{{ add_generation_prompt }}"
    )
    template = ChatTemplate(source, {"eos_token": "</s>"})
    messages = [{"role": "user", "content": "<ä>"}] * 3
    assert template.render(messages, {}) == '{"role": "user", "content": "<ä>"}</s>' * 2 + "4True"


CHANNELS = """
{%- macro kind_of(schema, needed, may_be_none=false) -%}
    {%- if schema.enum -%}
        {{ schema.enum | map("tojson") | join(" | ") }}
    {%- elif schema.type is iterable and schema.type is not string -%}
        {{ schema.type | join(" | ") }}
    {%- elif schema.type == "array" -%}
        {{ kind_of(schema["items"], []) }}[]
    {%- elif schema.type == "object" -%}
        {
        {%- for name, part in schema.properties.items() -%}
            {{ name ~ ("?" if name not in needed else "") ~ ": " ~ kind_of(part, part.required or []) }}
            {%- if not loop.last %}, {% endif -%}
        {%- endfor -%}
        }
    {%- else -%}
        {{ schema.type ~ (" | null" if may_be_none else "") }}
    {%- endif -%}
{%- endmacro -%}
{%- set effort = reasoning_effort | default("medium") -%}
{{- "<|start|>system<|message|>Today: " ~ strftime_now("%Y") ~ " Effort: " ~ effort ~ "<|end|>" -}}
{%- if messages[0].role in ["system", "developer"] -%}
    {%- set first, rest = messages[0].content, messages[1:] -%}
{%- else -%}
    {%- set first, rest = "", messages -%}
{%- endif -%}
{{- "<|start|>developer<|message|>" ~ first -}}
{%- for tool in tools or [] %}
    {%- set tool = tool.function -%}
    {{- "\n// " ~ tool.description ~ "\ntype " ~ tool.name ~ " = (_: " -}}
    {{- kind_of(tool.parameters, tool.parameters.required or [], true) ~ ") => any;" -}}
{%- endfor -%}
{{- "<|end|>" -}}
{%- set last = namespace(call=none, final=false) -%}
{%- for message in rest -%}
    {%- if message.role == "assistant" and message.tool_calls is defined -%}
        {%- set last.call = message.tool_calls[0].function -%}
        {{- "<|start|>assistant to=functions." ~ last.call.name ~ "<|channel|>commentary<|message|>" -}}
        {{- last.call.arguments | tojson(indent=none, separators=(",", ":"), sort_keys=true) ~ "<|call|>" -}}
    {%- elif message.role == "tool" -%}
        {%- if last.call is none %}{{ raise_exception("nothing was called") }}{% endif -%}
        {{- "<|start|>functions." ~ last.call.name ~ " to=assistant<|message|>" ~ message.content|tojson ~ "<|end|>" -}}
    {%- else -%}
        {%- if message.role == "assistant" and message.thinking and not loop.last %}{% continue %}{% endif -%}
        {{- "<|start|>" ~ message.role ~ "<|message|>" ~ message.content | trim ~ "<|end|>" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt is defined and add_generation_prompt %}{{- "<|start|>assistant" -}}{% endif -%}
"""


def test_a_template_may_write_channels_and_types_of_tools() -> None:
    """What templates such as gpt-oss's ask of Jinja: macros that call themselves, namespaces, tojson with options."""
    days = {"type": "array", "items": {"type": ["integer", "null"]}}
    properties = {"place": {"type": "string"}, "unit": {"enum": ["C", "F"]}, "days": days}
    parameters = {"type": "object", "required": ["place"], "properties": properties}
    tools = [{"type": "function", "function": {"name": "f", "description": "It <says>", "parameters": parameters}}]
    call = {"function": {"name": "f", "arguments": {"unit": "C", "place": "Zürich"}}}
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": " How warm? "},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "21 °C"},
    ]
    template = ChatTemplate(CHANNELS, {})
    prompt = template.render(messages, {"reasoning_effort": "high"}, tools)
    year = datetime.date.today().year
    assert prompt == (
        f"<|start|>system<|message|>Today: {year} Effort: high<|end|><|start|>developer<|message|>Be brief.\n"
        '// It <says>\ntype f = (_: {place: string, unit?: "C" | "F", days?: integer | null[]}) => any;<|end|>'
        "<|start|>user<|message|>How warm?<|end|><|start|>assistant to=functions.f<|channel|>commentary<|message|>"
        '{"place":"Zürich","unit":"C"}<|call|>'
        '<|start|>functions.f to=assistant<|message|>"21 °C"<|end|><|start|>assistant'
    )
    with pytest.raises(ApiError, match="nothing was called"):
        template.render([messages[3]], {})


def test_messages_with_tools_have_a_template_of_their_own_where_there_is_one() -> None:
    template = ChatTemplate("d", {}, "{{ tools[0].function.name }} <tool_call>")
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}
    with_tools = body | {"tools": [{"type": "function", "function": {"name": "f"}}]}
    vocabulary: Any = SimpleNamespace(shown=lambda marks: {}, added=lambda marks: {})
    for said, wanted in ((body, "d"), (with_tools, "f <tool_call>")):
        assert read_text(said, "m", template).write() == wanted
        assert prompted(read_chat(said, "m", 1), template, vocabulary).text == wanted


def test_a_template_that_writes_descriptions_is_given_empty_ones_where_there_are_none() -> None:
    source = (
        "{% for t in tools %}{% set f = t.function %}{{ '//' + f.description }}{% for k in f.parameters.properties %}"
    )
    template = ChatTemplate(
        source + "{{ k + f.parameters.properties[k].description }}{% endfor %}{% endfor %}{{ x and x.y.z }}", {}
    )
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"description": "c"}}}
    tools = [{"type": "function", "function": {"name": "f", **more}} for more in ({}, {"parameters": schema})]
    assert template.render([], {}, tools) == "////abc"
    with pytest.raises(ApiError, match="has no attribute 'y'"):
        template.render([], {"x": {"u": 1}}, tools)


@pytest.mark.parametrize("sent", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_have_the_name_that_the_template_has_for_them(sent: str) -> None:
    said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", sent: "hm"}]
    source = "{% for m in messages %}{{ m.NAME }}|{{ m.content }} {% endfor %}"
    for name in ("reasoning_content", "thinking", "reasoning"):
        assert ChatTemplate(source.replace("NAME", name), {}).render(said, {}) == "|x hm|y "


def test_a_thought_that_has_no_place_beside_words_and_calls_is_left_out() -> None:
    source = (
        "{% for m in messages %}{% if m.content and m.thinking %}{{ raise_exception('one or the other') }}{% endif %}"
        "{{ m.content or m.thinking }}{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    said = {"role": "assistant", "content": "y", "reasoning_content": "hm"}
    assert ChatTemplate(source, {}).render([{**said, "tool_calls": [call]}], {}) == "y"
    assert ChatTemplate(source, {}).render([{**said, "content": "", "tool_calls": [call]}], {}) == "hm"
    with pytest.raises(ApiError, match="one or the other"):
        ChatTemplate(source, {}).render([said], {})


def test_what_training_marks_in_a_template_is_text() -> None:
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}.{% endfor %}"
    assert ChatTemplate(source, {}).render([{"role": "user", "content": "x"}] * 2, {}) == "x.x."


@pytest.mark.parametrize("source", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ nothing.at.all }}"])
def test_templates_cannot_leave_their_sandbox(source: str) -> None:
    with pytest.raises(ApiError, match="the chat template refuses these messages"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}], {})


def test_what_is_no_number_is_no_answer() -> None:
    async def rows(*_: object) -> list[Any]:
        return [np.array([1, np.nan], np.float32)]

    service: Any = SimpleNamespace(name="m", engine=SimpleNamespace(max_batch=8), generator=SimpleNamespace(rows=rows))
    unasked: Any = None
    with pytest.raises(ApiError, match="is not finite") as error:
        asyncio.run(Service.rows(service, unasked, [(1,)], unasked))
    assert error.value.status == 500


def test_tokens_that_are_parts_of_characters_are_told_apart() -> None:
    parts = TokenProb(5, b"\xc3", -1.0, (TokenProb(6, b"\xa4", -0.5), TokenProb(7, " ä".encode(), -2.0)))
    assert listed(parts) == {"bytes:\\xa4": -0.5, " ä": -2.0, "bytes:\\xc3": -1.0}


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(99) }}",
        "{% for a in range(9) recursive %}{% if loop.depth < 99 %}{{ loop(range(9)) }}{% endif %}{% endfor %}",
    ],
)
def test_a_template_without_end_is_ended(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.runtime.serve.jinja.MOST_SECONDS", 0.1)
    template = ChatTemplate(source, {})
    with pytest.raises(ApiError, match=r"refuses these messages: it has not come to an end in 0\.1 s"):
        template.render([{"role": "user", "content": "x"}], {})


DOUBLING = "{% set n = namespace(x=FIRST) %}{% for a in range(99) %}{% set n.x = n.x OPERATOR n.x %}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{% for a in range(99999) %}{{ 'a' * 999 }}{% endfor %}", "longer than 32 million characters"),
        (DOUBLING.replace("FIRST", "'a'").replace("OPERATOR", "+"), "longer than"),
        (DOUBLING.replace("FIRST", "'a'").replace("OPERATOR", "~"), "longer than"),
        (DOUBLING.replace("FIRST", "[1]").replace("OPERATOR", "+"), "longer than"),
        ("{{ 'a' * 9999999999 }}", "longer than"),
        ("{{ '%09999999999d' % 1 }}", "too long"),
        ("{{ 9 ** 99999999 }}", "more than 65536 bits"),
        ("{{ 'a'.center(2 ** 62) }}", "more memory than there is"),
    ],
)
def test_a_template_that_grows_without_end_is_refused(source: str, why: str) -> None:
    with pytest.raises(ApiError, match=f"the chat template refuses these messages: .*{why}"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}], {})


def test_within_bounds_texts_and_numbers_are_jinjas() -> None:
    source = "{{ '%-5s|%d%%' % ('a', 7) }}{{ [1] + [2] }}{{ 'a' ~ 1 ~ none }}{{ 'ab' * 2 }}{{ 2 ** 10 }}{{ 7 % 4 }}"
    assert ChatTemplate(source, {}).render([], {}) == "a    |7%[1, 2]a1Noneabab10243"


def test_a_template_that_is_none_is_an_error_of_those_who_chat() -> None:
    with pytest.raises(ApiError, match="the model's chat template cannot be read"):
        ChatTemplate("{% for %}", {})


def test_impossible_tokens_have_a_probability_that_json_can_say() -> None:
    logits = np.array([0, -np.inf, 0, np.nan], np.float32)
    one = token_prob(logits, 0, 4, lambda token: b"%d" % token)
    assert one.logprob == pytest.approx(np.log(0.5))
    assert [(top.token, top.logprob) for top in one.top[2:]] == [(1, -9999.0), (3, -9999.0)]


def test_the_metrics_are_prometheus_text() -> None:
    meters = Meters()
    meters.add("generated_tokens", 3)
    for seconds in (0.001, 0.03, 99):
        meters.step.add(seconds)
    page = meters.page(State(1, 2, 30, 4), {200: 5}, 6).splitlines()
    assert {"llmc_generated_tokens_total 3", "llmc_waiting 2", 'llmc_http_responses_total{status="200"} 5'} <= set(page)
    assert {'llmc_step_seconds_bucket{le="0.05"} 2', 'llmc_step_seconds_bucket{le="+Inf"} 3'} <= set(page)
    names = {line.split()[2] for line in page if line.startswith("# TYPE")}
    assert all(line.split("{")[0].split()[0].startswith(tuple(names)) for line in page if not line.startswith("#"))


IMAGE = {"type": "image", "picture": Picture(b"")}
PICTURED: list[dict[str, Any]] = [
    {"role": "system", "content": "be"},
    {"role": "user", "content": [{"type": "text", "text": "see "}, IMAGE, {"type": "text", "text": " it"}]},
]
IMAGES_FIRST = (
    "{% for m in messages %}{{ m.role }}:{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}<i>"
    "{% endfor %}{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}{% endfor %}"
    "{% endfor %}"
)
EITHER = (
    "{% for m in messages %}{{ m.role }}:{% if m.content is string %}({{ m.content }}){% else %}"
    "{% for c in m.content %}{{ '<i>' if c.type == 'image' else c.text }}{% endfor %}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("source", "written"),
    [
        (IMAGES_FIRST, "system:beuser:<i>see  it"),
        (EITHER, "system:(be)user:see <i> it"),
        ("{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}", "system:beuser:<m>\nsee  it"),
        (
            "{% for m in messages %}{{ m.role }}:{{ m.content | string }}{{ m.type }}{% endfor %}",
            "system:beuser:<m>\nsee  it",
        ),
    ],
    ids=["parts alone", "texts and parts", "texts alone", "texts, and a type"],
)
def test_what_is_said_has_the_form_that_the_template_takes(source: str, written: str) -> None:
    template = ChatTemplate(source, {}, mark=lambda: "<m>")
    assert template.render(PICTURED, {}) == written
    assert template.render(PICTURED[:1], {}) == written.partition("user")[0]
    assert [picture.data for picture in pictures_in(PICTURED)] == [b""]


def test_pieces_are_put_together_and_taken_apart_again() -> None:
    picture = Picture(b"abc")
    content = content_of(["a", "b", picture, "", "c"])
    assert [part.get("text") for part in content if isinstance(part, dict)] == ["ab", None, "c"]
    assert (pieces_of(content), size_of(content)) == (["ab", picture, "c"], 6)
    assert content_of(["a", "", "b"]) == "ab"
    assert (pieces_of(""), pieces_of("a"), size_of("ab")) == ([], ["a"], 2)
