"""Passes that a measurement on a card turns on, in plans of some numbers of rows.

How much such a pass saves is only known once a whole model has run with it and without it on that card, in turns.  A
switch is the result.  It lies beside the tuned records (records.py), and may say no: a pass is on in plans of `fewest`
to `most` rows if it saved half a percent.  A pass without a switch is off.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from llmc.schedules.record_fields import of_kind

APPEND_IN_PRODUCT, DEFER_NORM_IN_PROMPTS = "append_in_product", "defer_norm_in_prompts"
PASSES = (APPEND_IN_PRODUCT, DEFER_NORM_IN_PROMPTS)
"""The passes that may have a switch, in the order in which a kit measures them."""
KEEP_BITS = frozenset({APPEND_IN_PRODUCT})
"""The passes that change no bit of a model's results."""
MOST_RATIO = 0.995
"""A pass is on if a model takes at most this part of its time without the pass."""
MOST_ROWS = 1 << 30


@dataclass(frozen=True)
class Switch:
    """name: of the pass.  fewest, most: rows of the plans that were measured.  ratio: of the time with it to that
    without it, the median; pairs: of how many.  model: what ran.  date, machine, llmc: as of a record."""

    name: str
    fewest: int
    most: int
    ratio: float
    pairs: int
    model: str
    date: str
    machine: str
    llmc: str

    @property
    def is_on(self) -> bool:
        return 0 < self.ratio <= MOST_RATIO

    def __str__(self) -> str:
        """append_in_product: on for 1024 – 2048 rows, 0.973 times as long (llama2-7b, 12 pairs, 2026-11-28, an H200)"""
        rows = f"{self.fewest} – {self.most} rows" if self.most < MOST_ROWS else f"{self.fewest} rows and more"
        said = f"{self.name}: {'on' if self.is_on else 'off'} for {rows}"
        if not self.pairs:
            return f"{said}, to be measured"
        return f"{said}, {self.ratio:.3f} times as long ({self.model}, {self.pairs} pairs, {self.date}, {self.machine})"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Switch:
        """Raises KeyError or TypeError where something is missing or of another kind."""
        return cls(**{field.name: of_kind(said[field.name], field.type) for field in fields(cls)})


def toggled(switches: Iterable[Switch], name: str, n_rows: int) -> Switch:
    """The switch turned over: on for all plans of n_rows rows and more if it is off, off if it is on for any."""
    is_on = any(switch.is_on for switch in switches if switch.name == name)
    return Switch(name, n_rows, MOST_ROWS, 1.0 if is_on else 0.5, 0, "", "", "", "")


def switched(switches: Iterable[Switch], n_rows: int) -> frozenset[str]:
    """The passes that are on in a plan of so many rows."""
    return frozenset(each.name for each in switches if each.is_on and each.fewest <= n_rows <= each.most)
