"""Every kernel of odd shapes, and the primitives, under compute-sanitizer: accesses, races, barriers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from llmc.bench.gpu import check, micro
from llmc.bench.gpu.journal import Entry, Journal
from llmc.bench.gpu.kit import Kit
from llmc.bench.gpu.outside import run_under

STAGE = "sanitize"
TOOL = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck", "synccheck")
GROUPS = (
    micro.STAGE,
    "odd gemv",
    "odd gemm",
    *(f"odd attention {dtype}" for dtype in ("bf16", "f16", "int8")),
)
FOUND, OUT_OF_TIME = 86, 3
"""Exit status when the tool has something to say, and when time was short for some kernels (work.py's)."""
SECONDS = 100.0


def items(kit: Kit) -> Iterator[str]:
    """What takes longest last, for what is done is noted in this order."""
    yield from (f"{tool} {group}" for group in GROUPS for tool in TOOLS)


def runner(kit: Kit, journal: Journal) -> Callable[[str], dict[str, Any]]:
    """run(item) -> how many kernels ran clean; raises RuntimeError with what the tool found.

    All items begin with the first: most of what they take is the tool's work on a processor of their own.
    """
    under_way: dict[str, Future[dict[str, Any]]] = {}

    def run(name: str) -> dict[str, Any]:
        if not under_way:
            settled = journal.latest(STAGE)
            waiting = [item for item in items(kit) if settled.get(item, {}).get("event") not in ("done", "failed")]
            pool = ThreadPoolExecutor(len(waiting))
            under_way.update({item: pool.submit(examined, kit, item) for item in waiting})
        return under_way[name].result()

    return run


def examined(kit: Kit, item: str) -> dict[str, Any]:
    tool, _, group = item.partition(" ")
    path = shutil.which(TOOL)
    if path is None:
        raise RuntimeError(f"{TOOL} is not on this machine")
    stage, everything = (micro, micro.items(kit)) if group == micro.STAGE else (check, check.items(kit))
    command = [path, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "10"]

    def wanted(item: str) -> bool:
        return group == micro.STAGE or (item.startswith(group) and item.endswith("#0"))

    status, said, found = run_under(command, kit, stage.STAGE, list(everything), wanted, SECONDS)
    errors = [line.strip("= \n") for line in said.splitlines() if line.startswith("=========")]
    if status not in (0, OUT_OF_TIME):
        errors = errors or said.strip().splitlines()[-3:]
        raise RuntimeError(f"{tool}, exit status {status}: {' / '.join(errors)[:400]}")
    return {**ran(found), "said": errors[-1] if errors else ""}


def ran(found: dict[str, Entry]) -> dict[str, Any]:
    """How many kernels ran, and which took longest.  Raises RuntimeError: not all did."""
    done = [entry for entry in found.values() if entry["event"] == "done"]
    slowest = max(done, key=lambda entry: entry["took_s"], default=None)
    words = f"the slowest, {slowest['item']}, took {slowest['took_s']:.1f} s" if slowest else "none ended"
    if len(done) < len(found):
        wrong = next(entry for entry in found.values() if entry["event"] != "done")
        reason = wrong.get("error", "not finished")
        raise RuntimeError(f"{len(done)} of {len(found)} ran, {words}; {wrong['item']}: {reason}")
    return {"kernels": len(done), "of": len(found), "slowest": words}
