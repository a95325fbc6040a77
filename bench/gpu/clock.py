"""How long items take: on paper at first, then by the last ones of their kind."""

from __future__ import annotations

from collections import deque

from llmc.bench.gpu import check, facts, families, in_place, limits, measure, micro, profiles, sanitize, switched, whole
from llmc.bench.gpu.journal import Journal

PAPER_S: dict[str, float] = {
    facts.STAGE: 1.0,
    micro.STAGE: 1.0,
    check.STAGE: 1.0,
    limits.STAGE: 1.0,
    measure.STAGE: 0.1,
    in_place.STAGE: 0.1,
    sanitize.STAGE: 10.0,
    profiles.STAGE: 8.0,
    switched.STAGE: 5.0,
    families.STAGE: 1.5,
    "llmc load": 10.0,
    "llmc logits": 1.0,
    "llmc decode": 1.0,
    "llmc prefill": 1.0,
    "llmc timeline": 3.0,
    "hf load": 10.0,
    "hf logits": 6.0,
    "hf decode": 2.0,
    "hf prefill": 2.0,
    "hf-graph decode": 3.0,
    "hf-flash decode": 3.0,
    "hf-compile decode": 40.0,
}
LAST, SPARE, LEAST_SHARE = 5, 1.5, 0.5
"""So many items are looked back at; the next may take so many times longer; and it is not expected to take less than
this part of what paper says: short ones promise nothing about the next."""


def kind_of(stage: str, item: str) -> str:
    """For an item of a whole model the system and its task; for others the stage."""
    return " ".join(item.split()[1:3]) if stage == whole.STAGE else stage


class Clock:
    """Seconds that items took, by kind."""

    def __init__(self, journal: Journal) -> None:
        self._last: dict[str, deque[float]] = {}
        for entry in journal.entries():
            if "took_s" in entry:
                self.took(entry["stage"], entry["item"], float(entry["took_s"]))

    def took(self, stage: str, item: str, seconds: float) -> None:
        self._last.setdefault(kind_of(stage, item), deque(maxlen=LAST)).append(seconds)

    def expected(self, stage: str, item: str) -> float:
        kind = kind_of(stage, item)
        paper, last = PAPER_S.get(kind, 1.0), self._last.get(kind)
        return max(SPARE * sum(last) / len(last), LEAST_SHARE * paper) if last else paper
