"""Round numbers on axes, and quantities as the page writes them."""

from __future__ import annotations

from collections.abc import Callable
from math import floor, log10

from llmc.cli import profile_table
from llmc.cli.html.markup import Markup, element, text


def ticks(total: float) -> list[float]:
    """Round numbers from 0 to at most `total`, three to six of them."""
    if total <= 0:
        return [0.0]
    magnitude: float = 10.0 ** floor(log10(total / 3))
    step = max(s for s in (magnitude, 2 * magnitude, 5 * magnitude) if s <= total / 3)
    return [step * i for i in range(floor(total / step) + 1)]


def axis(total: float, width: float, y: float, write: Callable[[float], str], left: float = 0.0) -> list[Markup]:
    """Marks and numbers under a drawing that is `width` wide and stands for 0 to `total`."""
    parts = []
    for value in ticks(total):
        x = left + (width * value / total if total > 0 else 0.0)
        anchor = "start" if x - left < 12 else "end" if left + width - x < 24 else "middle"
        parts.append(element("path", d=f"M {x:.1f} {y:.1f} v 5", class_="axis"))
        parts.append(text(x, y + 17, write(value), "tick", anchor))
    return parts


def in_time(ns: float) -> str:
    return "0" if ns == 0 else profile_table.in_time(ns).replace("us", "µs")
