"""A run in words: what works, what does not and why, and how fast everything is; from its journal alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from llmc.bench.gpu import (
    check,
    experts,
    facts,
    families,
    in_place,
    limits,
    measure,
    micro,
    profiles,
    sanitize,
    switched,
    whole,
)
from llmc.bench.gpu.journal import Entry, Journal
from llmc.bench.gpu.kit import Kit
from llmc.schedules.tuning.limits import share_of

NAMES = {
    facts.STAGE: "driver and machine",
    micro.STAGE: "primitives",
    check.STAGE: "kernels against PyTorch",
    sanitize.STAGE: "compute-sanitizer",
    limits.STAGE: "limits",
    measure.STAGE: "tuning",
    whole.STAGE: "whole models",
    profiles.STAGE: "profiles",
    in_place.STAGE: "tuning in place",
    switched.STAGE: "passes that are off",
    experts.STAGE: "experts",
    families.STAGE: "small models",
}


def write_summary(kit: Kit, journal: Journal) -> None:
    journal.path.with_name("summary.md").write_text("\n".join(lines(kit, journal)) + "\n")


def lines(kit: Kit, journal: Journal) -> Iterator[str]:
    device, machine = (journal.one(facts.STAGE, name) for name in (facts.DEVICE, facts.MACHINE))
    versions = {"driver": machine.get("driver"), "CUDA": device.get("cuda")}
    said = [f"{name} {version}" for name, version in versions.items() if version]
    yield ", ".join([f"# {device.get('name', 'no device')}", *said])
    yield ""
    yield from table(("stage", "done", "failed", "seconds"), (counts(journal, stage) for stage in NAMES))
    rates = limits.found(journal)
    yield ", ".join(f"{name}: {rate / 1e9:,.0f} G/s" for name, rate in rates.items()) or "no limit is measured"
    yield from limits.said(journal)
    yield ""
    yield from table(("call", "µs", "of the limit", "schedule", "own: µs"), best_rows(journal, rates))
    yield from table(("layer of", "own: µs", "best: µs", "saved", "other choices"), in_place.rows(kit, journal))
    yield from whole.report(journal, rates)
    yield from switched.report(journal)
    yield from experts.report(journal)
    yield from families.report(journal)
    yield from sanitize.report(journal)
    yield from failures(journal)


def counts(journal: Journal, stage: str) -> tuple[str, int, int, str]:
    latest = journal.latest(stage).values()
    events, seconds = [entry["event"] for entry in latest], sum(float(entry.get("took_s", 0)) for entry in latest)
    return NAMES[stage], events.count("done"), events.count("failed"), f"{seconds:.0f}"


def failures(journal: Journal) -> Iterator[str]:
    """One line for all items of a stage that failed for one reason."""
    for stage in NAMES:
        alike: dict[str, list[str]] = {}
        for item, entry in journal.latest(stage).items():
            if entry["event"] == "failed":
                alike.setdefault(entry["error"], []).append(item)
        for error, items in alike.items():
            more = f" and {len(items) - 1} more" if len(items) > 1 else ""
            yield f"- {stage} {items[0]}{more}: {error}"


def best_rows(journal: Journal, rates: Mapping[str, float]) -> Iterator[tuple[object, ...]]:
    """For each call, and length of context, the fastest candidate beside the rule's own."""
    groups: dict[str, list[Entry]] = {}
    for item, entry in journal.results(measure.STAGE).items():
        groups.setdefault(item.rpartition(" #")[0], []).append(entry)
    for name, entries in groups.items():
        best = min(entries, key=lambda entry: entry["us"])
        own = next((f"{entry['us']:.1f}" for entry in entries if entry["own"]), "")
        share = share_of(best, rates)
        said = f"{100 * share[1]:.0f} % of {share[0]}" if share else ""
        yield name, f"{best['us']:.1f}", said, best["words"], own


def table(titles: Iterable[str], rows: Iterable[Iterable[object]]) -> Iterator[str]:
    """As Markdown, with an empty line behind it; nothing where there are no rows."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    if lines:
        titles = list(titles)
        yield from (f"| {' | '.join(titles)} |", "|" + "---|" * len(titles), *lines, "")
