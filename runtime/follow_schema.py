"""JSON Schemas as llguidance can follow them, and as their writers mean them.

`followed` is for every schema: it says the same of what is wanted, but for properties that nobody named.  JSON Schema
lets an object have some, and few who write a schema say that it may not; a model that may go on often does so until its
tokens are spent, and functions are called with arguments that they do not take.  vLLM and llama.cpp close such objects
too.  `lenient` is for schemas that need not be kept to the letter: what llguidance refuses is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Node = dict[str, Any]
SCHEMAS = ("items", "contains", "additionalProperties")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
NAMED = ("properties", "patternProperties", "$defs", "definitions")
"""Keywords whose value is a schema, a list of some, or an object of some."""
FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
"""Those that are followed.  To JSON Schema a format is a remark: others are no more."""
NOT_FOLLOWED = (
    *("not", "if", "then", "else", "dependentSchemas", "dependentRequired", "dependencies"),
    *("propertyNames", "unevaluatedProperties", "unevaluatedItems"),
    *("uniqueItems", "contains", "minContains", "maxContains"),
)
NO_REGEX = re.compile(r"(?:^|[^\\])(?:\\\\)*(?:\\[bBk1-9]|\(\?<?[=!])")
"""In expressions that look around, or back: they are not followed."""
APART = ("anyOf", "oneOf", "allOf", "$ref")
TOGETHER = ("not", "if", "dependentSchemas", "dependencies", "unevaluatedProperties", "$dynamicRef", "$recursiveRef")
OF_OBJECTS = ("properties", "patternProperties", "additionalProperties", "required")


class SeveralOfOneObject(Exception):
    """Several schemas speak of one object: what one of them does not name another one may."""


def followed(schema: object) -> Any:
    """The schema without formats that nobody knows, with rules for names told otherwise where that is possible, and
    with "additionalProperties": false in objects that name properties and say nothing of others.

    What fits it fits the schema.  One that puts schemas of one object together anywhere is not closed, nor is an object
    that needs more properties than it names.
    """
    told = rewritten(schema, lambda node: without_names(known_format(node)))
    try:
        return rewritten(told, closed)
    except SeveralOfOneObject:
        return told


def lenient(schema: object) -> Any:
    """The schema without what llguidance refuses, and with "oneOf" as "anyOf": what fits may not fit the schema."""
    return rewritten(schema, less)


def rewritten(schema: object, change: Callable[[Node], Node]) -> Any:
    """The schema with each one in it changed, those within others first."""
    if not isinstance(schema, Mapping):
        return schema
    said: Node = {}
    for name, value in schema.items():
        if name in NAMED and isinstance(value, Mapping):
            value = {key: rewritten(one, change) for key, one in value.items()}
        elif name in LISTS and isinstance(value, list):
            value = [rewritten(one, change) for one in value]
        elif name in SCHEMAS:
            value = rewritten(value, change)
        said[name] = value
    return change(said)


def without(node: Node, *names: str) -> Node:
    return {name: value for name, value in node.items() if name not in names}


# -- what is said otherwise ---------------------------------------------------


def known_format(node: Node) -> Node:
    kind = node.get("format")
    if not isinstance(kind, str) or kind in FORMATS:
        return node
    return {**node, "format": "uuid"} if re.fullmatch("uuid[1-8]", kind) else without(node, "format")


def without_names(node: Node) -> Node:
    """Rules for the names of properties, as properties: they are those that are not named, if there are some."""
    rule = node.get("propertyNames")
    if rule in (True, {}, {"type": "string"}):
        return without(node, "propertyNames")
    if not isinstance(rule, dict) or node.keys() & {"properties", "patternProperties", *APART}:
        return node
    rest, value = without(node, "propertyNames"), node.get("additionalProperties", True)
    names, said = rule.get("enum", [rule.get("const")]), set(rule) - {"type"}
    if said in ({"enum"}, {"const"}) and isinstance(names, list) and all(isinstance(name, str) for name in names):
        return {**rest, "properties": dict.fromkeys(names, value), "additionalProperties": False}
    if said == {"pattern"}:
        return {**rest, "patternProperties": {rule["pattern"]: value}, "additionalProperties": False}
    return node


# -- what is left out ---------------------------------------------------------


def less(node: Node) -> Node:
    node = without(without_names(node), *NOT_FOLLOWED)
    if isinstance(node.get("pattern"), str) and NO_REGEX.search(node["pattern"]):
        node = without(node, "pattern")
    if "oneOf" in node and "anyOf" not in node:
        node = {**without(node, "oneOf"), "anyOf": node["oneOf"]}
    return node


# -- what is closed -----------------------------------------------------------


def closed(node: Node) -> Node:
    if puts_together(node):
        raise SeveralOfOneObject
    if has_all_it_needs(node) and not node.keys() & {"additionalProperties", "patternProperties"}:
        return {**node, "additionalProperties": False}
    return node


def puts_together(node: Node) -> bool:
    """Whether a schema is one of several that an object has to fit, or must not fit."""
    apart = [name for name in APART if name in node]
    if any(name in node for name in TOGETHER) or len(apart) > 1:
        return True
    if apart and any(name in node for name in OF_OBJECTS):
        return True
    several = node.get("allOf")
    if isinstance(several, list) and len(several) > 1:
        return True
    only_one = node.get("oneOf", []) if "discriminator" not in node else []
    return isinstance(only_one, list) and sum(map(may_be_object, only_one)) > 1


def may_be_object(schema: object) -> bool:
    kind = schema.get("type", "object") if isinstance(schema, Mapping) else "object"
    return kind == "object" or (isinstance(kind, list) and "object" in kind)


def has_all_it_needs(node: Node) -> bool:
    """Whether an object names properties, and those that it must have are among them."""
    named, needed, least = node.get("properties"), node.get("required", []), node.get("minProperties", 0)
    if not isinstance(named, Mapping) or not isinstance(needed, list):
        return False
    return all(isinstance(name, str) and name in named for name in needed) and least in range(len(named) + 1)
