"""Calls of functions as Gemma 4 writes them: call:NAME{key:<|"|>text<|"|>,other:[1,true]}, JSON with quotes of its own,
and none around keys (ai.google.dev/gemma/docs/core/prompt-formatting-gemma4)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmc.runtime.parse_json import parse_json
from llmc.runtime.serve.field_forms import TEXT, choices_of, kinds_of, properties
from llmc.runtime.serve.forms import (
    Call,
    Form,
    Functions,
    Schema,
    SpecialTokens,
    in_lark,
    json_rule,
    literal,
    optional_row,
    spelled,
    text_rule,
)

CALL, QUOTE = "call:", '<|"|>'
SCALARS = frozenset(["integer", "number", "boolean", "null"])
PART = re.compile(
    r'<\|"\|>(?P<text>.*?)<\|"\|>|(?P<json>"(?:[^"\\]|\\.)*"|[{}\[\],:])|(?P<bare>[^{}\[\],:<"]+|[<"])', re.DOTALL
)
IS_JSON = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?|true|false|null")


@dataclass(frozen=True)
class GemmaForm(Form):
    @property
    def joint(self) -> str:
        return ""

    def calls_in(self, text: str, functions: Functions) -> list[Call]:
        head, brace, rest = text.partition("{")
        name = head.strip().removeprefix(CALL)
        try:
            return [Call(name, spelled(parse_json(as_json(brace + rest))))] if name in functions else []
        except ValueError:
            return []

    def rule(self, index: int, name: str, schema: Schema, special: SpecialTokens) -> list[str]:
        rules = Rules(index, special)
        return [f"call_{index}: {literal(f'{CALL}{name}')} {rules.object(schema)}", *rules.made]


def as_json(text: str) -> str:
    """What is between Gemma's quotes, and words without any, in JSON's."""
    parts = []
    for match in PART.finditer(text):
        bare = (match["bare"] or "").strip()
        is_key = text.startswith(":", match.end())
        if match["text"] is not None:
            parts.append(json.dumps(match["text"]))
        elif match["json"] or (IS_JSON.fullmatch(bare) and not is_key):
            parts.append(match["json"] or bare)
        elif bare:
            parts.append(json.dumps(bare))
    return "".join(parts)


class Rules:
    """Lark of a call's arguments: keys in the order of the alphabet, as Gemma's template has them."""

    def __init__(self, index: int, special: SpecialTokens) -> None:
        self._index, self._quote = index, in_lark(QUOTE, special)
        self._n_texts, self._special = 0, special
        text, anything = self._name("text"), self._name("anything")
        pair = f'/[^{{}}\\[\\],:<>"\\s]+/ ":" {anything}'
        self.made = [
            f"{text}: {self._quote} {text}_end",
            text_rule(f"{text}_end", QUOTE, special),
            f'{anything}: {text} | "{{" ({pair} ("," {pair})*)? "}}" | "[" ({anything} ("," {anything})*)? "]"'
            f" | {json_rule({'type': sorted(SCALARS)})}",
        ]
        self._n_objects = 0

    def _name(self, word: str) -> str:
        return f"{word}_{self._index}"

    def object(self, schema: Schema) -> str:
        """The name of the rule of an object with these properties, those that are required and any of the others."""
        self._n_objects += 1
        name, needed = self._name(f"object_{self._n_objects}"), schema.get("required")
        is_needed = [isinstance(needed, list) and key in needed for key in sorted(properties(schema))]
        fields = [f"{literal(f'{key}:')} {self._value(value)}" for key, value in sorted(properties(schema).items())]
        first, rules = optional_row(name, [*zip(fields, is_needed, strict=True)], '","')
        self.made += [*rules, f'{name}: "{{" {first} "}}"']
        return name

    def _value(self, schema: Any) -> str:
        choices, kinds = choices_of(schema), kinds_of(schema)
        if choices:
            return f"{self._quote} ({' | '.join(map(literal, choices))}) {self._quote}"
        if kinds == TEXT:
            self._n_texts += 1
            name = self._name(f"text_{self._n_texts}")
            self.made.append(text_rule(name, QUOTE, self._special, schema))
            return f"{self._quote} {name}"
        if kinds and kinds <= SCALARS:
            return json_rule({name: value for name, value in schema.items() if name != "description"})
        if kinds == {"object"} and properties(schema):
            return self.object(schema)
        if kinds == {"array"} and isinstance(schema, Mapping):
            item = self._value(schema.get("items"))
            return f'"[" ({item} ("," {item})*)? "]"'
        return self._name("anything")
