"""How long items take: on paper at first, then as long as the longest of their kind so far."""

from __future__ import annotations

from llmc.bench.gpu import check, facts, limits, measure, micro, profiles, sanitize, whole
from llmc.bench.gpu.journal import Journal

PAPER_S: dict[str, float] = {
    facts.STAGE: 1.0,
    micro.STAGE: 1.0,
    check.STAGE: 1.0,
    limits.STAGE: 1.0,
    measure.STAGE: 0.2,
    sanitize.STAGE: 10.0,
    profiles.STAGE: 8.0,
    "llmc load": 10.0,
    "llmc logits": 1.0,
    "llmc decode": 1.0,
    "llmc prefill": 1.0,
    "hf load": 10.0,
    "hf logits": 6.0,
    "hf decode": 2.0,
    "hf prefill": 2.0,
    "hf-graph decode": 3.0,
    "hf-flash decode": 3.0,
    "hf-compile decode": 60.0,
}
LEAST_SHARE = 0.5
"""Of what is expected on paper: one short item promises nothing about the next."""


def kind_of(stage: str, item: str) -> str:
    """Of a whole model's item, the system and its task; of others the stage."""
    return " ".join(item.split()[1:3]) if stage == whole.STAGE else stage


class Clock:
    """Seconds that items took, by kind."""

    def __init__(self, journal: Journal) -> None:
        self._longest: dict[str, float] = {}
        for entry in journal.entries():
            if "took_s" in entry:
                self.took(entry["stage"], entry["item"], float(entry["took_s"]))

    def took(self, stage: str, item: str, seconds: float) -> None:
        kind = kind_of(stage, item)
        self._longest[kind] = max(seconds, self._longest.get(kind, 0.0))

    def expected(self, stage: str, item: str) -> float:
        kind = kind_of(stage, item)
        paper = PAPER_S.get(kind, 1.0)
        return max(self._longest.get(kind, paper), LEAST_SHARE * paper)
