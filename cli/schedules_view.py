"""`llmc inspect --schedules`: for each operator and M the schedule it took, and where linear layers change theirs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llmc.cli.output import in_bytes, table
from llmc.runtime import ArtifactFile

Said = dict[str, Any]
FAMILIES = ("GEMV", "flat GEMM", "GEMM")


def collect(file: ArtifactFile, program: int = 0) -> Said:
    manifest = file.manifest(program)
    schedules = manifest.get("schedules", [])
    return {"schedules": schedules, "switches": switches(schedules), "switched": manifest.get("switched", [])}


def write(said: Said) -> str:
    linear = [record for record in said["schedules"] if record.get("family")]
    others = [record for record in said["schedules"] if not record.get("family")]
    parts = []
    if linear:
        parts += [linear_table(linear), switch_table(said["switches"])]
    if others or not linear:
        parts.append(other_table(others))
    if switched := said.get("switched"):
        parts.append("\n".join(["passes that a measurement has turned on", *switched]))
    return "\n\n".join(parts)


def other_table(records: Sequence[Said]) -> str:
    """One line for each other operator and M."""
    layout = ("layout",) if any(record.get("layout") for record in records) else ()
    named = ("plan", "m", "op", "nodes", "rule", "params", *layout)
    rows = []
    for record in records:
        said = {**record, "op": str(record.get("op", "")).removeprefix("llmc.")}
        rows.append((*(said.get(title, "") for title in named), in_bytes(record["bytes"]) if "bytes" in record else ""))
    return table((*named, "moves"), rows)


def linear_table(records: Iterable[Said]) -> str:
    """One line for each linear layer and M."""
    titles = ("plan", "m", "op", "weight", "nodes", "schedule", "chosen", "limit", "beat", "moves", "operations")
    rows = []
    for record in sorted(records, key=lambda r: (r["plan"], r["op"], weight_in_words(r), r["m"])):
        found = record.get("measured", {})
        rows.append(
            (
                record["plan"],
                record["m"],
                record["op"].removeprefix("llmc."),
                weight_in_words(record),
                record["nodes"],
                f"{record['family']}, {record['params']}",
                "tuned in place" if found.get("in_place") else "tuned" if found else "heuristic",
                share_in_words(found) if found else "",
                beat_in_words(found) if found else "",
                in_bytes(record["bytes"]),
                f"{record['operations'] / 1e9:.3g} G",
            )
        )
    return table(titles, rows)


def switches(records: Iterable[Said]) -> list[Said]:
    """For each weight's shape the numbers of rows that are computed as GEMV, as flat GEMM and as GEMM."""
    found: dict[str, dict[str, set[int]]] = {}
    for record in records:
        if record.get("family"):
            found.setdefault(weight_in_words(record), {}).setdefault(record["family"], set()).add(record["m"])
    return [
        {"weight": weight, "rows": {family: sorted(rows) for family, rows in families.items()}}
        for weight, families in sorted(found.items())
    ]


def switch_table(switches: Sequence[Said]) -> str:
    rows = [
        (each["weight"], *(", ".join(map(str, each["rows"].get(family, ()))) or "-" for family in FAMILIES))
        for each in switches
    ]
    return table(("rows of x, by weight", *FAMILIES), rows)


def weight_in_words(record: Mapping[str, Any]) -> str:
    """bf16 [4096, 11008]: of a schedule, or of a tuned record."""
    if "n" in record:
        return f"{record['weight']} [{record['n']}, {record['k']}]"
    found = re.search(r"(\w+)\[((?:\d+,)?\d+,\d+)\]!", record["call"])  # the first constant matrix, or one an expert
    return f"{found[1]} [{found[2].replace(',', ', ')}]" if found else ""


def share_in_words(found: Mapping[str, Any]) -> str:
    """97 % of read bandwidth (35 GB/s); a question mark where other programs disturbed most of the measurement.  What
    was measured in place is said of a layer."""
    unit = "GB/s" if found["limit"].endswith("bandwidth") else "GOP/s"
    doubt = "?" if found["clean"] < 0.25 else ""
    layer = "a layer " if found.get("in_place") else ""
    return f"{layer}{100 * found['share']:.0f} %{doubt} of {found['limit']} ({found['rate']:.0f} {unit})"


def beat_in_words(found: Mapping[str, Any]) -> str:
    """What it is measured against: the next best, and the rule's own choice if that is another."""
    said = [f"{found['beat']}: {found['beat_ratio']:.2f}x"] if found["beat"] else []
    if found["heuristic_us"] != found["time_us"]:
        said.append(f"the rule's own: {found['heuristic_us'] / found['time_us']:.2f}x")
    return "; ".join(said)


def microseconds(us: float) -> str:
    return f"{us:.0f} us" if us < 10_000 else f"{us / 1000:.1f} ms"
