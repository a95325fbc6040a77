"""The table of `llmc run --profile`: where the time of a step goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmc.cli.call_facts import shortened
from llmc.cli.machine_limits import Limits
from llmc.cli.output import in_bytes, table

TITLES = ("kernel", "operator", "calls", "time", "share", "bytes", "GB/s", "GFLOP/s")


def write(said: Mapping[str, Any]) -> str:
    """A table for each phase, and what the limits are."""
    parts = [write_phase(phase, said["limits"] is not None) for phase in said["phases"]]
    return "\n\n".join([*parts, footnote(said)])


def write_phase(phase: Mapping[str, Any], with_limit: bool) -> str:
    n, tokens = phase["steps"], phase["tokens"]
    head = (
        f"{phase['phase']}: {n} step{'s' * (n != 1)}, {tokens} token{'s' * (tokens != 1)}, "
        f"{in_time(phase['ns'])} a step (median {in_time(phase['median_ns'])}); of a step on average:"
    )
    rows: list[tuple[str, ...]] = [row_of(kernel, with_limit) for kernel in phase["kernels"]]
    rest = phase["ns_between_kernels"]
    outside = ("between kernels", "", "", in_time(rest), in_percent(rest / phase["ns"] if phase["ns"] else 0.0))
    rows.append(outside + ("",) * (len(TITLES) - len(outside) + with_limit))
    return f"{head}\n{right_aligned((*TITLES, 'of limit') if with_limit else TITLES, rows)}"


def row_of(kernel: Mapping[str, Any], with_limit: bool) -> tuple[str, ...]:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"

    row = (
        shortened(kernel["kernel"]),
        kernel["op"],
        number(kernel["calls"]),
        in_time(kernel["ns"]),
        in_percent(kernel["share"]),
        "" if kernel["bytes"] is None else in_bytes(kernel["bytes"]),
        number(kernel["gb_per_s"]),
        number(kernel["gflop_per_s"]),
    )
    share = kernel["share_of_limit"]
    return (*row, "" if share is None else in_percent(share)) if with_limit else row


def footnote(said: Mapping[str, Any]) -> str:
    limits = said["limits"]
    lines = []
    if limits is None:
        lines.append(f"the limits of this machine ({said['machine']}) are not known: llmc tune measures them")
    else:
        lines.append(f"limit: {Limits(**limits)} on {limits['machine']}; more than 100 % comes from a cache")
    if said["n_lost"]:
        lines.append(f"{said['n_lost']} events found no room and are missing here")
    if said["n_unrecorded"]:
        lines.append(f"the last {said['n_unrecorded']} steps are not recorded: the profile was full")
    return "\n".join(lines)


def right_aligned(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """All columns but the first two to the right."""
    widths = [max(len(row[i]) for row in (titles, *rows)) for i in range(2, len(titles))]

    def aligned(row: tuple[str, ...]) -> tuple[str, ...]:
        return (*row[:2], *(f"{cell:>{width}}" for cell, width in zip(row[2:], widths, strict=True)))

    return table(aligned(titles), [aligned(row) for row in rows])


def in_time(ns: float) -> str:
    """A short time for people: 812 ns, 13.4 us, 2.61 ms."""
    for unit in ("ns", "us", "ms"):
        if ns < 1000:
            return f"{ns:.0f} ns" if unit == "ns" else f"{ns:.3g} {unit}"
        ns /= 1000
    return f"{ns:.3g} s"


def in_percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.995 else f"{100 * share:.0f} %"
