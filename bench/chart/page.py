"""A record as numbers, as Markdown, and as the part of README that shows it.

    python -m llmc.bench.chart.page README.md

rewrites what stands between <!-- chart PICTURE RECORD… --> and <!-- end chart -->, and the picture: paths are relative
to the page.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmc.bench.chart.record import Panel, Rate, Record
from llmc.bench.chart.request import Task, in_k

NOT_MEASURED = "not measured"
MARKED = re.compile(r"(<!-- chart (\S+)((?: \S+)+) -->\n).*?(<!-- end chart -->)", re.DOTALL)


def base_of(panel: Panel) -> str | None:
    """The baseline that is 1: the first that was measured, or would have been."""
    others = [name for name in panel.systems if name != "llmc"]
    measured = {sample.system for sample in panel.samples}
    return next((name for name in others if name in measured), others[0] if others else None)


def points(record: Record, panel: Panel) -> list[dict[str, Any]]:
    """Every system at every batch and length: what was measured, or why not."""
    base = base_of(panel)
    said = []
    for system in shown(panel):
        for length in panel.lengths:
            for batch in panel.batches:
                task = Task(batch, length)
                point: dict[str, Any] = {"system": system, "batch": batch, "length": length}
                if rate := record.rate(panel, system, task):
                    point["tokens_per_s"] = rate._asdict()
                    point["samples"] = len(panel.of(system, task))
                    if base and base != system and (ratio := record.speedup(panel, system, base, task)):
                        point[f"times_{base}"] = ratio._asdict()
                    if system == "llmc" and (share := record.share(panel, task)):
                        point |= {"limit_tokens_per_s": rate.median / share, "share_of_limit": share}
                else:
                    point["missing"] = why_missing(panel, system, task)
                said.append(point)
    return said


def shown(panel: Panel) -> list[str]:
    """llmc, then the others in the order they came."""
    return list({"llmc": None, **panel.systems, **panel.left_out})


def why_missing(panel: Panel, system: str, task: Task) -> str:
    """Why a bar is missing, in a few words."""
    if unfit := panel.unfit.get(f"{system} {task}"):
        if "reason" in unfit:
            return str(unfit["reason"])
        return f"needs {unfit['needs'] / 1e9:.1f} GB, {unfit['free'] / 1e9:.1f} GB free"
    return "left out" if system in panel.left_out else NOT_MEASURED


def table(record: Record, panel: Panel) -> str:
    """Lengths down, batch sizes across; llmc's cells with its speed-up and its share of the limit.  Others have a row
    where there is something to say."""
    base = base_of(panel)
    lines = [
        f"| {panel.title}, {panel.precision} | | " + " | ".join(f"batch {batch}" for batch in panel.batches) + " |",
        "|---|---|" + "---:|" * len(panel.batches),
    ]
    for length in panel.lengths:
        mark = "\\*" if length > panel.published_context else ""
        for index, system in enumerate(shown(panel)):
            cells = [cell(record, panel, system, base, Task(batch, length)) for batch in panel.batches]
            if index and set(cells) == {NOT_MEASURED}:
                continue
            first = f"{in_k(length)}{mark}" if index == 0 else ""
            lines.append(f"| {first} | {system} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(record: Record, panel: Panel, system: str, base: str | None, task: Task) -> str:
    rate = record.rate(panel, system, task)
    if rate is None:
        return why_missing(panel, system, task)
    text = digits(rate.median)
    if system != base and base and (ratio := record.speedup(panel, system, base, task)):
        text = f"{text}, {ranged(ratio)}×"
    if system == "llmc":
        text = f"**{text}**"
        if share := record.share(panel, task):
            text += f", {share:.0%}"
    return text


def facts(record: Record, panel: Panel) -> str:
    """Prefill, time to the first token, memory, load time of every system."""
    prefills = sorted({int(s.task.split()[1]) for s in panel.samples if s.task.startswith("prefill")})
    titles = [f"prefill {in_k(n)}, tok/s (first token)" for n in prefills]
    titles += ["peak memory", "loaded in", "weights", "version"]
    lines = [f"| {panel.title}, {panel.precision} | " + " | ".join(titles) + " |", "|---|" + "---|" * len(titles)]
    for index, system in enumerate(shown(panel)):
        said = panel.systems.get(system, {})
        cells = [prefill_cell(record, panel, system, Task(0, n)) for n in prefills]
        if index and set(cells) == {NOT_MEASURED}:
            continue
        cells += [
            f"{said['peak_bytes'] / 1e9:.2f} GB" if said.get("peak_bytes") else "–",
            f"{said['load_s']:.2g} s" if "load_s" in said else "–",
            str(said.get("precision", "–")),
            str(said.get("version") or ("left out" if system in panel.left_out else "–")),
        ]
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def prefill_cell(record: Record, panel: Panel, system: str, task: Task) -> str:
    rate = record.rate(panel, system, task)
    if rate is None:
        return why_missing(panel, system, task)
    share = record.share(panel, task) if system == "llmc" else None
    of_limit = f", {share:.0%}" if share else ""
    return f"{digits(rate.median)}{of_limit} ({task.length / rate.median:.2g} s)"


def markdown(records: Sequence[Record]) -> str:
    """All tables of some records, and what to know about them."""
    parts = []
    for record in records:
        for panel in record.panels:
            parts += [table(record, panel), facts(record, panel)]
            if notes := notes_of(record, panel):
                parts.append("\n".join(notes))
        parts.append(footnote(record))
    return "\n\n".join(parts)


def notes_of(record: Record, panel: Panel) -> list[str]:
    notes = [note.replace("*", "\\*", 1) if note.startswith("*") else note for note in panel.notes]
    notes += [f"{name} left out: {reason}" for name, reason in panel.left_out.items()]
    busy = sum(sample.neighbours > record.neighbours for sample in panel.samples)
    if busy:
        notes.append(
            f"{busy} of {len(panel.samples)} samples were taken while others kept more than {record.neighbours} cores "
            "busy; such a sample counts only where a point has no other"
        )
    return [f"{note}." for note in notes]


def footnote(record: Record) -> str:
    machine = record.machine
    bandwidths = [record.bandwidth(panel) for panel in record.panels if panel.samples]
    how = "copied" if "gpu" in machine else "read"
    read = f", memory {how} at {min(bandwidths) / 1e9:.1f} GB/s in the same run" if bandwidths else ""
    peak = max((panel.peak_operations_per_s for panel in record.panels), default=0)
    multiplied = f", multiply-adds at {peak / 1e9:.0f} Gop/s" if peak else ""
    return (
        "Tokens a second in decode (all sequences together), times over the baseline (range of the rounds), share of "
        f"this machine's limit. {record.machine_in_words}, {machine['memory_bytes'] / 1e9:.0f} GB, "
        f"{record.date}{read}{multiplied}. `{record.commands[-1]}`"
    )


def ranged(ratio: Rate) -> str:
    """2.5, or 2.5 (2.3–2.8) where the rounds differ."""
    low, middle, high = (f"{value:.1f}" if value < 99.5 else f"{value:.0f}" for value in (ratio[1], ratio[0], ratio[2]))
    return middle if low == high else f"{middle} ({low}–{high})"


def digits(rate: float) -> str:
    """Three of them."""
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}" if rate >= 10 else f"{rate:.2f}"


def with_charts(text: str, folder: Path) -> tuple[str, dict[Path, list[Record]]]:
    """The page with every marked part made anew, and the pictures it shows with the records they are drawn from."""
    pictures: dict[Path, list[Record]] = {}

    def part(mark: re.Match[str]) -> str:
        records = [Record.read(folder / name) for name in mark[3].split()]
        pictures[folder / mark[2]] = records
        models = ", ".join(dict.fromkeys(panel.title for record in records for panel in record.panels))
        return f"{mark[1]}\n![Decode of {models} beside Hugging Face]({mark[2]})\n\n{markdown(records)}\n\n{mark[4]}"

    return MARKED.sub(part, text), pictures


def main() -> None:
    from llmc.bench.chart.draw import draw

    page = Path(sys.argv[1])
    text, pictures = with_charts(page.read_text(), page.parent)
    page.write_text(text)
    for path, records in pictures.items():
        draw(records, path)


if __name__ == "__main__":
    main()
