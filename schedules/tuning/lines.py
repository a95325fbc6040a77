"""Lines of a GPU run's results.jsonl (bench/gpu), as tuning reads them: what each must say to be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from llmc.schedules.records import signature_of

Entry = Mapping[str, Any]
"""A line."""
LARGEST = 1e18
IN_PLACE, SWITCHES = "in place", "switches"
OWN, TOGETHER, CANDIDATE, BEST = "own", "together", "candidate", "best"
"""What a line of IN_PLACE is about: a chain with the rules' own choices, with other ones of all calls or of neighbours,
with one candidate, with the best of every call."""
NEIGHBOURS = "attention and what is behind it"
"""Stands in names of items, as TOGETHER does."""

_CALL = {"job": str, "rule": str, "words": str, "params": dict, "signature": dict}
_ALONE = {"rule": str, "words": str, "params": dict, "signature": dict, "own": bool, "length": int}
_IN_PLACE: Mapping[str, Mapping[str, type]] = {
    OWN: {"calls": list},
    TOGETHER: {"choice": dict},
    CANDIDATE: {**_CALL, "index": int},
    BEST: {"choice": dict},
}
_TIMES = {
    OWN: ("us", "bytes", "operations"),
    TOGETHER: ("us", "base_us", "noise"),
    CANDIDATE: ("us", "base_us", "noise"),
    BEST: ("us", "own_us"),
}


def alone(entry: Entry) -> Entry:
    """A measurement of a candidate behind itself.  Raises ValueError, TypeError or KeyError for what is none."""
    _check(entry, _ALONE, ("us", "bytes", "operations"))
    signature_of(entry["signature"])
    return entry


def in_place(entry: Entry) -> Entry:
    """A measurement of a chain of layers.  Raises ValueError, TypeError or KeyError for what is none."""
    _check(entry, {"of": str, "chain": str})
    of = entry["of"]
    if of not in _IN_PLACE:
        raise ValueError(f"of is {of:.40}")
    _check(entry, _IN_PLACE[of], _TIMES[of])
    for call in (entry,) if of == CANDIDATE else entry["calls"] if of == OWN else ():
        _check(call, _CALL)
        signature_of(call["signature"])
    return entry


def switch(entry: Entry) -> Entry | None:
    """A prompt of a whole model with a pass and without it; None for what else its stage says.  Raises ValueError,
    TypeError or KeyError for what is none."""
    if "ratio" not in entry:
        return None
    _check(entry, {"pass": str, "model": str, "rows": int, "without_s": list, "with_s": list}, ("ratio", "rows"))
    times = [number({"s": seconds}, "s") for name in ("without_s", "with_s") for seconds in entry[name]]
    if not times or min(times) <= 0 or len(entry["with_s"]) != len(entry["without_s"]):
        raise ValueError("no pairs of times")
    return entry


def number(entry: Entry, name: str, most: float = LARGEST) -> float:
    """A field that is a number from 0 to `most`.  Raises ValueError."""
    value = entry.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not isfinite(value) or not 0 <= value <= most:
        raise ValueError(f"{name} is {value!r:.40}")
    return float(value)


def _check(said: Any, fields: Mapping[str, type], numbers: Sequence[str] = ()) -> None:
    for name, kind in fields.items():
        if not isinstance(said[name], kind) or (kind is int and isinstance(said[name], bool)):
            raise TypeError(f"{name} is no {kind.__name__}")
    for name in numbers:
        number(said, name)
