"""How models write calls of functions, each as its chat template shows it: see FORMS in known_forms.py."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from llmc.runtime.follow_schema import followed
from llmc.runtime.grammar import WHITESPACE
from llmc.runtime.parse_json import json_end, not_deep, parse_json

Schema: TypeAlias = Mapping[str, Any]
Functions: TypeAlias = Mapping[str, Schema]
"""Functions that may be called, by name: the schema of their parameters."""
SpecialTokens: TypeAlias = Mapping[str, str]
"""Marks that are special tokens, with their spelling in Lark."""


MOST_COUNTED = 2000
"""Lengths of texts are checked while they are written up to so many characters: more make large grammars."""


KEYS = ("arguments", "parameters")
"""What models call the arguments of a function, whatever their template calls them."""


BETWEEN_VALUES = " \t\r\n,;"


class Call(NamedTuple):
    """arguments: JSON."""

    name: str
    arguments: str


class Within(NamedTuple):
    """What stands before, between and behind the calls that share an opening and a closing."""

    before: str
    between: str
    behind: str


@dataclass(frozen=True)
class Form(ABC):
    """A call is: opening, what `calls_in` reads, closing.

    shown_by: what is found in templates of this form, and never: in others that look alike.  opening: "" where a call
    is a text that is a JSON object.  closing: "" where a call ends by itself.  within: where several calls have one
    opening and closing.  special: what of it, beside those two, may be special tokens.  repeats: another call may
    follow.
    """

    shown_by: str
    never: tuple[str, ...]
    opening: str
    closing: str
    within: Within | None = None
    special: tuple[str, ...] = ()
    repeats: bool = True

    @property
    def begin(self) -> str:
        """What a text begins with that may be a call, where there is no opening."""
        return self.within.before if self.within else "{"

    @property
    def joint(self) -> str:
        """The text between a closing and the next opening."""
        return "\n" if self.closing else ""

    @property
    def marks(self) -> tuple[str, ...]:
        """The marks that may be special tokens."""
        return tuple(filter(None, (self.opening.strip(), self.closing.strip(), *self.special)))

    def end_of(self, text: str) -> int:
        """Where a call that begins a text, behind its opening, ends, behind its closing; -1: it does not yet."""
        closing = self.closing.strip()
        at = text.find(closing) if closing else -1
        return at + len(closing) if at >= 0 else -1

    @abstractmethod
    def calls_in(self, text: str, functions: Functions) -> list[Call]:
        """The calls between an opening and its closing; none if anything is wrong."""

    @abstractmethod
    def rule(self, index: int, name: str, schema: Schema, special: SpecialTokens) -> list[str]:
        """Lark of one of the calls, which is named call_INDEX, and of what it needs."""


@dataclass(frozen=True)
class JsonForm(Form):
    """{"name": …, key: {…}}, or several of them, in a list or one behind another.

    name_key: of the name; "": the name itself is the one key, of the arguments.  id_key: of a number, as text, before
    the name.
    """

    key: str = "arguments"
    name_key: str = "name"
    id_key: str = ""

    def calls_in(self, text: str, functions: Functions) -> list[Call]:
        calls = []
        try:
            for value in json_values(text):
                for one in value if isinstance(value, list) else [value]:
                    name, arguments = self._read(one)
                    if name not in functions:
                        return []
                    calls.append(Call(name, spelled(arguments)))
        except ValueError:
            return []
        return calls

    def _read(self, one: object) -> tuple[str, object]:
        """-> (the name, the arguments).  Raises ValueError."""
        if not isinstance(one, dict):
            raise ValueError("a call is an object")
        if not self.name_key:
            [(name, arguments)] = one.items()
            return name, arguments
        name = one.get(self.name_key)
        if not isinstance(name, str):
            raise ValueError("no name")
        return name, next((one[key] for key in (self.key, *KEYS) if key in one), {})

    def rule(self, index: int, name: str, schema: Schema, special: SpecialTokens) -> list[str]:
        if not self.opening:  # beside an answer in JSON both have to be read by the same tokens
            return [f"call_{index}: {json_rule(object_of(name, schema, self.key))}"]
        head = f'"{self.name_key}": {json.dumps(name)}, "{self.key}": ' if self.name_key else f"{json.dumps(name)}: "
        begin = literal("{" + head)
        if self.id_key:
            before, behind = literal(f'{{"{self.id_key}": "'), literal(f'", {head}')
            begin = f"{before} /[0-9]{{1,3}}/ {behind}"
        return [f'call_{index}: {begin} arguments_{index} "}}"', f"arguments_{index}: {json_rule(schema)}"]


@dataclass(frozen=True)
class NamedForm(Form):
    """head, the name, what follows id_mark where there is one, between, {…}, tail.

    id_pattern: a regular expression of what follows id_mark.
    """

    head: str = ""
    id_mark: str = ""
    id_pattern: str = ""
    between: str = ""
    tail: str = ""

    def end_of(self, text: str) -> int:
        if self.closing:
            return super().end_of(text)
        _, found, rest = text.partition(self.between)
        end, again = json_end(rest) if found and "}" in rest else 0, text.find(self.opening)
        end += len(text) - len(rest) if end else 0
        return end if end and not 0 <= again < end else again  # what comes first, however the text comes

    def calls_in(self, text: str, functions: Functions) -> list[Call]:
        calls, tail = [], self.tail.strip()
        try:
            for part in filter(str.strip, text.split(tail) if tail else [text]):
                said, _, arguments = part.partition(self.between.strip())
                before, _, name = said.partition(self.head) if self.head else ("", "", said)
                name = (name.partition(self.id_mark)[0] if self.id_mark else name).strip()
                if before.strip() or name not in functions:
                    return []
                calls.append(Call(name, spelled(parse_json(arguments))))
        except ValueError:
            return []
        return calls

    def rule(self, index: int, name: str, schema: Schema, special: SpecialTokens) -> list[str]:
        call_id = f"{in_lark(self.id_mark, special)} /{self.id_pattern}/" if self.id_mark else ""
        head, between, tail = (in_lark(text, special) for text in (f"{self.head}{name}", self.between, self.tail))
        return [
            f"call_{index}: {head} {call_id} {between} arguments_{index} {tail}",
            f"arguments_{index}: {json_rule(schema)}",
        ]


def in_lark(text: str, special: SpecialTokens) -> str:
    """A text in Lark, with special tokens as such; nothing for an empty text."""
    parts = re.split(f"({'|'.join(map(re.escape, special))})", text) if special else [text]
    return " ".join(special.get(part) or literal(part) for part in parts if part)


def text_rule(name: str, end: str, special: SpecialTokens, schema: object = None) -> str:
    """A text as long as its schema lets it be, and what ends it, in llguidance's Lark, whose texts never have special
    tokens."""
    most = schema.get("maxLength") if isinstance(schema, Mapping) else None
    text = f"/(?s:.{{0,{most}}})/" if type(most) is int and 0 <= most <= MOST_COUNTED else "/(?s:.*)/"
    mark = end.strip()
    if mark in special:
        return f"{name}: {text} {special[mark]} {in_lark(end.partition(mark)[2], special)}"
    return f"{name}[suffix={literal(end)}]: {text}"


def literal(text: str) -> str:
    """A text as a literal of Lark."""
    return json.dumps(text, ensure_ascii=False)


def json_values(text: str) -> Iterator[Any]:
    """Values of JSON one behind another, with blanks, commas or semicolons between.  Raises ValueError."""
    while text := text.lstrip(BETWEEN_VALUES):
        end = json_end(text)
        yield parse_json(text[:end])
        text = text[end:]


def optional_row(name: str, fields: Sequence[tuple[str, bool]], joint: str) -> tuple[str, list[str]]:
    """-> (what stands for the row, its rules), in Lark: of fields, each what it is and whether it must be there, with
    the joint between those that are."""
    rules: list[str] = []
    first, more = "", ""  # of the fields from one on: as the first ones, and behind others
    for number, (field, must) in reversed([*enumerate(fields)]):
        names = f"{name}_first_{number}", f"{name}_more_{number}"
        rules.append(f"{names[0]}: {field} {more}{'' if must else f' | {first}'}")
        rules.append(f"{names[1]}: {joint} {field} {more}{'' if must else f' | {more}'}")
        first, more = names
    return first, rules


def object_of(name: str, schema: Schema, key: str) -> Schema:
    """The schema of a call that is an object."""
    properties = {"name": {"const": name}, key: schema}
    return {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    } | definitions(schema)


def definitions(schema: Schema) -> dict[str, Any]:
    """The definitions that parts of a schema may refer to."""
    return {name: schema[name] for name in ("$defs", "definitions") if name in schema}


def json_rule(schema: object) -> str:
    """The rule for JSON of a schema, in Lark, with no more properties than it names."""
    known = followed(schema)
    parts = known if isinstance(known, Mapping) else {} if known else {"not": {}}
    return f"%json {json.dumps({**parts, 'x-guidance': {'whitespace_pattern': WHITESPACE}})}"


def spelled(arguments: object) -> str:
    """As JSON that every client can read.  Raises ValueError: no object, nested too deep, a number that is none."""
    if not isinstance(arguments, dict):
        raise ValueError("arguments are an object")
    return json.dumps(not_deep(arguments), ensure_ascii=False, allow_nan=False)
