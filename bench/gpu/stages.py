"""The stages of a run; each is a list of items, done one by one in a process that is not the one that watches.

What ends that process, or keeps it longer than an item may take, is the item's failure and no more: it is recorded, and
another process goes on with the next.  What is done stays done: a run can be stopped at any moment, and resumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from llmc.bench.gpu import (
    check,
    experts,
    facts,
    families,
    in_place,
    limits,
    measure,
    micro,
    profiles,
    sanitize,
    switched,
    whole,
)


@dataclass(frozen=True)
class Stage:
    """letter: what --stages calls it.  longest: seconds that one item may take.
    on_device: whether its items take an open device; else they work with other processes, or open it themselves."""

    letter: str
    module: ModuleType
    says: str
    longest: float = 20.0
    on_device: bool = True

    @property
    def name(self) -> str:
        return str(self.module.STAGE)


STAGES = (
    Stage("a", facts, "driver and machine"),
    Stage("b", micro, "primitives with known answers"),
    Stage("c", check, "every kernel against PyTorch"),
    Stage("d", sanitize, "compute-sanitizer", 150.0, on_device=False),
    Stage("e", limits, "copies and cuBLAS", 60.0),
    Stage("f", measure, "tuning"),
    Stage("g", whole, "whole models", 90.0, on_device=False),
    Stage("h", profiles, "profiles of what falls short", 100.0, on_device=False),
    Stage("i", in_place, "tuning in place"),
    Stage("j", switched, "passes that are off, on", 90.0, on_device=False),
    Stage("k", experts, "a layer's experts of mixtures", 30.0),
    Stage("l", families, "small models of many families", 60.0, on_device=False),
)


def stage_of(name: str) -> Stage:
    return next(stage for stage in STAGES if stage.name == name)
