"""The process that watches: it starts those that work, ends what takes too long, and starts the next behind it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from llmc.bench.gpu import facts, stages
from llmc.bench.gpu.journal import Journal, last_line
from llmc.bench.gpu.kit import Kit
from llmc.bench.gpu.plan import Part
from llmc.bench.gpu.work import DONE, OUT_OF_TIME, TOO_LONG, waiting

WAIT_S = 0.05
MOST_RESTARTS = 60
START_S = 120.0
"""How long a process may take before it begins its first item: it imports PyTorch where that is not cached yet."""
GRACE_S = 5.0
"""An item that is nearly done may take so long beyond the end of the run."""


def run_parts(parts: Sequence[Part], kit: Kit, journal: Journal, command: Sequence[str], end_at: float) -> None:
    """All items of the parts, in as many processes as it takes, within the time."""
    log, since = journal.path.with_name("log.txt"), time.time()
    for _ in range(MOST_RESTARTS):
        left = [(part, item) for part in parts for item in waiting(part, kit, journal)]
        if not left or time.time() >= end_at:
            return
        with log.open("a") as out:
            out.write(f"--- {', '.join(part.name for part in parts)}: {len(left)} left\n")
            out.flush()
            said_from = out.tell()
            names = "+".join(part.name for part in parts)
            arguments = [*command, "--work", names, "--deadline", f"{end_at:.0f}", "--since", str(since)]
            process = subprocess.Popen(arguments, stdout=out, stderr=out, start_new_session=True)
        began = time.time()
        status = watch(process, journal, end_at)
        if status in (DONE, OUT_OF_TIME) or time.time() >= end_at:
            return
        said = last_words(log, said_from)
        settle_crash(parts, journal, status, said, began)
        if [(part, item) for part in parts for item in waiting(part, kit, journal)] == left:
            part, item = left[0]  # it dies before it begins anything
            journal.append(part.stage.name, item, "failed", error=f"no process could begin it: {said}")
            if (part.stage.name, item) == (facts.STAGE, facts.DEVICE):
                return  # without a device nothing else can begin either


def missing_device(journal: Journal) -> str:
    """Why no process could open the device; "" where one could, or none has tried."""
    entry = journal.latest(facts.STAGE).get(facts.DEVICE, {})
    return str(entry.get("error", "")) if entry.get("event") == "failed" else ""


def watch(process: subprocess.Popen[bytes], journal: Journal, end_at: float) -> int:
    """Waits for the process, and ends it when an item takes longer than those of its stage may; its exit status."""
    size, since, longest = file_size(journal.path), time.time(), START_S
    while process.poll() is None:
        time.sleep(WAIT_S)
        if (grown := file_size(journal.path)) != size:
            size, since = grown, time.time()
            stage = journal.last().get("stage")
            longest = next((each.longest for each in stages.STAGES if each.name == stage), longest)
        if time.time() > min(since + longest, end_at + GRACE_S):
            end(process)
    return int(process.wait())


def end(process: subprocess.Popen[bytes]) -> None:
    """The process and what it started: they are a session of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def settle_crash(parts: Sequence[Part], journal: Journal, status: int, said: str, began: float) -> None:
    """What the process that began then has begun and not finished has failed."""
    for stage in {part.stage.name for part in parts}:
        for item, entry in journal.latest(stage).items():
            if entry["event"] == "begin" and entry["at"] > began - 1:
                reason = f"{TOO_LONG}, or was stopped" if status == -9 else f"ended the process ({status})"
                journal.append(stage, item, "failed", error=f"{reason}: {said}" if said else reason)


def last_words(log: Path, start: int) -> str:
    """The last line of what a process said, which stands in the log from there on."""
    return last_line(log.read_bytes()[start:].decode(errors="replace"))


def file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
