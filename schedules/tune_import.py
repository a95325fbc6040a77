"""What was measured on another machine (bench/gpu), as tuned records.

Of each call the fastest parameters are kept; of attention, which is measured at several lengths of context with the
same parameters, those whose times are shortest on the geometric mean.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from math import exp, log
from pathlib import Path
from typing import Any

from llmc.compiler.target import Target
from llmc.runtime.errors import LlmcError
from llmc.schedules import records
from llmc.schedules.records import Record, Signature

COPY, PRODUCT = "copy bandwidth", "cuBLAS bf16"
Entry = Mapping[str, Any]
Params = str
"""Parameters as JSON, so that they can be compared."""


def import_records(source: Path, target: Target, path: Path, version: str) -> dict[str, Any]:
    """Bring the records in a run's results.jsonl into the file at `path`; new ones replace those of the same call.

    Returns a report: path, machine, records, how many were there already.  Raises LlmcError: nothing usable in it.
    """
    entries = read(source)
    found = list(records_of(entries, version))
    if not found:
        hint = "it must be the results.jsonl of a run with the stages a, e and f"
        raise LlmcError("the file has no tuning in it", place=str(source), hint=hint)
    known = records.load(path, target)
    kept = len(set(known) - {record.signature for record in found})
    known |= {record.signature: record for record in found}
    records.save(path, target, known.values())
    said = [record.to_json() for record in found]
    return {"path": str(path), "target": str(target), "machine": found[0].machine, "records": said, "kept": kept}


def read(source: Path) -> list[Entry]:
    """Every whole line; a run may have been cut off in the middle of one."""
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LlmcError(f"the measurements cannot be read: {error}", place=str(source)) from None
    entries: list[Entry] = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("event") == "done":
            entries.append(entry)
    return entries


def records_of(entries: Sequence[Entry], version: str) -> Iterable[Record]:
    """A record for each call that was measured with the rule's own parameters and at least once more."""
    rates, machine = rates_of(entries), machine_of(entries)
    measured = {entry["item"]: entry for entry in entries if entry["stage"] == "tune"}
    groups: dict[Signature, dict[Params, list[Entry]]] = {}
    for entry in measured.values():
        signature = Signature(**entry["signature"])
        params = json.dumps(entry["params"], sort_keys=True)
        groups.setdefault(signature, {}).setdefault(params, []).append(entry)
    for signature, candidates in groups.items():
        record = best_of(signature, candidates, rates, machine, version)
        if record is not None:
            yield record


def best_of(
    signature: Signature,
    candidates: Mapping[Params, list[Entry]],
    rates: Mapping[str, float],
    machine: str,
    version: str,
) -> Record | None:
    """The record of a call's fastest parameters; None without the rule's own, or without limits to set it against."""
    own = next((entries for entries in candidates.values() if entries[0]["own"]), None)
    if own is None or not rates:
        return None
    lengths = {entry["length"] for entry in own}
    whole = [entries for entries in candidates.values() if {entry["length"] for entry in entries} == lengths]
    ranked = sorted(whole, key=mean_us)
    best, others = ranked[0], ranked[1:]
    limit = max(rates, key=lambda name: needed_us(best, name, rates))
    return Record(
        signature=signature,
        rule=best[0]["rule"],
        params=best[0]["params"],
        time_us=round(mean_us(best), 2),
        share=round(needed_us(best, limit, rates) / mean_us(best), 3),
        limit=limit,
        rate=round(rates[limit] / 1e9, 1),
        heuristic_us=round(mean_us(own), 2),
        beat=others[0][0]["words"] if others else "",
        beat_ratio=round(mean_us(others[0]) / mean_us(best), 3) if others else 0.0,
        tried=len(candidates),
        clean=1.0,
        date=time.strftime("%Y-%m-%d", time.gmtime(max(entry["at"] for entry in best))),
        machine=machine,
        llmc=version,
    )


def mean_us(entries: Sequence[Entry]) -> float:
    """The geometric mean over lengths of context, or the one time there is."""
    return exp(sum(log(max(entry["us"], 1e-6)) for entry in entries) / len(entries))


def needed_us(entries: Sequence[Entry], limit: str, rates: Mapping[str, float]) -> float:
    """What the limit alone would take, in the same mean."""
    key = "bytes" if limit == COPY else "operations"
    return exp(sum(log(max(1e6 * entry[key] / rates[limit], 1e-9)) for entry in entries) / len(entries))


def rates_of(entries: Iterable[Entry]) -> dict[str, float]:
    """The best copy and the best matrix product of the run, in bytes and operations a second."""
    rates: dict[str, float] = {}
    for entry in (entry for entry in entries if entry["stage"] == "limits"):
        for name, key in ((COPY, "gb_per_s"), (PRODUCT, "gflop_per_s")):
            if entry.get(key):
                rates[name] = max(rates.get(name, 0.0), 1e9 * entry[key])
    return rates


def machine_of(entries: Iterable[Entry]) -> str:
    """NVIDIA H200, driver 580.159.04, CUDA 13.0"""
    facts = {entry["item"]: entry for entry in entries if entry["stage"] == "facts"}
    device, machine = facts.get("device", {}), facts.get("machine", {})
    versions = {"driver": machine.get("driver"), "CUDA": device.get("cuda")}
    said = [f"{name} {version}" for name, version in versions.items() if version]
    return ", ".join([str(device.get("name", "an unknown GPU")), *said])
