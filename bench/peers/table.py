"""A record as Markdown.

python -m bench.peers.table RECORD.json
python -m bench.peers.table --update README.md       rewrites the tables between <!-- table RECORD… --> marks
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from llmc.bench.peers.environments import Entry
from llmc.bench.peers.record import Record

MARKED = re.compile(r"(<!-- table ([^\n>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def table_of(*records: Record) -> str:
    """Peers by bits, the fastest first; under each rate the range of its rounds, and how it stands to llmc's best.
    Of several records one table: the models one after another."""
    tasks = sorted({task: None for record in records for task in record.tasks()}, key=place_of)
    first = records[0].model if len(records) == 1 else ""
    lines = [f"| {first} | " + " | ".join(tasks) + " | version |", "|---" * (len(tasks) + 2) + "|"]
    for record in records:
        named = f"{record.model} " * (len(records) > 1)
        peers = sorted({sample.peer for sample in record.samples}, key=lambda peer: order(record, peer, tasks))
        for peer in peers:
            cells = [cell(record, peer, task, peers) for task in tasks]
            lines.append(f"| {named}{peer} | " + " | ".join(cells) + f" | {record.peers.get(peer, '')} |")
    lines += ["", notes(records)]
    lines += [f"Left out: {peer} ({why})." for record in records for peer, why in record.left_out.items()]
    return "\n".join(lines)


def place_of(task: str) -> tuple[bool, int, str]:
    """Where a task stands: decode first, shorter ones first."""
    return task.startswith("prefill"), len(task), task


def notes(records: Sequence[Record]) -> str:
    """What numbers mean; on what, when and beside whom they were measured."""
    samples = [sample for record in records for sample in record.samples]
    reads = sorted(sample.read_gb_per_s for record in records for sample in record.quiet())
    dates = sorted({record.date for record in records})
    said = (
        f"Tokens a second, median (range of the rounds' medians), × times llmc's at the same bits. "
        f"{records[0].machine}, {records[0].threads} threads, {' and '.join(dates)}; "
    )
    if reads:
        middle = f"{statistics.median(reads):.1f} GB/s ({reads[0]:.1f}–{reads[-1]:.1f})"
        said += f"memory read in the same run at {middle}."
    if dropped := len(samples) - len(reads):
        said += f" {dropped} of {len(samples)} samples dropped: others used more than {records[0].neighbours} cores."
    return said


def order(record: Record, peer: str, tasks: list[str]) -> tuple[int, bool, float]:
    rate = record.rate(peer, tasks[0])
    return -Entry.parse(peer).bits, not peer.startswith("llmc:"), -(rate[0] if rate else 0.0)


def cell(record: Record, peer: str, task: str, peers: list[str]) -> str:
    rate = record.rate(peer, task)
    if rate is None:
        return "–"
    median, low, high = rate
    text = f"{number(median)} ({number(low)}–{number(high)})"
    bits = Entry.parse(peer).bits
    ours = [record.rate(p, task) for p in peers if p.startswith("llmc:") and Entry.parse(p).bits == bits]
    best = max((r[0] for r in ours if r), default=0.0)
    return text if peer.startswith("llmc:") or not best else f"{text} ×{median / best:.2f}"


def number(rate: float) -> str:
    return f"{rate:.1f}" if rate < 100 else f"{rate:.0f}"


def with_tables(text: str, folder: Path) -> str:
    """The text with every marked table made anew from its record, whose path is relative to `folder`."""
    return MARKED.sub(lambda mark: f"{mark[1]}{table_of(*read(folder, mark[2]))}\n{mark[3]}", text)


def read(folder: Path, names: str) -> list[Record]:
    return [Record.read(folder / name) for name in names.split()]


def main() -> None:
    if sys.argv[1:2] == ["--update"]:
        page = Path(sys.argv[2])
        page.write_text(with_tables(page.read_text(), page.parent))
    else:
        print("\n\n".join(table_of(Record.read(Path(path))) for path in sys.argv[1:]))


if __name__ == "__main__":
    main()
