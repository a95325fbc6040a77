"""What a run does, and in which order: what is worth most comes first, so that a machine that is lost at any moment has
given the best it could.

A visit is one command on the machine.  The first finds out whether kernels are right, gives a chart of both models with
the schedules that are best on paper, and tunes.  At home its records are imported and the models compiled with them;
the second visit measures those.  What time is left goes to the other visit's parts.

A part has a share of the time; an item that would take longer than what is left is left out for shorter ones
(clock.py).  docs/gpu.md shows the table; a test compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

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
from llmc.bench.gpu.kit import Kit
from llmc.bench.gpu.stages import STAGES, Stage, stage_of

Wants = Callable[[Kit, str], bool]


def everything(kit: Kit, item: str) -> bool:
    return True


@dataclass(frozen=True)
class Part:
    """Some items of a stage.  seconds: what they take, as an H200 did, or on paper where it did not get there; most:
    what they may take.  wants: which items."""

    name: str
    stage: Stage
    says: str
    seconds: int
    most: int
    wants: Wants = everything


def _of_models(name: str, says: str, seconds: int, most: int) -> Part:
    return Part(name, stage_of(whole.STAGE), says, seconds, most, lambda kit, item: whole.wish_of(kit, item) == name)


FACTS = Part("facts", stage_of(facts.STAGE), "driver, card, machine", 1, 20)
PRIMITIVES = Part("primitives", stage_of(micro.STAGE), "small kernels with known answers", 2, 40)
USED_FIRST = Part(
    "kernels used first",
    stage_of(check.STAGE),
    "what models launch at batch 1 and 8 and for a prompt, against PyTorch",
    15,
    80,
    check.is_used_first,
)
LIMITS = Part("limits", stage_of(limits.STAGE), "copies within the device; cuBLAS; what a launch costs", 4, 30)
SHORT = _of_models(
    whole.SHORT,
    "of each model logits and tokens; decode at batch 1 and 8, 128 and 1k, beside Hugging Face",
    50,
    150,
)
TUNING = Part("tuning", stage_of(measure.STAGE), "each candidate of each call, the rules' own first", 40, 160)
IN_PLACE = Part(
    "tuning in place", stage_of(in_place.STAGE), "each candidate of each call of a layer, between the others", 60, 100
)
OWN = Part(
    "tuning, own choices",
    stage_of(measure.STAGE),
    "the rules' own choices at batch 1 and 8, for the profiles to choose from",
    3,
    25,
    measure.is_own_at_first,
)
FEW_ODD = Part(
    "odd shapes", stage_of(check.STAGE), "shapes that fill no tile, in every operator and dtype", 30, 60, check.is_odd
)
FAMILIES = Part("small models", stage_of(families.STAGE), "small models of many families, beside float32", 60, 120)
KERNELS = Part("all other kernels", stage_of(check.STAGE), "every candidate of every call, against PyTorch", 60, 300)
POINTS = _of_models(
    whole.POINTS, "decode at batch 1, 2, 4, 8 and 128 – 4k, prompts of 1k – 4k, beside Hugging Face", 85, 200
)
QUANTISED = _of_models(whole.QUANTISED, "models with quantised weights at batch 1 and 8, and a prompt", 20, 60)
COMPILED = _of_models(whole.COMPILED_POINTS, "torch.compile; attention by FlashAttention alone", 130, 240)
MANY = _of_models(whole.MANY, "decode at batch 16, 32, 64", 10, 40)
CLEAN = Part("sanitizer", stage_of(sanitize.STAGE), "compute-sanitizer over primitives and odd shapes", 60, 240)
SWITCHED = Part(
    "passes", stage_of(switched.STAGE), "prompts of 1k – 4k with and without passes that are off, in turns", 50, 90
)
EXPERTS = Part(
    "experts", stage_of(experts.STAGE), "one layer of three mixtures at 1, 4 and 8 tokens, right and how fast", 20, 60
)
PROFILES = Part("profiles", stage_of(profiles.STAGE), "what the calls furthest below their limit wait for", 40, 120)

VISITS = {
    1: (FACTS, PRIMITIVES, USED_FIRST, FEW_ODD, FAMILIES, LIMITS, SHORT, TUNING, IN_PLACE),
    2: (FACTS, LIMITS, SHORT, EXPERTS, SWITCHED, POINTS, MANY, QUANTISED, COMPILED, CLEAN, OWN, PROFILES, KERNELS),
}
SECONDS = {1: 330, 2: 330}
"""What a visit may take where the machine is there for fifteen minutes, both starts included."""


def parts_of(visit: int, letters: str = "") -> list[Part]:
    """A visit's parts, then the other's; letters: of some stages alone."""
    others = [part for number in VISITS if number != visit for part in VISITS[number]]
    ordered = dict.fromkeys((*VISITS[visit], *others))
    return [part for part in ordered if not letters or part.stage.letter in letters]


def named(names: str) -> list[Part]:
    """Parts by their names, joined by "+"; a stage's name is all of it."""
    known = {part.name: part for part in parts_of(1)}
    whole_stages = {stage.name: Part(stage.name, stage, stage.says, 0, 1 << 20) for stage in STAGES}
    return [known.get(name) or whole_stages[name] for name in names.split("+")]


def processes(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Parts that share a process: those in a row whose items take an open device, or are of the same other stage."""
    for _, group in groupby(parts, lambda part: "" if part.stage.on_device else part.stage.name):
        yield list(group)


def table() -> Iterator[str]:
    """The visits as Markdown."""
    yield "| visit | part | stage | what | about, s | at most, s |"
    yield "|---|---|---|---|---:|---:|"
    for visit, parts in VISITS.items():
        for part in parts:
            yield f"| {visit} | {part.name} | {part.stage.letter} | {part.says} | {part.seconds} | {part.most} |"
