"""Functions that a model may ask its client to call.

A model writes a call in the form that its chat template shows (known_forms.py).  Where a call has to come, the form's
opening is put behind the prompt, and what follows is constrained; where it may come, calls.py looks for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmc.runtime.follow_schema import lenient
from llmc.runtime.grammar import Grammar
from llmc.runtime.parse_json import parse_json
from llmc.runtime.serve.fields import Fields, wrong
from llmc.runtime.serve.forms import Form, SpecialTokens, in_lark, json_rule, text_rule
from llmc.runtime.serve.thoughts import Frame

MIXED_KINDS = ("json_schema", "choice")
"""Kinds of grammars that an answer may follow beside tools that may be called."""
NO_PARAMETERS = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class Tools:
    """tools: as the client wrote them, for the template.  functions: those that may be called: the schema of their
    parameters, by name.  must_call: one of them has to be.  may_repeat: several may be."""

    tools: tuple[dict[str, Any], ...]
    functions: Mapping[str, dict[str, Any]]
    must_call: bool
    may_repeat: bool = True

    def grammar(
        self, form: Form, special: Mapping[int, str], answer: Grammar | None = None, frame: Frame | None = None
    ) -> Grammar:
        """Of one call, behind the form's opening; or, where there is a grammar of an answer, of that or of calls.
        special: marks of the form that are special tokens.  frame: around the whole text."""
        marks = in_angles(special)
        opening, closing, joint = (in_lark(text, marks) for text in (form.opening, form.closing, form.joint))
        before, between, behind = (in_lark(text, marks) for text in form.within or ("", "", ""))
        rules = [f"call: {' | '.join(f'call_{index}' for index in range(len(self.functions)))}"]
        for index, (name, schema) in enumerate(self.functions.items()):
            rules += form.rule(index, name, schema, marks)
        call = f"{before} call {behind} {closing}"
        if answer is None:
            return Grammar.of_lark("\n".join((f"start: {call}", *rules)))
        if self.may_repeat and form.within:
            call = f"{before} call ({between} call)* {behind} {closing}"
        elif self.may_repeat and form.repeats and opening:
            call = f"call {closing} ({joint} {opening} call {closing})*"
        return framed(answer, frame, special, f"{opening} {call}", rules)


def framed(
    answer: Grammar, frame: Frame | None, special: Mapping[int, str], call: str = "", rules: Sequence[str] = ()
) -> Grammar:
    """Of an answer of one of MIXED_KINDS, or of calls, in Lark, with its rules; behind a thought where there is a
    frame."""
    marks = in_angles(special)
    start = f"{in_lark(frame.answer, marks) if frame else ''} answer{f' | {call}' if call else ''}"
    lines = [f"answer: {answer_rule(answer)}", *rules]
    if frame is not None:
        start = f"thought? ({start})"
        lines.append(f"thought: {in_lark(frame.before, marks)} thinking {in_lark(frame.behind, marks)}")
        lines.append(text_rule("thinking", frame.end, marks))
    return Grammar.of_lark("\n".join((f"start: {start}", *lines)))


def in_angles(special: Mapping[int, str]) -> SpecialTokens:
    """As llguidance's Lark has them."""
    return {mark: f"<[{token}]>" for token, mark in special.items()}


def answer_rule(answer: Grammar) -> str:
    """The rule of an answer of one of MIXED_KINDS, in Lark."""
    if answer.kind == "json_schema":
        return json_rule(parse_json(answer.source))
    return " | ".join(map(json.dumps, parse_json(answer.source)))


def read_tools(fields: Fields) -> Tools | None:
    """The tools of a chat.  None: nothing may be called.  Raises ApiError."""
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
    """-> its name, and the schema of its parameters, which is in the field `key`; not to the letter unless it is
    "strict"."""
    name, parameters = function.get("name"), function.get(key)
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,128}", name, re.ASCII):
        raise wrong(f"{place}.name", "must be letters, digits, dots, dashes and underscores, 128 at most")
    if not isinstance(parameters, dict | None):
        raise wrong(f"{place}.{key}", "must be a JSON schema: an object")
    exact = function.get("strict") is True
    return name, (parameters if exact else lenient(parameters)) or NO_PARAMETERS


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
    """The arguments of a call: an object, or the JSON of one."""
    arguments = arguments or {}
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments)
        except ValueError as error:
            raise wrong(place, f"is not JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise wrong(place, "must be an object, as JSON")
    return arguments
