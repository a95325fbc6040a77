"""Values, and calls of functions, as Python writes them, made JSON of.

Of what is no such value no JSON may be made either: whoever reads it finds that out.
"""

from __future__ import annotations

import json
import re

PART = re.compile(
    r"""(?P<text>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|(?P<name>[\w.-]+)\(|(?P<key>[\w.-]+)\s*=|(?P<word>[\w.+-]+)"""
    r"""|(?P<end>\))""",
    re.DOTALL,
)
ESCAPE = re.compile(r"\\(?:u(?P<u>[0-9a-fA-F]{4})|x(?P<x>[0-9a-fA-F]{2})|(?P<one>.))", re.DOTALL)
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": "", "/": "/", "'": "'", '"': '"', "\\": "\\"}
WORDS = {"True": "true", "False": "false", "None": "null"}


def value_as_json(text: str) -> str:
    """Of a value.  Raises ValueError: half a surrogate pair."""
    return PART.sub(value_part, text)


def calls_as_json(text: str) -> str:
    """Of calls, name(key=value, …), in a list or not: of each an object with its "name" and "arguments".  Raises
    ValueError: a call within a call, half a surrogate pair."""
    is_in_call = False

    def part(match: re.Match[str]) -> str:
        nonlocal is_in_call
        if match["name"]:
            if is_in_call:
                raise ValueError("a call within a call")
            is_in_call = True
            return f'{{"name": {json.dumps(match["name"])}, "arguments": {{'
        if match["end"]:
            is_in_call = False
            return "}}"
        return f"{json.dumps(match['key'])}:" if match["key"] else value_part(match)

    return PART.sub(part, text)


def value_part(match: re.Match[str]) -> str:
    if match["text"] is not None:
        return json.dumps(unescaped(match["text"][1:-1]))
    return WORDS.get(match[0], match[0])


def unescaped(text: str) -> str:
    """What a string between quotes says, in Python or in JSON.  Raises ValueError."""

    def one(match: re.Match[str]) -> str:
        code = match["u"] or match["x"]
        return chr(int(code, 16)) if code else ESCAPES.get(match["one"], match[0])

    return ESCAPE.sub(one, text).encode("utf-16", "surrogatepass").decode("utf-16")
