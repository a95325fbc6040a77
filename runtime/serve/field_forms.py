"""Calls of functions that are written field by field, between marks as in XML: texts as they are, all else as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from llmc.runtime.parse_json import parse_json
from llmc.runtime.serve.forms import (
    Call,
    Form,
    Functions,
    Schema,
    SpecialTokens,
    definitions,
    in_lark,
    json_rule,
    literal,
    spelled,
    text_rule,
)
from llmc.runtime.serve.python_text import value_as_json

KINDS = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
TEXT = frozenset(["string"])
TEXT_ALONE: Schema = {"type": "string"}


class Around(NamedTuple):
    """The texts that stand before something, and behind it."""

    before: str
    behind: str


NOTHING = Around("", "")


@dataclass(frozen=True)
class FieldForm(Form):
    """The name, then fields, each a key and a value, with what stands around them; then the ending.

    typed: what stands before a value that is a text, and before one in JSON, where the two are told apart so.  quote:
    what may stand around a text that has marks of its own.  A model that leaves out a line's end, or has one more, is
    understood as well.
    """

    name: Around = NOTHING
    key: Around = NOTHING
    value: Around = NOTHING
    ending: str = ""
    typed: tuple[str, str] | None = None
    quote: Around | None = None

    def calls_in(self, text: str, functions: Functions) -> list[Call]:
        calls: list[Call] = []
        try:
            while text.strip():
                name, text = self._named(text.lstrip())
                if name not in functions or (calls and not self.within):
                    return []
                values, text = self._fields(text, functions[name])
                calls.append(Call(name, spelled(values)))
        except ValueError:
            return []
        return calls

    def _named(self, text: str) -> tuple[str, str]:
        """-> (name, what is behind it).  Raises ValueError."""
        before, behind = self.name.before.strip(), self.name.behind.strip()
        if not text.startswith(before):
            raise ValueError("no name")
        name, mark, rest = text.removeprefix(before).partition(behind or self.key.before)
        return name.strip(), rest if behind else mark + rest

    def _fields(self, text: str, schema: Schema) -> tuple[dict[str, Any], str]:
        """-> (values, what is behind the ending).  Raises ValueError where there is something else."""
        values: dict[str, Any] = {}
        ending, middle = self.ending.strip(), self.key.behind.strip()
        while (text := text.lstrip()).startswith(self.key.before):
            key, found, text = text.removeprefix(self.key.before).partition(middle)
            if not found:
                raise ValueError("no field")
            values[key.strip()], text = self._value(text, properties(schema).get(key.strip(), {}))
        if text and not (ending and text.startswith(ending)):
            raise ValueError("no field")
        return values, text.removeprefix(ending)

    def _value(self, text: str, schema: object) -> tuple[Any, str]:
        """-> (the value that a text begins with, what is behind it).  Raises ValueError."""
        is_text = self.typed is not None and text.startswith(self.typed[0])
        start, end = self._start(is_text).strip(), self.value.behind.strip()
        blank, begins, text = text.partition(start) if start else ("", "-", text)
        is_quoted = self.quote is not None and text.startswith(self.quote.before)
        if self.quote is not None and is_quoted:
            text, end = text.removeprefix(self.quote.before), f"{self.quote.behind}{end}"
        value, ends, text = text.partition(end)
        if blank.strip() or not (begins and ends):
            raise ValueError("no field")
        if self.value.before == "\n":
            value = value.removeprefix("\n").removesuffix("\n")
        return read_value(value, TEXT_ALONE if is_text or is_quoted else schema), text

    def _start(self, is_text: bool) -> str:
        """What stands before a value."""
        return self.typed[0 if is_text else 1] if self.typed else self.value.before

    def rule(self, index: int, name: str, schema: Schema, special: SpecialTokens) -> list[str]:
        rules, fields = list[str](), list[str]()
        needed, behind = schema.get("required"), in_lark(self.value.behind, special)
        for number, (key, value) in enumerate(properties(schema).items()):
            field, text = f"field_{index}_{number}", f"text_{index}_{number}"
            start = self._start(kinds_of(value) == TEXT)
            head = in_lark(f"{self.key.before}{key}{self.key.behind}{start}", special)
            if kinds_of(value) == TEXT and not choices_of(value):
                rules += [f"{field}: {head} {text}", text_rule(text, self.value.behind, special, value)]
            else:
                rules.append(f"{field}: {head} {value_rule(value, definitions(schema))} {behind}")
            fields.append(field if isinstance(needed, list) and key in needed else f"{field}?")
        head, ending = in_lark(f"{self.name.before}{name}{self.name.behind}", special), in_lark(self.ending, special)
        return [f"call_{index}: {head} {' '.join(fields)} {ending}", *rules]


def value_rule(schema: object, shared: Schema) -> str:
    """One of some texts, or JSON, in Lark.  shared: what the schema may refer to."""
    if choices := choices_of(schema):
        return f"({' | '.join(map(literal, choices))})"
    return json_rule({**schema, **shared} if isinstance(schema, Mapping) else schema)


def properties(schema: Schema) -> Mapping[str, Any]:
    found = schema.get("properties")
    return found if isinstance(found, Mapping) else {}


def choices_of(schema: object) -> list[str]:
    """The texts that a value may be, if these are all."""
    if not isinstance(schema, Mapping):
        return []
    choices = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return choices if isinstance(choices, list) and all(isinstance(one, str) for one in choices) else []


def kinds_of(schema: object) -> frozenset[str]:
    """The types that a schema names, of alternatives too; none: it does not say."""
    if not isinstance(schema, Mapping):
        return frozenset()
    if choices_of(schema):
        return TEXT
    named = schema.get("type")
    kinds = {kind for kind in (named if isinstance(named, list) else [named]) if isinstance(kind, str)}
    for alternatives in (schema.get("anyOf"), schema.get("oneOf")):
        for one in alternatives if isinstance(alternatives, list) else []:
            kinds |= kinds_of(one)
    return frozenset(kinds)


def read_value(text: str, schema: object) -> Any:
    """A text as it is, where the schema takes one and it is nothing else that the schema takes; otherwise as JSON, or
    as Python, which some templates write."""
    kinds = kinds_of(schema)
    if kinds == TEXT:
        return text
    try:
        value = value_in(text) if kinds else parse_json(text)
    except ValueError:
        return text
    kind = "null" if value is None else KINDS[type(value)]
    is_one = not kinds or kind in kinds or (kind == "integer" and "number" in kinds)
    return value if is_one or "string" not in kinds else text


def value_in(text: str) -> Any:
    """The value in JSON, or one in Python that is no text.  Raises ValueError."""
    try:
        return parse_json(text)
    except ValueError:
        value = parse_json(value_as_json(text))
        if isinstance(value, str):
            raise
        return value
