"""JSON from outside, all of it read here."""

from __future__ import annotations

import json
import json.decoder
import json.scanner
from collections import Counter
from collections.abc import Callable
from typing import Any

MOST_CONTAINERS = 1 << 16
"""The most lists and objects that are read patiently: the garbage collector looks at each while no other thread
runs."""
MOST_DEPTH = 256
"""How deep lists and objects of a request may be nested, so that what they are written into can still be read."""
MOST_NAME = 40
"""The most characters of a name that a message repeats."""


def parse_json(text: bytes | bytearray | str) -> Any:
    """The value of the JSON.  Raises ValueError whatever is wrong: no JSON, no UTF-8, nested too deep to read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def parse_strict_json(text: bytes | bytearray) -> Any:
    """The same for requests: a name that is given twice, a number like NaN, and more than MOST_DEPTH are wrong too."""
    try:
        return not_deep(json.loads(text, object_pairs_hook=without_doubles, parse_constant=no_number), n_openings(text))
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def parse_strict_json_patiently(text: bytes | bytearray) -> Any:
    """The same so that other threads can run between any two values.  Ten times as slow, and for at most
    MOST_CONTAINERS lists and objects."""
    try:
        return not_deep(
            PatientDecoder().decode(text.decode(json.detect_encoding(text), "surrogatepass")), n_openings(text)
        )
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def n_openings(text: bytes | bytearray) -> int:
    """How many brackets and braces open lists and objects; some may be in strings."""
    return text.count(b"[") + text.count(b"{")


def not_deep(value: Any, most: int = MOST_DEPTH + 1) -> Any:
    """The value, unless it is nested deeper than MOST_DEPTH.  Raises ValueError.  most: how deep it may be."""
    if most > MOST_DEPTH:
        level = [value]
        for _ in range(MOST_DEPTH + 1):
            level = [one for one in level if isinstance(one, dict | list)]
            level = [part for one in level for part in (one.values() if isinstance(one, dict) else one)]
        if level:
            raise ValueError("it is nested too deep")
    return value


def json_end(text: str) -> int:
    """Where the JSON ends that a text begins with; 0: nowhere."""
    try:
        return json.JSONDecoder().raw_decode(text.lstrip())[1] + len(text) - len(text.lstrip())
    except (ValueError, RecursionError):
        return 0


def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"the name {counts.most_common(1)[0][0][:MOST_NAME]!r} is given twice")
    return found


def no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


class PatientDecoder(json.JSONDecoder):
    """json's own in Python.  The one in C keeps the interpreter to itself until it is done, on whatever thread it is:
    0.3 s for 8 MiB of token ids."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=without_doubles, parse_constant=no_number)
        self._n_containers = 0
        self.parse_array = self._counted(json.decoder.JSONArray)  # type: ignore[attr-defined]
        self.parse_object = self._counted(json.decoder.JSONObject)  # type: ignore[attr-defined]
        self.scan_once = json.scanner.py_make_scanner(self)  # type: ignore[attr-defined]

    def _counted(self, parse: Callable[..., Any]) -> Callable[..., Any]:
        def parse_one(*arguments: Any) -> Any:
            self._n_containers += 1
            if self._n_containers > MOST_CONTAINERS:
                raise ValueError(f"it has more than {MOST_CONTAINERS} lists and objects")
            return parse(*arguments)

        return parse_one
