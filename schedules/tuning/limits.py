"""What a GPU's limits alone would take for what was measured (bench/gpu), at one or several lengths of context."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import exp, log

from llmc.schedules.tuning.lines import Entry

COPY, PRODUCT = "copy bandwidth", "cuBLAS bf16"


def geometric_mean(values: Iterable[float], least: float = 1e-6) -> float:
    found = [log(max(value, least)) for value in values]
    return exp(sum(found) / len(found))


def needed_us(entries: Sequence[Entry], limit: str, rates: Mapping[str, float]) -> float:
    """What the limit alone would take: the geometric mean.  rates: bytes and operations a second, by the limits'
    names."""
    key = "bytes" if limit == COPY else "operations"
    return geometric_mean((1e6 * entry[key] / rates[limit] for entry in entries), 1e-9)


def limit_of(entries: Sequence[Entry], rates: Mapping[str, float]) -> str:
    """The limit that takes longest."""
    return max(rates, key=lambda name: needed_us(entries, name, rates))


def share_of(entry: Entry, rates: Mapping[str, float]) -> tuple[str, float] | None:
    """What bounds a call that took `us`, and the part of that limit it reaches; None where no limit is measured."""
    if not rates or not entry["us"]:
        return None
    limit = limit_of([entry], rates)
    return limit, needed_us([entry], limit, rates) / entry["us"]
