"""The stages of a run, in order; each is a list of items, done one by one in a process of its own.

What ends that process, or keeps it longer than an item may take, is the item's failure and no more: it is recorded, and
another process goes on with the next.  What is done stays done: a run can be stopped at any moment, and resumed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from llmc.bench.gpu import check, facts, limits, measure, micro, profiles, sanitize, whole
from llmc.bench.gpu.driver import CudaError, Device
from llmc.bench.gpu.journal import Journal
from llmc.bench.gpu.kit import Kit

WAIT_S = 0.2
MOST_RESTARTS = 60
START_S = 120.0
"""How long a process may take before it begins its first item: it imports PyTorch."""
SKIPPED = 3
"""Exit status of a process that has done what it had time for."""


@dataclass(frozen=True)
class Stage:
    """letter: what --stages calls it.  seconds: what it may take; longest: what one item may.
    on_device: whether its items take an open device; else they work with other processes."""

    letter: str
    module: ModuleType
    says: str
    seconds: float
    longest: float = 60.0
    on_device: bool = True

    @property
    def name(self) -> str:
        return str(self.module.STAGE)


STAGES = (
    Stage("a", facts, "driver and machine", 60),
    Stage("b", micro, "primitives with known answers", 60),
    Stage("c", check, "every kernel against PyTorch", 300),
    Stage("d", sanitize, "compute-sanitizer", 300, 150.0, on_device=False),
    Stage("e", limits, "copies and cuBLAS", 60),
    Stage("f", measure, "tuning", 300),
    Stage("g", whole, "whole models", 900, 600.0, on_device=False),
    Stage("h", profiles, "profiles of what falls short", 200, 100.0, on_device=False),
)


# -- in the process that does the work --------------------------------------------------------------------------------


def work(stage: Stage, kit: Kit, journal: Journal, deadline: float) -> int:
    """Does the items that are not settled yet; the process's exit status."""
    if not stage.on_device:
        return do(stage, stage.module.runner(kit, journal), kit, journal, deadline)
    try:
        with Device() as device:
            return do(stage, runner_of(stage, device, kit, journal), kit, journal, deadline)
    except CudaError as error:
        print(error, file=sys.stderr)
        return 1


def runner_of(stage: Stage, device: Device, kit: Kit, journal: Journal) -> Callable[[str], dict[str, Any]]:
    if stage.module is not measure:
        found: Callable[[str], dict[str, Any]] = stage.module.runner(device, kit)
        return found
    l2_bytes = int(journal.one(facts.STAGE, facts.DEVICE).get("l2_bytes") or kit.said["settings"]["l2_bytes"])
    size = measure.Size(l2_bytes, kit.said["settings"]["shortest_ms"], kit.said["settings"]["replays"])
    return measure.runner(device, kit, size)


def do(stage: Stage, run: Callable[[str], dict[str, Any]], kit: Kit, journal: Journal, deadline: float) -> int:
    for item in waiting(stage, kit, journal):
        if time.time() > deadline:
            return SKIPPED
        journal.append(stage.name, item, "begin")
        try:
            found = run(item)
        except CudaError as error:  # nothing more can be done in this context
            journal.append(stage.name, item, "failed", error=str(error))
            return 1
        except Exception as error:
            journal.append(stage.name, item, "failed", error=f"{type(error).__name__}: {error}"[:500])
        else:
            journal.append(stage.name, item, "done", **found)
    return 0


def waiting(stage: Stage, kit: Kit, journal: Journal) -> list[str]:
    """Items that are not settled; of the tuner's, those whose kernels are known to be wrong are left out."""
    settled = journal.settled(stage.name)
    left = [item for item in stage.module.items(kit) if item not in settled]
    if stage.module is not measure:
        return left
    wrong = {item for item, entry in journal.latest(check.STAGE).items() if entry["event"] == "failed"}
    return [item for item in left if check.item(*measure.find(kit, item)[:2]) not in wrong]


# -- in the process that watches --------------------------------------------------------------------------------------


def run_stage(stage: Stage, kit: Kit, journal: Journal, command: Sequence[str], seconds: float) -> None:
    """All items of a stage, in as many processes as it takes, within the time."""
    deadline = time.time() + seconds
    log = journal.path.with_name("log.txt")
    for _ in range(MOST_RESTARTS):
        left = waiting(stage, kit, journal)
        if not left or time.time() >= deadline:
            return
        with log.open("a") as out:
            out.write(f"--- {stage.name}: {len(left)} left\n")
            out.flush()
            arguments = [*command, "--work", stage.name, "--deadline", f"{deadline:.0f}"]
            process = subprocess.Popen(arguments, stdout=out, stderr=out, start_new_session=True)
        status = watch(process, stage, journal, deadline)
        if status in (0, SKIPPED):
            continue
        settle_crash(stage, journal, status, last_words(log))
        if waiting(stage, kit, journal) == left:  # it dies before it begins anything
            journal.append(stage.name, left[0], "failed", error=f"no process could begin it: {last_words(log)}")


def watch(process: subprocess.Popen[bytes], stage: Stage, journal: Journal, deadline: float) -> int:
    """Waits for the process, and ends it when an item takes too long; its exit status."""
    began, size, since = time.time(), file_size(journal.path), time.time()
    while process.poll() is None:
        time.sleep(WAIT_S)
        if file_size(journal.path) != size:
            size, since = file_size(journal.path), time.time()
        patience = max(stage.longest, START_S if since - began < 1 else 0)
        if time.time() - since > patience or time.time() > deadline + stage.longest:
            end(process)
    return int(process.wait())


def end(process: subprocess.Popen[bytes]) -> None:
    """The process and what it started: they are a session of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def settle_crash(stage: Stage, journal: Journal, status: int, said: str) -> None:
    """What was begun and not finished has failed."""
    for item, entry in journal.latest(stage.name).items():
        if entry["event"] == "begin":
            reason = "took too long, or was stopped" if status == -9 else f"ended the process ({status})"
            journal.append(stage.name, item, "failed", error=f"{reason}: {said}")


def last_words(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1][:300] if lines else ""


def file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def chosen(letters: Iterable[str]) -> list[Stage]:
    return [stage for stage in STAGES if stage.letter in letters or stage.name in letters]
