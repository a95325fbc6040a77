"""Functions that a model may ask its client to call: what is offered, and what of an answer is such a call.

A model writes a call in the form that its chat template shows, one of FORMS.  Where a call has to come, the form's
opening is put behind the prompt, and what follows is constrained; where it may come, it is looked for in the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from llmc.runtime.grammar import WHITESPACE, Grammar
from llmc.runtime.parse_json import json_end, parse_json
from llmc.runtime.serve.fields import Fields, wrong
from llmc.runtime.serve.stops import overlap

NO_PARAMETERS = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class Form:
    """How a call is written: opening, {"name": …, key: {…}}, closing.  Or, with a mark between: opening, the name, an
    id behind id_mark where there is one, the mark, {…}; such a call has no closing.

    shown_by: what is found in templates of this form, and never: in others that look alike.  listed: calls are a JSON
    list.  opening: "" where a call is a text that is a JSON object.
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

    def grammar(self, form: Form, special: Mapping[int, str]) -> Grammar:
        """Of one call, behind the form's opening.  special: marks of the form that are special tokens."""
        tokens = {mark: f"<[{token}]>" for token, mark in special.items()}

        def spelled(mark: str) -> str:
            return tokens.get(mark, json.dumps(mark))

        calls, schemas = [], []
        for index, (name, schema) in enumerate(self.functions.items()):
            if form.between:
                call_id = f"{spelled(form.id_mark)} /[a-zA-Z0-9]{{9}}/ " if form.id_mark else ""
                calls.append(f"{json.dumps(name)} {call_id}{spelled(form.between)} arguments_{index}")
            else:
                head = f'{{"name": {json.dumps(name)}, "{form.key}": '
                calls.append(f'{json.dumps(head)} arguments_{index} "}}"')
            spaced = {**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}}
            schemas.append(f"arguments_{index}: %json {json.dumps(spaced)}")
        before, behind = ('"["', '"]"') if form.listed else ("", json.dumps(form.closing) if form.closing else "")
        start = f"start: {before} ({' | '.join(calls)}) {behind}"
        return Grammar.of_lark("\n".join((start, *schemas)))


def read_tools(fields: Fields) -> Tools | None:
    """None: nothing may be called.  Raises ApiError."""
    listed: list[Any] = fields.of_type("tools", list, [], "a list")
    choice = fields.get("tool_choice")
    if choice is None:
        choice = "auto" if listed else "none"
    may_repeat = fields.boolean("parallel_tool_calls", True)
    functions = dict(read_tool(f"tools[{index}]", tool) for index, tool in enumerate(listed))
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or name not in functions:
            raise wrong("tool_choice", "must name a function of 'tools'")
        return Tools(tuple(listed), {name: functions[name]}, True, may_repeat)
    if choice not in ("none", "auto", "required"):
        raise wrong("tool_choice", "must be 'none', 'auto', 'required' or the name of a function")
    if choice == "required" and not listed:
        raise wrong("tool_choice", "needs 'tools'")
    if not listed or choice == "none":
        return None
    return Tools(tuple(listed), functions, choice == "required", may_repeat)


def read_tool(place: str, tool: object) -> tuple[str, dict[str, Any]]:
    """-> the function's name, and the schema of its parameters."""
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    if not isinstance(function, dict):
        raise wrong(place, 'must be {"type": "function", "function": …}')
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII):
        raise wrong(f"{place}.function.name", "must be letters, digits, dots, dashes and underscores, 64 at most")
    if not isinstance(parameters, dict | None):
        raise wrong(f"{place}.function.parameters", "must be a JSON schema: an object")
    return name, parameters or NO_PARAMETERS


def read_calls(place: str, calls: object) -> list[dict[str, Any]]:
    """Calls of an earlier answer, as templates take them: with the arguments as an object, where clients have JSON."""
    if not isinstance(calls, list):
        raise wrong(place, "must be a list")
    return [read_call(f"{place}[{index}]", call) for index, call in enumerate(calls)]


def read_call(place: str, call: object) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise wrong(place, "must be an object with 'function', and that with 'name' and 'arguments'")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments)
        except ValueError as error:
            raise wrong(f"{place}.function.arguments", f"is not JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise wrong(f"{place}.function.arguments", "must be an object, as JSON")
    return {**call, "function": {**function, "arguments": arguments}}


class Call(NamedTuple):
    """arguments: JSON."""

    name: str
    arguments: str


class CallScanner:
    """Tells the calls in a text, which comes in pieces, from what is said to people."""

    def __init__(self, tools: Tools, form: Form) -> None:
        self._names, self._form, self._is_forced = set(tools.functions), form, tools.must_call
        self._most = None if tools.may_repeat else 1
        self._opening, self._closing = form.opening.strip(), form.closing.strip()
        self._held = ""
        self._is_in_call = tools.must_call
        self._is_at_start = True
        self._skips_blanks = False  # behind a call
        self.n_calls = 0

    def push(self, piece: str, is_last: bool) -> tuple[str, list[Call]]:
        """-> (what is said to people, the calls that have come to their end).  is_last: hold nothing back."""
        self._held += piece
        said, calls = "", list[Call]()
        while True:
            if self._is_in_call:
                text = self._whole_call(is_last)
                if text is None:
                    break
                found = self._calls_in(text.removesuffix(self._closing))
                said += "" if found else self._as_it_was(text)
                self._skips_blanks = bool(found)
                kept = found if self._most is None else found[: self._most - self.n_calls]
                calls += kept
                self.n_calls += len(kept)
            before = self._before_call(is_last)
            before = before.lstrip() if self._skips_blanks else before
            self._skips_blanks &= not before
            said += before
            if not self._is_in_call:
                break
        return said, calls

    def _before_call(self, is_last: bool) -> str:
        """What is surely said before the next call; whether that has begun is in _is_in_call."""
        held, opening = self._held, self._opening
        if opening:
            at = held.find(opening)
            self._is_in_call = at >= 0
            if at >= 0:
                self._held = held[at + len(opening) :]
                return held[:at]
            n_safe = len(held) - (0 if is_last else overlap(held, opening))
        elif self._is_at_start and not held.strip():
            n_safe = len(held) if is_last else 0
        else:
            self._is_in_call = self._is_at_start and held.lstrip().startswith("{")
            self._is_at_start = False
            n_safe = 0 if self._is_in_call else len(held)
        self._held = held[n_safe:]
        return held[:n_safe]

    def _whole_call(self, is_last: bool) -> str | None:
        """The text of a call, with its closing where that has come; None: it has not come to its end."""
        held = self._held
        end = -1 if self._is_forced else self._call_end()  # a call that has to come is all there is, to its end
        if end < 0:
            if not is_last:
                return None
            end = len(held)
        self._is_in_call = self._is_at_start = False
        text, self._held = held[:end], held[end:]
        return text

    def _call_end(self) -> int:
        """Where in what is held a call ends, behind its closing; -1: it does not yet."""
        if self._closing:
            at = self._held.find(self._closing)
            return at + len(self._closing) if at >= 0 else -1
        if not self._form.between:
            return -1
        end = arguments_end(self._held, self._form.between)
        return self._held.find(self._opening) if end < 0 else end

    def _calls_in(self, text: str) -> list[Call]:
        return (call_behind_name if self._form.between else calls_in)(text, self._form, self._names)

    def _as_it_was(self, text: str) -> str:
        """What looked like a call and is none."""
        return text if self._is_forced else f"{self._opening}{text}"


def arguments_end(text: str, mark: str) -> int:
    """Where the object behind a mark ends; -1: it does not yet."""
    _, found, rest = text.partition(mark)
    end = json_end(rest) if found and "}" in rest else 0
    return len(text) - len(rest) + end if end else -1


def call_behind_name(text: str, form: Form, names: Collection[str]) -> list[Call]:
    """The call of a name, a mark and arguments; none if anything is wrong."""
    head, _, arguments = text.partition(form.between)
    name = (head.partition(form.id_mark)[0] if form.id_mark else head).strip()
    try:
        value = parse_json(arguments)
    except ValueError:
        return []
    return [Call(name, json.dumps(value, ensure_ascii=False))] if name in names and isinstance(value, dict) else []


def calls_in(text: str, form: Form, names: Collection[str]) -> list[Call]:
    """The calls of a JSON object, or of a list of some; none if anything is wrong."""
    try:
        value = parse_json(text)
    except ValueError:
        return []
    calls = []
    for one in value if isinstance(value, list) else [value]:
        name = one.get("name") if isinstance(one, dict) else None
        arguments = one.get(form.key, {}) if isinstance(one, dict) else None
        if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
            return []
        calls.append(Call(name, json.dumps(arguments, ensure_ascii=False)))
    return calls
