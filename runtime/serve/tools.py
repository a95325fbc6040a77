"""Functions that a model may ask its client to call: what is offered, and how calls are written.

A model writes a call in the form that its chat template shows, one of FORMS.  Where a call has to come, the form's
opening is put behind the prompt, and what follows is constrained; where it may come, calls.py looks for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmc.runtime.grammar import WHITESPACE, Grammar
from llmc.runtime.parse_json import parse_json
from llmc.runtime.serve.fields import Fields, wrong

MIXED_KINDS = ("json_schema", "choice")
"""Of grammars: those that an answer may follow beside tools that may be called."""
NO_PARAMETERS = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class Form:
    """How a call is written: opening, {"name": …, key: {…}}, closing.  Or, with a mark between: opening, the name, an
    id behind id_mark where there is one, the mark, {…}; such a call has no closing.

    shown_by: what is found in templates of this form, and never: in others that look alike.  listed: calls are a JSON
    list.  opening: "" where a call is a text that is a JSON object.  joint: between calls.
    """

    shown_by: str
    never: tuple[str, ...]
    opening: str
    closing: str
    key: str
    listed: bool = False
    between: str = ""
    id_mark: str = ""

    @property
    def joint(self) -> str:
        return "\n" if self.closing else ""

    @property
    def marks(self) -> tuple[str, ...]:
        """Those that may be special tokens."""
        return tuple(filter(None, (self.opening.strip(), self.closing.strip(), self.between, self.id_mark)))


FORMS = (
    Form("<tool_call>", ("<function=", "<arg_key>"), "<tool_call>\n", "\n</tool_call>", "arguments"),  # Hermes, Qwen
    Form("[TOOL_CALLS]", ("[ARGS]",), "[TOOL_CALLS]", "", "arguments", listed=True),  # Mistral, up to v7
    Form("[CALL_ID]", (), "[TOOL_CALLS]", "", "", between="[ARGS]", id_mark="[CALL_ID]"),  # Mistral, v11
    Form("[ARGS]", ("[CALL_ID]",), "[TOOL_CALLS]", "", "", between="[ARGS]"),  # Mistral, v13
    Form('{"name": function name, "parameters"', ("<tool_call>",), "", "", "parameters"),  # Llama 3
)
PLAIN = Form("", (), "", "", "arguments")
"""Where a call has to come and the template shows no form."""


def form_of(template: str) -> Form | None:
    """The form that a chat template shows."""
    for form in FORMS:
        if form.shown_by in template and not any(other in template for other in form.never):
            return form
    return None


@dataclass(frozen=True)
class Tools:
    """tools: as the client wrote them, for the template.  functions: those that may be called: the schema of their
    parameters, by name.  must_call: one of them has to be.  may_repeat: several may be."""

    tools: tuple[dict[str, Any], ...]
    functions: Mapping[str, dict[str, Any]]
    must_call: bool
    may_repeat: bool = True

    def grammar(self, form: Form, special: Mapping[int, str], answer: Grammar | None = None) -> Grammar:
        """Of one call, behind the form's opening; or, where there is a grammar of an answer, of that or of calls.
        special: marks of the form that are special tokens."""
        marks = {mark: f"<[{token}]>" for token, mark in special.items()}
        calls, rules = [], []
        for index, (name, schema) in enumerate(self.functions.items()):
            if answer is not None and not form.opening:
                calls.append(f"call_{index}")
                rules.append(f"call_{index}: {json_rule(object_of(name, schema, form.key))}")
                continue
            if form.between:
                call_id = f"{in_lark(form.id_mark, marks)} /[a-zA-Z0-9]{{9}}/" if form.id_mark else ""
                calls.append(f"{json.dumps(name)} {call_id} {in_lark(form.between, marks)} arguments_{index}")
            else:
                head = f'{{"name": {json.dumps(name)}, "{form.key}": '
                calls.append(f'{json.dumps(head)} arguments_{index} "}}"')
            rules.append(f"arguments_{index}: {json_rule(schema)}")
        rules.append(f"call: {' | '.join(calls)}")
        opening, closing = in_lark(form.opening, marks), in_lark(form.closing, marks)
        if answer is None:
            start = f'"[" call "]" {closing}' if form.listed else f"call {closing}"
        elif form.listed:
            more = '(", " call)*' if self.may_repeat else ""
            start = f'answer | {opening} "[" call {more} "]" {closing}'
        else:
            more = f"({in_lark(form.joint, marks)} {opening} call {closing})*" if self.may_repeat and opening else ""
            start = f"answer | {opening} call {closing} {more}"
        if answer is not None:
            rules.append(f"answer: {answer_rule(answer)}")
        return Grammar.of_lark("\n".join((f"start: {start}", *rules)))


def in_lark(text: str, marks: Mapping[str, str]) -> str:
    """In Lark; nothing of nothing.  marks: how those are spelled that are special tokens."""
    mark = text.strip()
    before, _, behind = text.partition(mark) if mark else (text, "", "")
    parts = json.dumps(before), marks.get(mark, json.dumps(mark)), json.dumps(behind)
    return " ".join(part for part in parts if part != '""')


def object_of(name: str, schema: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The schema of a call that is an object: beside an answer in JSON both have to be read by the same tokens."""
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    properties = {"name": {"const": name}, key: schema}
    return {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    } | shared


def json_rule(schema: object) -> str:
    """JSON of a schema, in Lark."""
    parts = schema if isinstance(schema, dict) else {} if schema else {"not": {}}
    return f"%json {json.dumps({**parts, 'x-guidance': {'whitespace_pattern': WHITESPACE}})}"


def answer_rule(answer: Grammar) -> str:
    """Of one of MIXED_KINDS, in Lark."""
    if answer.kind == "json_schema":
        return json_rule(parse_json(answer.source))
    return " | ".join(map(json.dumps, parse_json(answer.source)))


def read_tools(fields: Fields) -> Tools | None:
    """Of a chat.  None: nothing may be called.  Raises ApiError."""
    listed: list[Any] = fields.of_type("tools", list, [], "a list")
    functions = dict(read_tool(f"tools[{index}]", tool) for index, tool in enumerate(listed))
    mode, names = read_choice(fields.get("tool_choice"))
    return chosen(listed, functions, mode, names, fields.boolean("parallel_tool_calls", True))


def chosen(
    listed: Sequence[dict[str, Any]],
    functions: Mapping[str, dict[str, Any]],
    mode: str | None,
    names: Sequence[object] | None,
    may_repeat: bool,
) -> Tools | None:
    """The tools of a request: listed as chats have them, with the schemas of their parameters.

    mode: "auto", "required" or "none"; None: what is usual.  names: of those that may be called; None: all.
    Raises ApiError.
    """
    allowed = dict(functions)
    if names is not None:
        known = [name for name in names if isinstance(name, str) and name in functions]
        if not known or len(known) < len(names):
            raise wrong("tool_choice", "must name a function of 'tools'")
        allowed = {name: functions[name] for name in known}
    if mode == "required" and not listed:
        raise wrong("tool_choice", "needs 'tools'")
    if not listed or mode == "none":
        return None
    if mode == "required":
        return Tools(tuple(listed), allowed, True, may_repeat)
    # told of others, the model might be tempted to call one
    shown = tuple(tool for tool in listed if tool["function"]["name"] in allowed)
    return Tools(shown, allowed, False, may_repeat)


def read_choice(choice: object) -> tuple[str | None, list[object] | None]:
    """-> (mode, names) as `chosen` takes them."""
    if not isinstance(choice, dict):
        if choice not in (None, "none", "auto", "required"):
            raise wrong("tool_choice", "must be 'none', 'auto', 'required', a function, or 'allowed_tools'")
        return choice if isinstance(choice, str) else None, None
    if choice.get("type") == "allowed_tools":
        return read_allowed(choice.get("allowed_tools", choice))
    return "required", [name_in(choice)]


def read_allowed(allowed: object) -> tuple[str, list[object]]:
    """OpenAI's {"mode": …, "tools": [{"type": "function", …}]}: some of the tools that the model is told of."""
    mode, tools = (allowed.get("mode"), allowed.get("tools")) if isinstance(allowed, dict) else (None, None)
    if mode not in ("auto", "required") or not isinstance(tools, list):
        raise wrong("tool_choice", "must have 'mode', which is 'auto' or 'required', and 'tools', a list of functions")
    return mode, [name_in(tool) for tool in tools]


def name_in(tool: object) -> object:
    """The name of {"function": {"name": …}}, or of {"name": …}."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    return function.get("name") if isinstance(function, dict) else None


def read_tool(place: str, tool: object) -> tuple[str, dict[str, Any]]:
    """-> the function's name, and the schema of its parameters."""
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    if not isinstance(function, dict):
        raise wrong(place, 'must be {"type": "function", "function": …}')
    return read_function(f"{place}.function", function)


def read_function(place: str, function: Mapping[str, Any], key: str = "parameters") -> tuple[str, dict[str, Any]]:
    """-> its name, and the schema of its parameters, which is in the field `key`."""
    name, parameters = function.get("name"), function.get(key)
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,128}", name, re.ASCII):
        raise wrong(f"{place}.name", "must be letters, digits, dots, dashes and underscores, 128 at most")
    if not isinstance(parameters, dict | None):
        raise wrong(f"{place}.{key}", "must be a JSON schema: an object")
    return name, parameters or NO_PARAMETERS


def as_chats_have_it(function: Mapping[str, Any], key: str = "parameters") -> dict[str, Any]:
    """A function that another API has written, as templates take it.  key: the field with its schema."""
    said = {"name": function["name"], "description": function.get("description"), "parameters": function.get(key)}
    return {"type": "function", "function": {name: value for name, value in said.items() if value is not None}}


def read_calls(place: str, calls: object) -> list[dict[str, Any]]:
    """Calls of an earlier answer, as templates take them: with the arguments as an object, where clients have JSON."""
    if not isinstance(calls, list):
        raise wrong(place, "must be a list")
    return [read_call(f"{place}[{index}]", call) for index, call in enumerate(calls)]


def read_call(place: str, call: object) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise wrong(place, "must be an object with 'function', and that with 'name' and 'arguments'")
    arguments = read_arguments(f"{place}.function.arguments", function.get("arguments"))
    return {**call, "function": {**function, "arguments": arguments}}


def read_arguments(place: str, arguments: object) -> dict[str, Any]:
    """Of a call: an object, or the JSON of one."""
    arguments = arguments or {}
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments)
        except ValueError as error:
            raise wrong(place, f"is not JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise wrong(place, "must be an object, as JSON")
    return arguments
