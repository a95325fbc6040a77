"""How near a measured time comes to what the device can do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmc.bench.gpu.limits import COPY_LIMIT, PRODUCT_LIMIT


def share_of(entry: Mapping[str, Any], rates: Mapping[str, float]) -> tuple[str, float] | None:
    """What bounds a call of these bytes and operations in `us`, and the part of that limit it reaches.

    rates: bytes and operations a second, by the limits' names; None where nothing is measured.
    """
    needs = {COPY_LIMIT: entry["bytes"], PRODUCT_LIMIT: entry["operations"]}
    times = {name: needs[name] / rate for name, rate in rates.items()}
    if not times or not entry["us"]:
        return None
    limit = max(times, key=lambda name: times[name])
    return limit, times[limit] / (entry["us"] / 1e6)
