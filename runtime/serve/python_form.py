"""Calls of functions as Python writes them: name(key='text', other=[1, True]), of Llama 4 and LFM2 and others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmc.runtime.serve.field_forms import kinds_of, properties
from llmc.runtime.serve.forms import (
    Call,
    Functions,
    JsonForm,
    Schema,
    SpecialTokens,
    definitions,
    json_rule,
    literal,
    optional_row,
)
from llmc.runtime.serve.python_text import calls_as_json


@dataclass(frozen=True)
class PythonForm(JsonForm):
    def calls_in(self, text: str, functions: Functions) -> list[Call]:
        try:
            return super().calls_in(calls_as_json(text), functions)
        except ValueError:
            return []

    def rule(self, index: int, name: str, schema: Schema, special: SpecialTokens) -> list[str]:
        needed = schema.get("required")
        fields = [
            (f"{literal(f'{key}=')} {value_rule(value, schema)}", isinstance(needed, list) and key in needed)
            for key, value in properties(schema).items()
        ]
        first, rules = optional_row(f"arguments_{index}", fields, '", "')
        return [f'call_{index}: {literal(f"{name}(")} {first} ")"', *rules]


def value_rule(value: Any, schema: Schema) -> str:
    """Of a value, in Lark: as JSON, but for a truth alone."""
    if kinds_of(value) == {"boolean"} and not {"enum", "const"} & set(value):
        return '("True" | "False")'
    return json_rule({**value, **definitions(schema)} if isinstance(value, Mapping) else value)
