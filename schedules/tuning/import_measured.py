"""Make tuned records of what was measured on another machine (bench/gpu).

For each call the fastest parameters are kept, if they are clearly faster than the rule's own.  Attention is measured at
several lengths of context with the same parameters, and the geometric mean of the times decides.  If a call was
measured both in place (in_place.py) and alone, the former counts.  Times are compared only if one card measured them
with one driver.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from llmc.compiler.target import Target
from llmc.runtime.errors import LlmcError
from llmc.runtime.parse_json import parse_json
from llmc.runtime.read_file import read_file
from llmc.schedules import records
from llmc.schedules.records import Record, Signature, signature_of
from llmc.schedules.switches import Switch
from llmc.schedules.tuning import lines
from llmc.schedules.tuning.in_place import records_in_place
from llmc.schedules.tuning.limits import COPY, PRODUCT, geometric_mean, limit_of, needed_us
from llmc.schedules.tuning.lines import Entry
from llmc.schedules.tuning.search import BETTER

RATES = {"gb_per_s": COPY, "gflop_per_s": PRODUCT}
Params = str
"""Parameters as JSON, so that they can be compared."""
LATEST = 1e11
"""Seconds since 1970 that a date may have."""


@dataclass
class Found:
    """What one card measured with one driver.  measured: the last entry of each item of the tuner; in_place: of calls
    between those of a layer; switches: of whole models with a pass and without it."""

    device: Entry = field(default_factory=dict)
    driver: str | None = None
    rates: dict[str, float] = field(default_factory=dict)
    measured: dict[str, Entry] = field(default_factory=dict)
    in_place: dict[str, Entry] = field(default_factory=dict)
    switches: dict[str, Entry] = field(default_factory=dict)

    @property
    def entries(self) -> list[Entry]:
        return [*self.measured.values(), *self.in_place.values(), *self.switches.values()]

    @property
    def machine(self) -> str:
        """NVIDIA H200, driver 580.159.04, CUDA 13.0"""
        versions = {"driver": self.driver, "CUDA": self.device.get("cuda")}
        said = [f"{name} {version}" for name, version in versions.items() if version]
        return ", ".join([str(self.device.get("name", "an unknown GPU")), *said])


def import_records(sources: Sequence[Path], target: Target, out: Path | None, version: str) -> list[dict[str, Any]]:
    """Bring the records in runs' results.jsonl into the file `out`, or each card's into its own of the user's; new ones
    replace those of the same call, but for what this version has measured in place, which only the like replaces.

    Returns a report a card: path, target, machine, records, kept: how many were there already, left_out: lines that
    could not be used.  Raises LlmcError: nothing usable in it, several cards for one file, another architecture.
    """
    left_out: list[str] = []
    runs = [run for run in found_in(sources, left_out) if run.entries]
    reports: dict[Path, dict[str, Any]] = {}
    cards = sorted({str(run.device.get("name", "")) for run in runs})
    if out is not None and len(cards) > 1:
        fact = f"the results are of {len(cards)} cards: {', '.join(cards)}"
        raise LlmcError(fact, place=str(out), hint="leave -o out: each has a file of its own")
    for run in runs:
        check_architecture(run, target)
        path = out or records.folder() / records.file_name(target, str(run.device.get("name", "")))
        known = records.load(path, target)
        found = [record for record in records_of(run, version) if stands_before(record, known.get(record.signature))]
        before = set(known) - {record.signature for record in found}
        switches = {switch.name: switch for switch in switches_of(run, version)}
        if found or switches:
            turned = records.load_switches(path, target) | switches
            records.save(path, target, (known | {each.signature: each for each in found}).values(), turned.values())
            said = {"path": str(path), "target": str(target), "machine": run.machine, "kept": len(before)}
            said["switches"] = [str(switch) for switch in switches.values()]
            reports[path] = {**said, "records": [record.to_json() for record in found], "left_out": left_out}
    if not reports:
        hint = "it must be the results.jsonl of a run with the stages a, e, and f or i, or j"
        place = ", ".join(map(str, sources)) + (f" ({left_out[0]})" if left_out else "")
        raise LlmcError("the file has no tuning in it", place=place, hint=hint)
    return list(reports.values())


def stands_before(new: Record, known: Record | None) -> bool:
    return bool(new.in_place) or known is None or not known.in_place or known.llmc != new.llmc


def check_architecture(run: Found, target: Target) -> None:
    """Raises LlmcError: measured on what the target does not run on."""
    capability = run.device.get("capability")
    if not isinstance(capability, int):
        return
    later = not target.level.endswith("a") and capability // 10 == target.arch // 10 and capability > target.arch
    if capability != target.arch and not later:
        fact = f"the results are of compute capability {capability / 10}, which {target} is not for"
        raise LlmcError(fact, place=run.machine, hint="name the target with --target cuda:sm_…")


# -- reading ----------------------------------------------------------------------------------------------------------


def found_in(sources: Iterable[Path], left_out: list[str]) -> list[Found]:
    """The runs by card and driver, the one with the latest measurement last.

    left_out: where, and why, of lines that say nothing usable."""
    runs: dict[str, Found] = {}
    for source in sources:
        run = Found()
        for number, line in enumerate(lines_of(source), 1):
            try:
                entry = entry_of(line)
                if entry is not None:
                    run = take(entry, run, runs)
            except (ValueError, TypeError, KeyError) as error:
                left_out.append(f"{source.name} line {number}: {' '.join(str(error).split())[:80]}")
    return sorted(runs.values(), key=lambda run: max((entry["at"] for entry in run.entries), default=0.0))


def lines_of(source: Path) -> list[str]:
    try:
        return read_file(source).decode(errors="replace").split("\n")
    except OSError as error:
        raise LlmcError(f"the measurements cannot be read: {error.strerror}", place=str(source)) from None


def entry_of(line: str) -> Entry | None:
    """What a line says that is done; None for other lines.  Raises ValueError or TypeError for what is no such line."""
    if not line.strip():
        return None
    entry = parse_json(line)
    if not isinstance(entry, dict):
        raise TypeError("no JSON object")
    if entry.get("event") != "done":
        return None
    if not all(isinstance(entry.get(name), str) for name in ("stage", "item")):
        raise TypeError("no stage, or no item")
    lines.number(entry, "at", LATEST)
    return entry


def take(entry: Entry, run: Found, runs: dict[str, Found]) -> Found:
    """The entry in its place; the run that the next entries belong to."""
    if entry["stage"] == "facts":
        if entry["item"] == "device":
            run = Found(entry)
        elif entry["item"] == "machine":
            run = Found(run.device, str(entry.get("driver") or "") or None)
        return runs.setdefault(run.machine, run)
    runs.setdefault(run.machine, run)
    if entry["stage"] == "limits":
        for key, name in RATES.items():
            if entry.get(key) is not None:
                run.rates[name] = max(run.rates.get(name, 0.0), 1e9 * lines.number(entry, key))
    elif entry["stage"] == "tune":
        run.measured[entry["item"]] = lines.alone(entry)
    elif entry["stage"] == lines.IN_PLACE:
        run.in_place[entry["item"]] = lines.in_place(entry)
    elif entry["stage"] == lines.SWITCHES and (measured := lines.switch(entry)):
        run.switches[entry["item"]] = measured
    return run


# -- choosing ---------------------------------------------------------------------------------------------------------


def switches_of(run: Found, version: str) -> Iterator[Switch]:
    """For each pass what whole models say, every pair of every prompt counting alike."""
    passes: dict[str, list[Entry]] = {}
    for entry in run.switches.values():
        passes.setdefault(entry["pass"], []).append(entry)
    for name, entries in passes.items():
        pairs = [b / a for each in entries for a, b in zip(each["without_s"], each["with_s"], strict=True)]
        rows = [int(each["rows"]) for each in entries]
        yield Switch(
            name=name,
            fewest=min(rows),
            most=max(rows),
            ratio=round(median(pairs), 4),
            pairs=len(pairs),
            model=", ".join(dict.fromkeys(str(each["model"]) for each in entries)),
            date=time.strftime("%Y-%m-%d", time.gmtime(max(each["at"] for each in entries))),
            machine=run.machine,
            llmc=version,
        )


def records_of(run: Found, version: str) -> Iterator[Record]:
    """A record for each call; where it was measured in place, that one."""
    in_place = {
        record.signature: record for record in records_in_place(run.in_place.values(), run.machine, run.rates, version)
    }
    yield from in_place.values()
    yield from (record for record in records_alone(run, version) if record.signature not in in_place)


def records_alone(run: Found, version: str) -> Iterator[Record]:
    """A record for each call that was measured with the rule's own parameters, at every length that these were."""
    groups: dict[Signature, dict[Params, list[Entry]]] = {}
    for entry in run.measured.values():
        params = json.dumps(entry["params"], sort_keys=True)
        groups.setdefault(signature_of(entry["signature"]), {}).setdefault(params, []).append(entry)
    for signature, candidates in groups.items():
        record = best_of(signature, candidates, run, version)
        if record is not None:
            yield record


def best_of(signature: Signature, candidates: Mapping[Params, list[Entry]], run: Found, version: str) -> Record | None:
    """The record of a call's fastest parameters, or of the rule's own where none is clearly faster; None without the
    rule's own or anything beside it, for then nothing was chosen, and without limits to set it against."""
    own = next((entries for entries in candidates.values() if entries[0]["own"]), None)
    if own is None or len(candidates) < 2 or not run.rates:
        return None
    lengths = {entry["length"] for entry in own}
    whole = [entries for entries in candidates.values() if {entry["length"] for entry in entries} == lengths]
    ranked = sorted(whole, key=mean_us)
    best = ranked[0] if mean_us(ranked[0]) < BETTER * mean_us(own) else own
    others = [entries for entries in ranked if entries is not best]
    limit = limit_of(best, run.rates)
    return Record(
        signature=signature,
        rule=best[0]["rule"],
        params=best[0]["params"],
        time_us=round(mean_us(best), 2),
        share=round(needed_us(best, limit, run.rates) / mean_us(best), 3),
        limit=limit,
        rate=round(run.rates[limit] / 1e9, 1),
        heuristic_us=round(mean_us(own), 2),
        beat=others[0][0]["words"] if others else "",
        beat_ratio=round(mean_us(others[0]) / mean_us(best), 3) if others else 0.0,
        tried=len(candidates),
        clean=1.0,
        date=time.strftime("%Y-%m-%d", time.gmtime(max(entry["at"] for entry in best))),
        machine=run.machine,
        llmc=version,
    )


def mean_us(entries: Sequence[Entry]) -> float:
    """The geometric mean over lengths of context, or the one time there is."""
    return geometric_mean(entry["us"] for entry in entries)
