"""Objects that have the properties their schema names, and no others.

JSON Schema lets an object have more, and few who write a schema say that it may not.  A model that may go on often does
so until its tokens are spent, and functions are called with arguments that they do not take.  vLLM and llama.cpp close
such objects too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SCHEMAS = ("items", "contains", "additionalProperties")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
NAMED = ("properties", "patternProperties", "$defs", "definitions")
"""Keywords whose value is a schema, a list of some, or an object of some."""
APART = ("anyOf", "oneOf", "allOf", "$ref")
TOGETHER = ("not", "if", "dependentSchemas", "dependencies", "unevaluatedProperties", "$dynamicRef", "$recursiveRef")
OF_OBJECTS = ("properties", "patternProperties", "additionalProperties", "required")


class SeveralOfOneObject(Exception):
    """Several schemas speak of one object: what one of them does not name another one may."""


def closed(schema: object) -> object:
    """The schema with "additionalProperties": false in objects that name properties and say nothing of others.

    What fits it fits the schema.  One that puts schemas of one object together anywhere stays as it is, and so does an
    object that needs more properties than it names.
    """
    try:
        return _closed(schema)
    except SeveralOfOneObject:
        return schema


def _closed(schema: object) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    if puts_together(schema):
        raise SeveralOfOneObject
    said = {name: _within(name, value) for name, value in schema.items()}
    if has_all_it_needs(said) and not said.keys() & {"additionalProperties", "patternProperties"}:
        said["additionalProperties"] = False
    return said


def _within(name: str, value: object) -> object:
    """The value of a keyword, with the schemas in it closed."""
    if name in NAMED and isinstance(value, Mapping):
        return {key: _closed(one) for key, one in value.items()}
    if name in LISTS and isinstance(value, list):
        return [_closed(one) for one in value]
    return _closed(value) if name in SCHEMAS else value


def puts_together(schema: Mapping[str, Any]) -> bool:
    """Whether a schema is one of several that an object has to fit, or must not fit."""
    apart = [name for name in APART if name in schema]
    if any(name in schema for name in TOGETHER) or len(apart) > 1:
        return True
    if apart and any(name in schema for name in OF_OBJECTS):
        return True
    several = schema.get("allOf")
    if isinstance(several, list) and len(several) > 1:
        return True
    only_one = schema.get("oneOf", []) if "discriminator" not in schema else []
    return isinstance(only_one, list) and sum(map(may_be_object, only_one)) > 1


def may_be_object(schema: object) -> bool:
    kind = schema.get("type", "object") if isinstance(schema, Mapping) else "object"
    return kind == "object" or (isinstance(kind, list) and "object" in kind)


def has_all_it_needs(schema: Mapping[str, Any]) -> bool:
    """Whether an object names properties, and those that it must have are among them."""
    named, needed, least = schema.get("properties"), schema.get("required", []), schema.get("minProperties", 0)
    if not isinstance(named, Mapping) or not isinstance(needed, list):
        return False
    return all(isinstance(name, str) and name in named for name in needed) and least in range(len(named) + 1)
