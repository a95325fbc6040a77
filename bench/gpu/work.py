"""The process that does the work: the items of some parts that are not settled yet, within their time."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from math import inf
from typing import Any

from llmc.bench.gpu import check, facts, in_place, measure, whole
from llmc.bench.gpu.clock import Clock
from llmc.bench.gpu.driver import CudaError, Device
from llmc.bench.gpu.journal import Entry, Journal, one_line
from llmc.bench.gpu.kit import Job, Kit
from llmc.bench.gpu.plan import Part

DONE, BROKEN, OUT_OF_TIME = 0, 1, 3
"""Exit status: everything is done; the device is lost to this process; not all fitted into the time."""
MOST_FAILURES = 2
"""A system that fails so often with a model is not tried further."""
TOO_LONG = "took too long"
Run = Callable[[str], dict[str, Any]]


def work(parts: Sequence[Part], kit: Kit, journal: Journal, end: float, since: float = inf) -> int:
    """end: when to stop.  since: when the first process for these parts was started.  -> the process's exit status."""
    if not parts[0].stage.on_device:
        runners = {part.stage.name: part.stage.module.runner(kit, journal) for part in parts}
        return do(parts, runners.__getitem__, kit, journal, end, since)
    try:
        with Device() as device, ExitStack() as opened:
            made: dict[str, Run] = {}

            def runner(stage: str) -> Run:
                if stage not in made:
                    made[stage] = on_device(stage, parts, device, kit, journal, opened)
                return made[stage]

            return do(parts, runner, kit, journal, end, since)
    except CudaError as error:
        print(error, file=sys.stderr)
        return BROKEN


def on_device(stage: str, parts: Sequence[Part], device: Device, kit: Kit, journal: Journal, opened: ExitStack) -> Run:
    """How the stage's items are done.  opened: what is closed before the device is."""
    module = next(part.stage.module for part in parts if part.stage.name == stage)
    if module not in (measure, in_place):
        found: Run = module.runner(device, kit)
        return found
    settings = kit.said["settings"]
    l2_bytes = int(journal.one(facts.STAGE, facts.DEVICE).get("l2_bytes") or settings["l2_bytes"])
    size = measure.Size(l2_bytes, settings["shortest_ms"], settings["replays"])
    if module is in_place:
        bad = in_place.known_bad(journal) | relatives(kit, journal)
        known = journal.results(in_place.STAGE)
        return opened.enter_context(in_place.InPlace(device, kit, size, known, bad)).measure
    return measure.runner(device, kit, size)


def do(
    parts: Sequence[Part], runner: Callable[[str], Run], kit: Kit, journal: Journal, end: float, since: float = inf
) -> int:
    """As work(), with runners by their stages' names."""
    clock, status, begun = Clock(journal), DONE, beginnings(journal, since)
    for part in parts:
        deadline = min(end, begun.get(part.name, time.time()) + part.most)
        for item in waiting(part, kit, journal):
            expected = clock.expected(part.stage.name, item)
            if time.time() + expected > deadline:
                status = OUT_OF_TIME
                continue
            if not one(part, item, runner, journal, clock):
                return BROKEN
    return status


def beginnings(journal: Journal, since: float) -> dict[str, float]:
    """When parts began their first items, in whatever process: another one has no more time for them than what this
    one had left."""
    found: dict[str, float] = {}
    for entry in journal.entries():
        if entry.get("event") == "begin" and "part" in entry and entry["at"] >= since:
            found.setdefault(entry["part"], entry["at"])
    return found


def one(part: Part, item: str, runner: Callable[[str], Run], journal: Journal, clock: Clock) -> bool:
    """Does an item; whether the device can still be used after it."""
    stage = part.stage.name
    try:
        run = runner(stage)  # which may import PyTorch: before anything begins, so that no item is blamed for it
        journal.append(stage, item, "begin", part=part.name)
        began = time.time()
        found = run(item)
    except CudaError as error:
        journal.append(stage, item, "failed", error=str(error))
        return False
    except Exception as error:
        journal.append(stage, item, "failed", error=one_line(error))
        return stage != whole.STAGE or (not whole.is_recorded(item) and is_well())
    took = time.time() - began
    clock.took(stage, item, took)
    journal.append(stage, item, "done", **found, took_s=round(took, 3))
    return True


def is_well() -> bool:
    """Whether a device on which something failed still does anything for this process."""
    try:
        with Device() as device:
            device.wait()
    except CudaError:
        return False
    return True


def is_hung(entry: Entry) -> bool:
    return entry["event"] == "failed" and TOO_LONG in entry["error"]


def way_of(job: Job, index: int) -> tuple[str, str]:
    """How a candidate does its call, but for numbers."""
    return job.rule, re.sub(r"\d+", "", job.candidates[index].words)


def relatives(kit: Kit, journal: Journal) -> set[str]:
    """Candidates that do their call in the way of one that hung, in whatever stage: each could take as long again.  The
    rules' own choices are none.  Where candidates of several calls hung together, all that are to be together."""
    hung = {
        in_place.candidate_of(item)
        for stage in (check.STAGE, measure.STAGE, in_place.STAGE)
        for item, entry in journal.latest(stage).items()
        if is_hung(entry)
    }
    parts = [what.rpartition(" #") for what in hung]
    ways = {way_of(kit.jobs[job], int(index)) for job, _, index in parts if job in kit.jobs}
    candidates = [(job, index) for job in kit.jobs.values() for index in range(1, len(job.candidates)) if ways]
    found = {check.item(job, index) for job, index in candidates if way_of(job, index) in ways}
    return found.union(*(in_place.all_together(kit) for job, _, _ in parts if job in in_place.SETS))


def waiting(part: Part, kit: Kit, journal: Journal) -> list[str]:
    """The part's items that are not settled, but for what is known to lead to nothing: kernels of a family that hung,
    candidates whose kernels are wrong, systems that failed before."""
    stage = part.stage
    latest = journal.latest(stage.name)
    settled = {item for item, entry in latest.items() if entry["event"] in ("done", "failed")}
    wanted = (item for item in stage.module.items(kit) if kit.shares(item) and part.wants(kit, item))
    left = [item for item in wanted if item not in settled]
    if stage.module is measure:
        wrong = journal.failed(check.STAGE) | relatives(kit, journal)
        return [item for item in left if check.item(*measure.find(kit, item)[:2]) not in wrong]
    if stage.module is in_place:
        return list(in_place.usable(kit, left, journal, relatives(kit, journal)))
    if stage.module is check:
        hung = {check.family(kit, item) for item in settled if is_hung(latest[item])}
        return [item for item in left if check.family(kit, item) not in hung]
    if stage.module is whole:
        failed = [tuple(item.split()[:2]) for item, entry in latest.items() if entry["event"] == "failed"]
        return [item for item in left if failed.count(tuple(item.split()[:2])) < MOST_FAILURES]
    return left
