"""How fast this machine can read memory and multiply, as far as `llmc tune` has measured it.

Limits come from tuned records: the artifact's own, else those that come with llmc for its target, of this CPU and
number of threads.  The fastest measurement counts: others were made while something else ran.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from llmc.runtime.parse_json import parse_json

READING = "read bandwidth"


class Limits(NamedTuple):
    """The most bytes and operations per nanosecond (GB/s, GOP/s); operations are 0 where they are not known.

    operations_name: the instruction that was measured.  machine: where both were measured.
    """

    bytes_per_ns: float
    operations_per_ns: float
    operations_name: str
    machine: str

    def __str__(self) -> str:
        computing = (
            f", {self.operations_per_ns:.0f} GFLOP/s in {self.operations_name}" if self.operations_per_ns else ""
        )
        return f"{self.bytes_per_ns:.1f} GB/s read from memory{computing}, by llmc tune"

    def least_ns(self, n_bytes: float, n_operations: float) -> float:
        """The least time that moving so many bytes, and computing so many operations, can take."""
        computing = n_operations / self.operations_per_ns if self.operations_per_ns else 0.0
        return max(n_bytes / self.bytes_per_ns, computing)


def machine_name(n_threads: int) -> str:
    """This machine's name in tuned records: its CPU and the number of threads."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{cpu}, {n_threads} thread{'s' * (n_threads > 1)}"


def known_limits(manifest: Mapping[str, Any], machine: str) -> Limits | None:
    """What is known of a machine; None when nobody has measured its memory."""
    own = [record["measured"] for record in manifest.get("schedules", ()) if record.get("measured")]
    others = shipped(manifest.get("target", {}).get("name", ""))
    weight = weight_dtype(manifest)
    fitting = [r for r in others if r.get("limit") == READING or str(r.get("weight", "")).startswith(weight)]
    return limits_of(own, machine) or limits_of(fitting, machine)


def weight_dtype(manifest: Mapping[str, Any]) -> str:
    """How tuned records name the artifact's weights, which decide the instruction that multiplies: bf16, i8, f8, …"""
    quant = (manifest.get("quant") or {}).get("name")
    return (
        str(quant).replace("int", "i").replace("fp", "f") if quant else str(manifest.get("model", {}).get("dtype", ""))
    )


def tuned_machines(manifest: Mapping[str, Any]) -> list[str]:
    """Machines of which limits may be known, the artifact's own first."""
    own = [record["measured"] for record in manifest.get("schedules", ()) if record.get("measured")]
    records = [*own, *shipped(manifest.get("target", {}).get("name", ""))]
    return list(dict.fromkeys(str(record.get("machine")) for record in records))


def limits_of(records: Iterable[Mapping[str, Any]], machine: str) -> Limits | None:
    best: dict[str, float] = {}
    for record in records:
        if record.get("machine") == machine:
            best[record["limit"]] = max(best.get(record["limit"], 0.0), float(record["rate"]))
    if not best.get(READING):
        return None
    name, rate = max(
        ((name, rate) for name, rate in best.items() if name != READING), key=lambda item: item[1], default=("", 0.0)
    )
    return Limits(best[READING], rate, name, machine)


def shipped(target: str) -> list[dict[str, Any]]:
    """The tuned records that come with llmc for a target."""
    place = files("llmc") / "schedules" / "tuned" / f"{target.replace(':', '-')}.json"
    try:
        records: list[dict[str, Any]] = parse_json(place.read_text(encoding="utf-8"))["records"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return records
