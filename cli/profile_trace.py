"""`llmc run --profile`: per-kernel times in Chrome's trace event format, and summed up by kernel.

The file opens in Perfetto (ui.perfetto.dev) and in chrome://tracing: one row for steps and the plans they run, one for
kernels, one for each thread.  Its key "llmc" holds the sums, for `llmc inspect --html --profile`.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import IO, Any, NamedTuple, get_args

import numpy as np

from llmc.cli.call_facts import CallFacts, facts_of_plan
from llmc.cli.machine_limits import Limits, known_limits, machine_name
from llmc.cli.output import manifest_shown
from llmc.cli.trace_summary import VERSION, Said
from llmc.runtime import ArtifactFile, LlmcError
from llmc.runtime.artifact import program_section
from llmc.runtime.format import PLAN_KINDS
from llmc.runtime.plan import PlanTables
from llmc.runtime.profile import Events, Phase, Profile, ProfiledStep

STEPS, KERNELS, FIRST_THREAD = 0, 1, 10
"""Rows of the trace; each thread has one, from FIRST_THREAD on."""


class Share(NamedTuple):
    """One thread's share of a call, or all of it (thread -1).  start, end: ns of CLOCK_MONOTONIC."""

    run: int
    call: int
    thread: int
    start: int
    end: int
    n_tasks: int


class Measured(NamedTuple):
    """A profile, with what the artifact says of its calls and what is known of the machine.

    calls: by index in the plan section.
    """

    profile: Profile
    tables: PlanTables
    calls: Mapping[int, CallFacts]
    limits: Limits | None
    machine: str
    plan_sha256: str
    model: str

    @classmethod
    def of(cls, profile: Profile, artifact: str, n_threads: int, program: int = 0) -> Measured:
        with ArtifactFile.open(artifact) as file:
            tables, manifest = file.plan(program), file.manifest(program)
            digest = file.sections[program_section("plan", program)].sha256.hex()
        calls = {fact.number: fact for plan in tables.plans for fact in facts_of_plan(tables, plan, manifest)}
        machine = machine_name(n_threads)
        name = str(manifest.get("model", {}).get("name", ""))
        return cls(profile, tables, calls, known_limits(manifest, machine), machine, digest, name)


def shares(events: Events, *keys: str) -> list[Share]:
    """Events put together where all `keys` ("run" and "call", perhaps "thread") are equal, in order of their start."""
    if not len(events):
        return []
    order = np.lexsort([events[key] for key in reversed(keys)])
    events = events[order]
    changes = np.zeros(len(events), bool)
    changes[0] = True
    for key in keys:
        changes[1:] |= events[key][1:] != events[key][:-1]
    first = np.flatnonzero(changes)
    starts, ends = np.minimum.reduceat(events["start_ns"], first), np.maximum.reduceat(events["end_ns"], first)
    sizes = np.diff(np.append(first, len(events)))
    threads = events["thread"][first] if "thread" in keys else np.full(len(first), -1)
    columns = (events["run"][first], events["call"][first], threads, starts, ends, sizes)
    return sorted((Share(*map(int, row)) for row in zip(*columns, strict=True)), key=lambda s: (s.start, s.run))


# -- sums -------------------------------------------------------------------------


def summary(measured: Measured) -> Said:
    """The value of the trace's key "llmc": limits, sums by kernel for each phase, medians by call for each plan."""
    profile, limits = measured.profile, measured.limits
    return {
        "version": VERSION,
        "plan_sha256": measured.plan_sha256,
        "model": measured.model,
        "machine": measured.machine,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "limits": limits._asdict() if limits else None,
        "n_lost": profile.n_lost,
        "n_unrecorded": profile.n_unrecorded,
        "phases": [phase_summary(measured, phase) for phase in get_args(Phase) if has_phase(profile, phase)],
        "plans": plan_medians(measured),
    }


def has_phase(profile: Profile, phase: str) -> bool:
    return any(step.phase == phase for step in profile.steps)


def phase_summary(measured: Measured, phase: str) -> Said:
    """Sums over the steps of a phase, per step; times in ns."""
    steps = [step for step in measured.profile.steps if step.phase == phase]
    times = [step.end_ns - step.start_ns for step in steps]
    total = sum(times)
    sums: dict[str, Said] = {}
    for step in steps:
        for share in shares(step.events, "run", "call"):
            add(sums, measured.calls[share.call], share.end - share.start, step.mean_context)
    in_kernels = sum(kernel["ns"] for kernel in sums.values())
    n = len(steps)
    return {
        "phase": phase,
        "steps": n,
        "tokens": sum(step.n_tokens for step in steps),
        "ns": total / n,
        "median_ns": float(np.median(times)),
        "ns_between_kernels": (total - in_kernels) / n,
        "kernels": sorted(
            (per_step(kernel, n, total, measured.limits) for kernel in sums.values()), key=lambda k: -k["ns"]
        ),
    }


def add(sums: dict[str, Said], fact: CallFacts, ns: int, context: float) -> None:
    empty = {"kernel": fact.kernel, "op": fact.op, "family": fact.schedule.get("family", "")}
    entry = sums.setdefault(fact.kernel, {**empty, "calls": 0, "ns": 0, "bytes": 0.0, "operations": 0.0})
    entry["calls"] += 1
    entry["ns"] += ns
    work = fact.work(context)
    if work is None or entry["bytes"] is None:
        entry["bytes"] = entry["operations"] = None
    else:
        entry["bytes"] += work[0]
        entry["operations"] += work[1]


def per_step(kernel: Said, n_steps: int, total_ns: int, limits: Limits | None) -> Said:
    """A kernel's sums per step, with its rates, its share of the time, and how near it is to the machine's limits."""
    ns, n_bytes, n_operations = kernel["ns"], kernel["bytes"], kernel["operations"]
    known = n_bytes is not None and ns > 0
    return kernel | {
        "calls": kernel["calls"] / n_steps,
        "ns": ns / n_steps,
        "share": ns / total_ns if total_ns else 0.0,
        "bytes": n_bytes / n_steps if known else None,
        "operations": n_operations / n_steps if known else None,
        "gb_per_s": n_bytes / ns if known else None,
        "gflop_per_s": n_operations / ns if known else None,
        "share_of_limit": limits.least_ns(n_bytes, n_operations) / ns if known and limits else None,
    }


def plan_medians(measured: Measured) -> list[Said]:
    """For each plan that ran: how often, and the median times, in ns, of a run and of each of its calls."""
    runs: dict[int, list[int]] = {}
    times: dict[int, list[int]] = {}
    contexts: dict[int, list[float]] = {}
    plan_of = {
        call: index
        for index, plan in enumerate(measured.tables.plans)
        for call in range(plan.first_call, plan.first_call + plan.n_calls)
    }
    for step in measured.profile.steps:
        for calls in runs_of(step):
            index = plan_of[calls[0].call]
            runs.setdefault(index, []).append(calls[-1].end - calls[0].start)
            contexts.setdefault(index, []).append(step.mean_context)
            for share in calls:
                times.setdefault(share.call, []).append(share.end - share.start)
    return [
        {
            "kind": PLAN_KINDS[plan.kind],
            "rows": plan.n_rows,
            "runs": len(runs[index]),
            "ns": float(np.median(runs[index])),
            "context": float(np.mean(contexts[index])),
            "calls": [float(np.median(times.get(plan.first_call + i, [0]))) for i in range(plan.n_calls)],
        }
        for index, plan in enumerate(measured.tables.plans)
        if index in runs
    ]


def runs_of(step: ProfiledStep) -> Iterator[list[Share]]:
    """The calls of a step, a list for each plan that it ran."""
    by_run = sorted(shares(step.events, "run", "call"), key=itemgetter(0))
    for _, calls in groupby(by_run, key=itemgetter(0)):
        yield sorted(calls, key=lambda share: share.start)


# -- the trace ----------------------------------------------------------------------


def check_place(path: str) -> None:
    """Raises LlmcError for a path that no trace can be written to, before anything runs."""
    place = Path(path)
    if place.is_dir():
        raise LlmcError("the trace's place is a directory", place=path, hint="name a file: --profile trace.json")
    writable = os.access(place, os.W_OK) if place.exists() else os.access(place.parent, os.W_OK | os.X_OK)
    if not writable:
        reason = "no permission" if place.parent.is_dir() else f"there is no folder {place.parent}"
        raise LlmcError(f"the trace cannot be written: {reason}", place=path)


def save(path: str, profile: Profile, artifact: str, n_threads: int, program: int = 0) -> Said:
    """Write the trace.  -> its summary.  program: the number of the artifact's program that ran.

    Raises LlmcError when the file cannot be written.
    """
    with manifest_shown("the profile", artifact):
        measured = Measured.of(profile, artifact, n_threads, program)
        said = summary(measured)
    write_trace(path, measured, said)
    return said


def write_trace(path: str, measured: Measured, said: Mapping[str, Any]) -> None:
    """Raises LlmcError when the file cannot be written."""
    try:
        with Path(path).open("w", encoding="utf-8") as file:
            write_events(file, measured)
            file.write(f'],\n"displayTimeUnit": "ns",\n"llmc": {json.dumps(said)}}}\n')
    except OSError as error:
        if Path(path).is_file():  # no half of a trace; a device keeps its name
            Path(path).unlink()
        raise LlmcError(f"the trace cannot be written: {error.strerror}", place=path) from None


def write_events(file: IO[str], measured: Measured) -> None:
    file.write('{"traceEvents": [\n')
    file.write(",\n".join(json.dumps(event) for event in events_of(measured)))
    file.write("\n")


def events_of(measured: Measured) -> Iterator[Said]:
    """The trace's events: names of the rows, then slices.  Times are microseconds since the first step began."""
    steps = measured.profile.steps
    zero = steps[0].start_ns if steps else 0
    threads = sorted({int(thread) for step in steps for thread in np.unique(step.events["thread"])})
    rows = {STEPS: "steps", KERNELS: "kernels", **{FIRST_THREAD + t: f"thread {t}" for t in threads}}
    yield named("process_name", 0, f"llmc {measured.model}")
    for row, name in rows.items():
        yield named("thread_name", row, name)
        yield {"ph": "M", "name": "thread_sort_index", "pid": 1, "tid": row, "args": {"sort_index": row}}
    for number, step in enumerate(steps, 1):
        yield from events_of_step(measured, step, number, zero)


def events_of_step(measured: Measured, step: ProfiledStep, number: int, zero: int) -> Iterator[Said]:
    tokens = {"step": number, "tokens": step.n_tokens, "sequences": len(step.inputs), "context": step.mean_context}
    yield piece(step.phase, "step", STEPS, step.start_ns - zero, step.end_ns - step.start_ns, tokens)
    plans = {p.first_call: p for p in measured.tables.plans}
    for calls in runs_of(step):
        plan = plans[max(first for first in plans if first <= calls[0].call)]
        name = f"{PLAN_KINDS[plan.kind]} of {plan.n_rows}"
        yield piece(name, "plan", STEPS, calls[0].start - zero, calls[-1].end - calls[0].start, {})
        for share in calls:
            fact = measured.calls[share.call]
            about = {"kernel": fact.kernel, "node": fact.op, "weight": fact.weight, **rates(fact, share, step)}
            yield piece(fact.short_kernel, fact.op, KERNELS, share.start - zero, share.end - share.start, about)
    for share in shares(step.events, "run", "call", "thread"):
        fact = measured.calls[share.call]
        row = FIRST_THREAD + share.thread
        about = {"tasks": share.n_tasks}
        yield piece(fact.short_kernel, fact.op, row, share.start - zero, share.end - share.start, about)


def rates(fact: CallFacts, share: Share, step: ProfiledStep) -> Said:
    work, ns = fact.work(step.mean_context), max(1, share.end - share.start)
    if work is None:
        return {}
    about = {"bytes": round(work[0]), "GB/s": round(work[0] / ns, 2), "operations": round(work[1])}
    return about | {"GFLOP/s": round(work[1] / ns, 2), "rule": str(fact.schedule.get("rule", ""))}


def piece(name: str, category: str, row: int, start_ns: int, ns: int, about: Said) -> Said:
    return {
        "ph": "X",
        "name": name,
        "cat": category or "kernel",
        "pid": 1,
        "tid": row,
        "ts": start_ns / 1000,
        "dur": ns / 1000,
        "args": about,
    }


def named(what: str, row: int, name: str) -> Said:
    return {"ph": "M", "name": what, "pid": 1, "tid": row, "args": {"name": name}}
