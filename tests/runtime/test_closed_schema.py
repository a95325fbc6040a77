"""Objects that have no properties but those that are named."""

from __future__ import annotations

from typing import Any

import pytest

from llmc.runtime.closed_schema import closed
from llmc.runtime.grammar import Grammar
from llmc.runtime.parse_json import parse_json
from llmc.runtime.serve.forms import json_rule

TEXT = {"type": "string"}
A = {"type": "object", "properties": {"a": TEXT}, "required": ["a"]}
B = {"type": "object", "properties": {"b": TEXT}}
SHUT = {"additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "becomes"),
    [
        (A, {**A, **SHUT}),
        ({"type": "object", "properties": {}}, {"type": "object", "properties": {}, **SHUT}),
        ({"properties": {"properties": A}}, {"properties": {"properties": {**A, **SHUT}}, **SHUT}),
        ({"type": "array", "items": A}, {"type": "array", "items": {**A, **SHUT}}),
        ({"prefixItems": [A, TEXT]}, {"prefixItems": [{**A, **SHUT}, TEXT]}),
        ({"anyOf": [A, B, {"type": "null"}]}, {"anyOf": [{**A, **SHUT}, {**B, **SHUT}, {"type": "null"}]}),
        ({"oneOf": [A, {"type": ["null", "string"]}]}, {"oneOf": [{**A, **SHUT}, {"type": ["null", "string"]}]}),
        (
            {"oneOf": [A, B], "discriminator": {"propertyName": "a"}},
            {"oneOf": [{**A, **SHUT}, {**B, **SHUT}], "discriminator": {"propertyName": "a"}},
        ),
        (
            {"properties": {"x": {"allOf": [{"$ref": "#/$defs/A"}], "title": "X"}}, "$defs": {"A": A}},
            {
                "properties": {"x": {"allOf": [{"$ref": "#/$defs/A"}], "title": "X"}},
                "$defs": {"A": {**A, **SHUT}},
                **SHUT,
            },
        ),
        (
            {"properties": {"x": TEXT}, "additionalProperties": A},
            {"properties": {"x": TEXT}, "additionalProperties": {**A, **SHUT}},
        ),
    ],
)
def test_objects_have_the_properties_that_are_named(schema: dict[str, Any], becomes: dict[str, Any]) -> None:
    assert closed(schema) == becomes
    assert closed(becomes) == becomes


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {"type": "object"},
        {**A, "additionalProperties": True},
        {**A, "patternProperties": {"^x": TEXT}},
        {**A, "required": ["a", "other"]},
        {**A, "minProperties": 2},
        {"enum": [A], "default": A},  # values, which only look like schemas
        {"allOf": [A, B]},
        {"oneOf": [A, B]},
        {**A, "anyOf": [B]},
        {"$ref": "#/$defs/A", "properties": {"b": TEXT}, "$defs": {"A": A}},
        {**A, "if": B},
        {"type": "array", "items": {**A, "not": B}},
        {"properties": {"a": "no schema"}, "required": "a"},
    ],
)
def test_what_says_more_of_an_object_stays_as_it_is(schema: object) -> None:
    assert closed(schema) == schema


def test_answers_and_calls_are_closed() -> None:
    assert parse_json(Grammar.of_schema(A).source) == {**A, **SHUT}
    assert '"additionalProperties": false' in json_rule(A)
