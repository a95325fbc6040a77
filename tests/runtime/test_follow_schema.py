"""Schemas, before they are followed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llmc
from llmc.runtime.binding import Model
from llmc.runtime.errors import LlmcError
from llmc.runtime.follow_schema import FORMATS, NOT_FOLLOWED, followed, lenient
from llmc.runtime.grammar import Grammar
from llmc.runtime.parse_json import parse_json
from llmc.runtime.serve.fields import Fields
from llmc.runtime.serve.formats import read_response_format, read_typed
from llmc.runtime.serve.forms import json_rule
from llmc.runtime.serve.tools import read_function
from tests.runtime.stub_artifact import characters_json, write_stub

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
    assert followed(schema) == becomes
    assert followed(becomes) == becomes


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
    assert followed(schema) == schema


def test_answers_and_calls_are_closed() -> None:
    assert parse_json(Grammar.of_schema(A).source) == {**A, **SHUT}
    assert '"additionalProperties": false' in json_rule(A)


NUMBERS = {"type": "object", "additionalProperties": {"type": "number"}}


@pytest.mark.parametrize(
    ("schema", "becomes"),
    [
        ({"format": "uri-reference", **TEXT}, TEXT),
        ({"format": "uuid4", **TEXT}, {"format": "uuid", **TEXT}),
        ({**NUMBERS, "propertyNames": TEXT}, NUMBERS),
        (
            {**NUMBERS, "propertyNames": {"enum": ["x", "y"]}},
            {"type": "object", "properties": {key: {"type": "number"} for key in "xy"}, **SHUT},
        ),
        (
            {"propertyNames": {"type": "string", "pattern": "^x"}, "type": "object"},
            {"patternProperties": {"^x": True}, "type": "object", **SHUT},
        ),
        ({**A, "propertyNames": {"enum": ["a"]}}, {**A, "propertyNames": {"enum": ["a"]}, **SHUT}),
    ],
)
def test_what_is_not_known_is_said_otherwise(schema: dict[str, Any], becomes: dict[str, Any]) -> None:
    assert followed(schema) == becomes


@pytest.mark.parametrize("pattern", ["^(?!x)y", "(?<=a)b", r"\bfoo", r"(a)\1", r"x\\\b"])
def test_what_cannot_be_followed_is_left_out_of_lenient_schemas(pattern: str) -> None:
    strict = {"properties": {"x": {**TEXT, "pattern": pattern}, "y": {"items": {"oneOf": [A, B]}}}}
    loose = {"properties": {"x": TEXT, "y": {"items": {"anyOf": [A, B]}}}}
    assert lenient({**strict, "not": A}) == loose
    assert lenient({**loose, **dict.fromkeys(NOT_FOLLOWED, False)}) == loose


@pytest.mark.parametrize("pattern", ["^(?:x|y)$", r"\\b", r"a\.b", "(?i)x"])
def test_expressions_that_can_be_followed_stay(pattern: str) -> None:
    assert lenient({**TEXT, "pattern": pattern}) == {**TEXT, "pattern": pattern}


def test_what_is_strict_is_followed_to_the_letter() -> None:
    schema = {"type": "array", "items": TEXT, "uniqueItems": True}
    for strict, said in ((True, schema), (False, {"type": "array", "items": TEXT})):
        own = {"strict": strict, "schema": schema}
        wanted = [
            *read_response_format(Fields({"response_format": {"type": "json_schema", "json_schema": own}})),
            *read_typed("text.format", {"type": "json_schema", **own}),
        ]
        assert [parse_json(one.grammar.source) for one in wanted] == [said, said]
        assert read_function("tools[0]", {"name": "f", "parameters": schema, "strict": strict}) == ("f", said)


def test_llguidance_takes_what_is_left(model: Model) -> None:
    for name in FORMATS:
        model.guide.constraint(Grammar.of_schema({**TEXT, "format": name}))
    for name in NOT_FOLLOWED:
        with pytest.raises(LlmcError, match=rf'the grammar cannot be used: Unimplemented keys: \["{name}"\]\n'):
            model.guide.constraint(Grammar.of_lark(f"start: {json_rule({'type': 'object', name: A})}"))


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Model]:
    with llmc.load(write_stub(tmp_path / "a.so", tokenizer=characters_json())) as model:
        yield model
