"""What was measured, saved after every sample.

    {"model": …, "threads": 2, "machine": …, "date": …, "neighbours": 0.2, "commands": […],
     "peers": {"hf:bf16": "transformers 5.23.0, …"}, "left_out": {"x:int8": "the reason"},
     "samples": [["hf:bf16", "decode 1x128", [seconds of each step], GB/s read just before, cores of others], …]}

A sample during which others kept more cores busy than "neighbours" is kept, and counts nowhere.
"""

from __future__ import annotations

import datetime
import json
import statistics
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from llmc.bench.limits import cpu_name


class Sample(NamedTuple):
    """One task done by one peer in one round: seconds of each step; what the machine was like before and meanwhile."""

    peer: str
    task: str
    seconds: list[float]
    read_gb_per_s: float
    neighbours: float


@dataclass
class Record:
    """Samples of one model on one machine; `path` None keeps them in memory alone."""

    path: Path | None
    model: str
    threads: int
    machine: str
    date: str
    neighbours: float
    commands: list[str] = field(default_factory=list)
    peers: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path | None, *, model: str, threads: int, neighbours: float) -> Record:
        """The record at `path`, to be continued, or a new one.  Raises SystemExit for a record of something else."""
        if path and path.exists():
            record = cls.read(path)
            if (record.model, record.threads) != (model, threads):
                raise SystemExit(f"{path} is a record of {record.model} with {record.threads} threads; name another")
        else:
            record = cls(path, model, threads, cpu_name(), datetime.date.today().isoformat(), neighbours)
        command = " ".join(["python -m bench.compare", *sys.argv[1:]])
        if command not in record.commands:
            record.commands.append(command)
        return record

    @classmethod
    def read(cls, path: Path) -> Record:
        fields = json.loads(path.read_text())
        fields["samples"] = [Sample(*sample) for sample in fields["samples"]]
        return cls(path=path, **fields)

    def describe(self, peer: str, version: str) -> None:
        self.peers[peer] = version
        self.left_out.pop(peer, None)
        self.save()

    def leave_out(self, peer: str, reason: str) -> None:
        self.left_out[peer] = reason
        self.save()

    def add(self, peer: str, task: str, seconds: list[float], read_gb_per_s: float, neighbours: float) -> None:
        rounded = [round(s, 6) for s in seconds]
        self.samples.append(Sample(peer, task, rounded, round(read_gb_per_s, 2), round(neighbours, 2)))
        self.save()

    def save(self) -> None:
        if not self.path:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fields = asdict(self)
        del fields["path"]
        samples = fields.pop("samples")
        text = json.dumps(fields, indent=1).removesuffix("\n}")
        lines = ",\n".join("  " + json.dumps(sample) for sample in samples)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(f'{text},\n "samples": [\n{lines}\n ]\n}}\n')
        part.replace(self.path)

    def rounds(self, peer: str, task: str) -> int:
        return len(self.seconds(peer, task))

    def tries(self, peer: str, task: str) -> int:
        return sum((sample.peer, sample.task) == (peer, task) for sample in self.samples)

    def quiet(self) -> list[Sample]:
        """The samples that count."""
        return [sample for sample in self.samples if sample.neighbours <= self.neighbours]

    def seconds(self, peer: str, task: str) -> list[list[float]]:
        """Seconds of each step, in each quiet round."""
        return [sample.seconds for sample in self.quiet() if (sample.peer, sample.task) == (peer, task)]

    def tasks(self) -> list[str]:
        return list(dict.fromkeys(sample.task for sample in self.samples))

    def rate(self, peer: str, task: str) -> tuple[float, float, float] | None:
        """Tokens a second: of the median step, of the slowest round's median and of the fastest's."""
        rounds = self.seconds(peer, task)
        if not rounds:
            return None
        n = tokens_in(task)
        medians = [statistics.median(seconds) for seconds in rounds]
        median = statistics.median([second for seconds in rounds for second in seconds])
        return n / median, n / max(medians), n / min(medians)


def tokens_in(task: str) -> int:
    """Tokens that a step of "decode 4x128" gives (4), or that "prefill 128" takes."""
    kind, _, size = task.partition(" ")
    return int(size.partition("x")[0]) if kind == "decode" else int(size)
