"""Layers of a model's plans as a kit carries them: which calls follow each other, and where they read and write.

The tuner that measures candidates in their places (in_place.py) launches them; what a chain takes of a kit is a few
lines: its candidates are jobs, most of which are there anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import Any, NamedTuple

from llmc.bench.gpu.jobs import Jobs
from llmc.bench.gpu.kit import call_to_json
from llmc.compiler.kernel import Call, Implementation
from llmc.compiler.plan import BODY, PlannedCall, Program, StepPlan
from llmc.runtime.format import SPACES
from llmc.schedules import records
from llmc.schedules.attention_call import is_both_ways
from llmc.schedules.cuda.deferred_norm import settled

LAYERS = 4
"""Layers of a chain: so many that what stands between two layers is there several times."""
MOST_KINDS = 6
"""Layers after which a model's next ones are like those before (Gemma: five that slide, one that does not)."""
ARENA, KV = (SPACES.index(space) for space in ("arena", "kv"))

Place = tuple[str, int, int]
"""An operand's kind and index, and its offset in the arena, or in a page of the KV cache."""


class Step(NamedTuple):
    """A call of a plan, and where its operands are."""

    call: Call
    places: tuple[Place, ...]


def add_chains(
    jobs: Jobs, model: str, program: Program, most: int, wanted: Iterable[Sequence[int]]
) -> list[dict[str, Any]]:
    """Chains of a model's layers as kit.json has them; the jobs that they need join `jobs`.

    wanted: rows and length of context of each; those that the model has no plan or no room for are left out.
    """
    lengths: dict[int, list[int]] = {}
    for m, length in wanted:
        lengths.setdefault(m, []).append(length)
    found = []
    for plan in program.plans:
        fitting = [length for length in lengths.get(plan.n_rows, ()) if length <= program.n_context]
        layers = repeated(layers_of(plan, program)) if plan.kind == BODY and fitting else []
        steps = [
            {"job": job_of(jobs, model, step.call, most), "places": step.places} for layer in layers for step in layer
        ]
        if steps:
            said = {"model": model, "m": plan.n_rows, "lengths": fitting, "layers": len(layers)}
            found.append({**said, "arena_bytes": program.arena_bytes, "steps": steps})
    return found


def job_of(jobs: Jobs, model: str, call: Call, most: int) -> str:
    """The name of the job for a call.  Calls of one signature differ in what follows the sum, so that another model's
    job of that name may be another call's."""
    signature = records.signature(call, jobs.target)
    if signature is None:
        name = f"{model}: {call}"
        jobs.add(name, call, 1, tuned=False, of_chain=True)
        return name
    name = str(signature)
    known = jobs.said.get(name)
    if known and known["call"] != call_to_json(settled(call, jobs.target)):
        name = f"{name} of {model}"
    jobs.add(name, call, most, of_chain=True)
    return name


def layers_of(plan: StepPlan, program: Program) -> list[list[Step]]:
    """The plan's calls from each attention to the next one; none of a model that reads texts whole."""
    chosen = {
        node: choice
        for choice in program.choices
        if (choice.kind, choice.n_rows) == (plan.kind, plan.n_rows)
        for node in choice.nodes
    }
    steps = []
    for node, launched in groupby(plan.calls, key=lambda call: call.node):
        choice = chosen[node]
        steps.append(Step(choice.call, tuple(places_of(choice.implementation, list(launched)))))
    if any(is_both_ways(step.call) for step in steps):
        return []
    starts = [index for index, step in enumerate(steps) if step.call.op.endswith("PagedAttention")]
    return [steps[start:end] for start, end in pairwise(starts)]


def places_of(implementation: Implementation, planned: Sequence[PlannedCall]) -> Iterator[Place]:
    """What the launches of a call find in the arena, and its layer's part of a page."""
    found: dict[Place, None] = {}
    for launch, call in zip(implementation.launches, planned, strict=True):
        for operand, argument in zip(launch.operands, call.arguments, strict=True):
            lies_there = argument.space == ARENA and operand.kind in ("input", "output")
            if lies_there or argument.space == KV:
                found[operand.kind, operand.index, argument.offset] = None
    yield from found


def repeated(layers: Sequence[list[Step]]) -> list[list[Step]]:
    """As many as a chain has; none where no few layers are what all others are like.  Not the first one, if there are
    others: its values lie elsewhere, so that the first of a chain would not read what the last one wrote."""
    kinds = [[step.call for step in layer] for layer in layers]
    for period in range(1, min(MOST_KINDS, len(layers)) + 1):
        if all(kind == kinds[index % period] for index, kind in enumerate(kinds)):
            n = max(period, LAYERS // period * period)
            start = int(len(layers) > n)
            return list(layers[start : start + n])
    return []
