"""JSON from outside, in one way."""

from __future__ import annotations

import json
import json.decoder
import json.scanner
from collections.abc import Callable
from typing import Any

MOST_CONTAINERS = 1 << 16
"""Lists and objects that are read patiently: each is looked at by the garbage collector, while nobody else runs."""


def parse_json(text: bytes | bytearray | str) -> Any:
    """What the JSON says.  Raises ValueError alone, whatever is wrong: no JSON, no UTF-8, nested too deep to read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def parse_json_patiently(text: bytes | bytearray) -> Any:
    """The same on a thread of its own: others run between any two values.  Ten times as slow, at most
    MOST_CONTAINERS lists and objects."""
    try:
        return PatientDecoder().decode(text.decode(json.detect_encoding(text), "surrogatepass"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None


class PatientDecoder(json.JSONDecoder):
    """json's own in Python.  The one in C keeps the interpreter to itself until it is done, on whatever thread it is:
    0.3 s for 8 MiB of token ids."""

    def __init__(self) -> None:
        super().__init__()
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
