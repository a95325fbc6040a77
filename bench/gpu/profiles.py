"""What falls short of its limit, under Nsight Compute where it works: what the kernel waits for."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

from llmc.bench.gpu import limits, measure
from llmc.bench.gpu.journal import Entry, Journal
from llmc.bench.gpu.kit import Kit
from llmc.bench.gpu.outside import run_under
from llmc.schedules.tuning.limits import share_of

STAGE = "profile"
TOOL = "ncu"
WORST = 6
GOOD_ENOUGH = 0.85
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats")
SECONDS = 80.0


def items(kit: Kit) -> Iterator[str]:
    yield from (f"worst {rank}" for rank in range(1, WORST + 1))


def runner(kit: Kit, journal: Journal) -> Callable[[str], dict[str, Any]]:
    """run(item) -> which call that is, and ncu's words on it; nothing where all is good enough."""

    def run(name: str) -> dict[str, Any]:
        worst = falling_short(journal)
        rank = int(name.split()[1]) - 1
        if rank >= len(worst):
            return {"call": "", "says": "nothing falls short"}
        call, share = worst[rank]
        path = shutil.which(TOOL)
        if path is None:
            raise RuntimeError(f"{TOOL} is not on this machine")
        job, index, _ = measure.find(kit, call)
        pattern = "|".join(sorted({launch.kernel for launch in job.candidates[index].launches}))
        command = [path, "--clock-control", "none", "-k", f"regex:{pattern}", "--launch-skip", "2", "-c", "2"]
        for section in SECTIONS:
            command += ["--section", section]
        everything = list(measure.items(kit))
        status, said, _ = run_under(command, kit, measure.STAGE, everything, lambda item: item == call, SECONDS)
        if status:
            raise RuntimeError(f"{TOOL}, exit status {status}: {said.strip()[-300:]}")
        return {"call": call, "share": share, "says": said[-6000:]}

    return run


def falling_short(journal: Journal) -> list[tuple[str, float]]:
    """The fastest candidates of calls that stay furthest below their limits."""
    rates = limits.found(journal)
    best: dict[str, tuple[str, Entry]] = {}
    for item, entry in journal.results(measure.STAGE).items():
        call = item.rpartition(" #")[0]
        if call not in best or entry["us"] < best[call][1]["us"]:
            best[call] = item, entry
    shares = [(item, share[1]) for item, entry in best.values() if (share := share_of(entry, rates))]
    return sorted((pair for pair in shares if pair[1] < GOOD_ENOUGH), key=lambda pair: pair[1])
