"""What an answer is wanted to look like, as OpenAI's and Anthropic's clients say it, vLLM's, and llama.cpp's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llmc.runtime.follow_schema import lenient
from llmc.runtime.grammar import Grammar
from llmc.runtime.parse_json import parse_json
from llmc.runtime.serve.fields import Fields, wrong

KINDS = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json",
    "grammar": "grammar",
}
"""vLLM's older fields, and llama.cpp's two, each as vLLM's 'structured_outputs' calls it."""
FORMAT_FIELDS = ("structured_outputs", *KINDS)
"""Fields that ask for a format, beside those of OpenAI's APIs."""
ANY_OBJECT = {"type": "object"}


class Format(NamedTuple):
    """param: the field that asks for it."""

    param: str
    grammar: Grammar


def read_format(fields: Fields, others: Sequence[Format] = ()) -> Format | None:
    """None: an answer may look like anything.  others: found elsewhere in the request.  Raises ApiError."""
    found = [
        *others,
        *read_response_format(fields),
        *read_structured(fields.of_type("structured_outputs", dict, {}, "an object")),
        *(read_kind(name, kind, fields.get(name)) for name, kind in KINDS.items() if fields.get(name) is not None),
    ]
    if len(found) > 1:
        raise wrong(found[1].param, f"cannot be had together with '{found[0].param}'")
    return found[0] if found else None


def read_response_format(fields: Fields) -> list[Format]:
    """A chat's format: {"type": "json_schema", "json_schema": {"schema": …}}, or one without a schema."""
    value = fields.of_type("response_format", dict, {"type": "text"}, "an object")
    if value.get("type") != "json_schema":
        return read_typed("response_format", value)
    said = value.get("json_schema")
    if not isinstance(said, dict) or "schema" not in said:
        raise wrong("response_format.json_schema", "must be an object with 'schema'")
    return [read_own("response_format.json_schema", said)]


def read_typed(place: str, value: Mapping[str, Any]) -> list[Format]:
    """{"type": "json_schema", "schema": …}, {"type": "json_object"}, {"type": "text"}."""
    kind = value.get("type")
    if kind == "text":
        return []
    if kind == "json_object":
        return [Format(place, Grammar.of_schema(ANY_OBJECT))]
    if kind != "json_schema":
        raise wrong(f"{place}.type", "must be 'text', 'json_object' or 'json_schema'")
    if not isinstance(value.get("schema"), dict):
        raise wrong(f"{place}.schema", "must be a JSON schema: an object")
    return [read_own(place, value)]


def read_own(place: str, said: Mapping[str, Any]) -> Format:
    """OpenAI's {"schema": …, "strict": …}, which is followed to the letter where it is strict."""
    schema = read_schema(f"{place}.schema", said["schema"])
    return Format(f"{place}.schema", Grammar.of_schema(schema if said.get("strict") is True else lenient(schema)))


def read_structured(value: Mapping[str, Any]) -> list[Format]:
    """vLLM's: {"json": …}, {"regex": …}, {"choice": …}, {"grammar": …} or {"json_object": true}."""
    given = {name: one for name, one in value.items() if one is not None and one is not False}
    for name in given:
        if name not in ("json", "regex", "choice", "grammar", "json_object"):
            raise wrong(f"structured_outputs.{name}", "is not known here")
    return [read_kind(f"structured_outputs.{name}", name, one) for name, one in given.items()]


def read_kind(param: str, kind: str, value: object) -> Format:
    if kind == "json_object":
        return Format(param, Grammar.of_schema(ANY_OBJECT))
    if kind == "json":
        return Format(param, Grammar.of_schema(read_schema(param, value)))
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(one, str) and one for one in value):
            raise wrong(param, "must be a list of texts; none of them empty")
        return Format(param, Grammar.of_choice(value))
    if not isinstance(value, str) or not value:
        raise wrong(param, "must be a text")
    return Format(param, Grammar.of_regex(value) if kind == "regex" else Grammar.of_rules(value))


def read_schema(param: str, value: object) -> object:
    """A schema, or the JSON of one."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise wrong(param, f"is not JSON: {error}") from None
    if not isinstance(value, dict | bool):
        raise wrong(param, "must be a JSON schema: an object")
    return value
