"""Every kernel of odd shapes, the primitives, and small models whole, under compute-sanitizer: accesses, races,
barriers."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import ModuleType
from typing import Any

from llmc.bench.gpu import check, families, micro
from llmc.bench.gpu.journal import Entry, Journal
from llmc.bench.gpu.kit import Kit
from llmc.bench.gpu.outside import run_under

STAGE = "sanitize"
TOOL = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck", "synccheck")
PARTS = 12
"""Small models are examined in so many parts."""
GROUPS = (
    micro.STAGE,
    "odd gemv",
    "odd gemm",
    "odd convolution",
    "odd delta rule",
    "odd latents",
    *(f"odd attention {dtype}" for dtype in ("bf16", "f16", "int8")),
    *(f"{families.STAGE} {k}/{PARTS}" for k in range(1, PARTS + 1)),
)
FOUND, OUT_OF_TIME = 86, 3
"""Exit status when the tool has something to say, and when time was short for some kernels (work.py's)."""
SECONDS = 60.0
MOST_SAID = 2000
"""Characters of what a tool found that are kept: some ten places, each with the kernel's name."""
KERNEL = re.compile(r"(?:access at|=     at) (\w+)\+0x")
"""How the tool names a kernel in which it found something."""


def items(kit: Kit) -> Iterator[str]:
    """What takes longest last, for what is done is noted in this order."""
    models = {group for group in GROUPS if group.startswith(families.STAGE)}
    for groups in ([group for group in GROUPS if group not in models], sorted(models)):
        yield from (f"{tool} {group}" for tool in TOOLS for group in groups)


def runner(kit: Kit, journal: Journal) -> Callable[[str], dict[str, Any]]:
    """run(item) -> how many kernels or models ran clean, and of how many; raises RuntimeError with what the tool found.

    As many as there are processors begin with the first: most of what they take is the tool's work on one.
    """
    under_way: dict[str, Future[dict[str, Any]]] = {}

    def run(name: str) -> dict[str, Any]:
        if not under_way:
            settled = journal.latest(STAGE)
            waiting = [item for item in items(kit) if settled.get(item, {}).get("event") not in ("done", "failed")]
            pool = ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0))))
            under_way.update({item: pool.submit(examined, kit, item) for item in waiting})
        return under_way[name].result()

    return run


def examined(kit: Kit, item: str) -> dict[str, Any]:
    tool, _, group = item.partition(" ")
    path = shutil.which(TOOL)
    if path is None:
        raise RuntimeError(f"{TOOL} is not on this machine")
    stage, everything, wanted = of_group(kit, group)
    command = [path, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "10"]
    status, said, found = run_under(command, kit, stage.STAGE, everything, wanted.__contains__, SECONDS)
    errors = [line.strip("= \n") for line in said.splitlines() if line.startswith("=========")]
    if status not in (0, OUT_OF_TIME):
        errors = errors or said.strip().splitlines()[-3:]
        kernels = ", ".join(sorted(set(KERNEL.findall(said))))
        raise RuntimeError(
            f"{tool}, exit status {status}{f', in {kernels}' * bool(kernels)}: {' / '.join(errors)[:MOST_SAID]}"
        )
    return {**ran(found), "of": len(wanted), "said": errors[-1] if errors else ""}


def of_group(kit: Kit, group: str) -> tuple[ModuleType, list[str], set[str]]:
    """The stage that runs a group, all of its items, and those that are the group's."""
    name, _, part = group.partition(" ")
    if name == families.STAGE:
        everything = list(families.items(kit))
        return families, everything, set(everything[int(part.partition("/")[0]) - 1 :: PARTS])
    if group == micro.STAGE:
        return micro, list(micro.items(kit)), set(micro.items(kit))
    everything = list(check.items(kit))
    return check, everything, {item for item in everything if item.startswith(group) and item.endswith("#0")}


def ran(found: dict[str, Entry]) -> dict[str, Any]:
    """How many ran, and which took longest.  Raises RuntimeError: not all that were begun did."""
    done = [entry for entry in found.values() if entry["event"] == "done"]
    slowest = max(done, key=lambda entry: entry["took_s"], default=None)
    words = f"the slowest, {slowest['item']}, took {slowest['took_s']:.1f} s" if slowest else "none ended"
    if len(done) < len(found):
        wrong = next(entry for entry in found.values() if entry["event"] != "done")
        reason = wrong.get("error", "not finished")
        raise RuntimeError(f"{len(done)} of {len(found)} ran, {words}; {wrong['item']}: {reason}")
    return {"kernels": len(done), "slowest": words}


# -- in words ---------------------------------------------------------------------------------------------------------


def report(journal: Journal) -> Iterator[str]:
    """How much ran clean under each tool, as lines of Markdown."""
    results = journal.results(STAGE)
    for tool in TOOLS:
        of_tool = {item: entry for item, entry in results.items() if item.startswith(tool)}
        groups = ", ".join(
            f"{item.partition(' ')[2]} {each['kernels']} of {each['of']}" for item, each in of_tool.items()
        )
        if groups:
            yield f"- {tool} is clean: {groups}"
