"""What was measured: one JSON file, replaced whole after every sample, from which everything else is made."""

from __future__ import annotations

import datetime
import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llmc.bench.chart import memory
from llmc.bench.chart.request import Task
from llmc.bench.contexts import context_bytes
from llmc.runtime.errors import LlmcError
from llmc.runtime.parse_json import parse_json
from llmc.runtime.read_file import read_file

FORMAT = "llmc bench 1"


class Sample(NamedTuple):
    """A task done by a system in one round.

    seconds: of each step, or of the prompt.  read_gb_per_s: memory read just before.  neighbours: cores others kept
    busy meanwhile.  beside_gb_per_s: of each step the mean of memory read right before and right after it, where that
    was done.
    """

    system: str
    task: str
    seconds: list[float]
    read_gb_per_s: float
    neighbours: float
    beside_gb_per_s: list[float] | None = None


class Rate(NamedTuple):
    """Tokens a second, or times a baseline: the median sample, the lowest and the highest."""

    median: float
    low: float
    high: float


@dataclass
class Panel:
    """A model at a precision: one part of the picture.

    published_context: the model's own longest sequence; beyond it, positions were added and weights are random.
    model: bytes a step reads besides the KV cache, bytes of the cache a token, bits of a weight, …
    systems: what is known of each: version, precision, load_s, peak_bytes.  left_out: who ended early, and why.
    unfit: "SYSTEM TASK" -> {"needs": bytes, "free": bytes}, or {"reason": words}.
    """

    name: str
    title: str
    precision: str
    weights: str
    batches: list[int]
    lengths: list[int]
    published_context: int
    model: dict[str, Any] = field(default_factory=dict)
    peak_operations_per_s: float = 0.0
    systems: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    unfit: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def of(self, system: str, task: Task) -> list[Sample]:
        """The samples of a system at a task, in the order they were taken."""
        return [sample for sample in self.samples if (sample.system, sample.task) == (system, str(task))]

    def counted(self, system: str, task: Task, neighbours: float) -> list[Sample]:
        """Those of the samples that are quiet; all of them, if none is."""
        samples = self.of(system, task)
        return [sample for sample in samples if sample.neighbours <= neighbours] or samples


@dataclass
class Record:
    """The panels measured on one machine with the same steps and threads.  path None: kept in memory alone."""

    path: Path | None
    machine: dict[str, Any]
    steps: int
    threads: int
    neighbours: float
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())
    commands: list[str] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)

    @property
    def machine_in_words(self) -> str:
        """The CPU with its threads, or the GPU with its driver where that is known."""
        if "gpu" not in self.machine:
            return f"{self.machine['name']}, {self.threads} threads"
        driver = self.machine.get("driver")
        return f"{self.machine['gpu']}, driver {driver}" if driver else str(self.machine["gpu"])

    @classmethod
    def read(cls, path: Path) -> Record:
        """Raises LlmcError for a file that is not there or no such record."""
        try:
            fields = parse_json(read_file(path))
            if fields.pop("format") != FORMAT:
                raise ValueError
            panels = [
                Panel(**{**panel, "samples": [Sample(*sample) for sample in panel["samples"]]})
                for panel in fields.pop("panels")
            ]
            return cls(path=path, panels=panels, **fields)
        except OSError as error:
            raise LlmcError(f"the record cannot be read: {error.strerror}", place=str(path)) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise LlmcError("this is not a record of llmc bench", place=str(path), hint="name another file") from error

    def save(self) -> None:
        """Replace the file whole.  Raises LlmcError; what was there before stays then."""
        if self.path is None:
            return
        fields = asdict(self)
        del fields["path"]
        part = self.path.with_name(self.path.name + ".part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(as_text({"format": FORMAT, **fields}) + "\n")
            part.replace(self.path)
        except OSError as error:
            part.unlink(missing_ok=True)
            hint = "what was saved before is kept; make room and go on with --resume"
            raise LlmcError(
                f"the record could not be written: {error.strerror}", place=str(self.path), hint=hint
            ) from error

    def panel(self, new: Panel) -> Panel:
        """The panel of this name, with the points of both, or `new`.  Raises LlmcError for another artifact's."""
        for panel in self.panels:
            if panel.name == new.name:
                panel.batches = sorted({*panel.batches, *new.batches})
                panel.lengths = sorted({*panel.lengths, *new.lengths})
                compiled = panel.model["compiled"]
                for name, when in new.model["compiled"].items():
                    if panel.samples and compiled.get(name, when) != when:
                        fact = f"{name} was compiled anew since these points were measured"
                        raise LlmcError(fact, place=str(self.path), hint="name another file with --output")
                panel.model |= {**new.model, "compiled": {**compiled, **new.model["compiled"]}}
                panel.notes = list(dict.fromkeys([*panel.notes, *new.notes]))
                return panel
        self.panels.append(new)
        return new

    def rate(self, panel: Panel, system: str, task: Task) -> Rate | None:
        """Tokens a second, of each sample's median step."""
        samples = panel.counted(system, task, self.neighbours)
        return spread(task.n_tokens / statistics.median(sample.seconds) for sample in samples)

    def speedup(self, panel: Panel, system: str, over: str, task: Task) -> Rate | None:
        """How many times faster a system is: the ratio of the medians, and the range of the rounds' ratios."""
        ours, theirs = self.rate(panel, system, task), self.rate(panel, over, task)
        if not ours or not theirs:
            return None
        pairs = zip(panel.of(system, task), panel.of(over, task), strict=False)
        ratios = [statistics.median(b.seconds) / statistics.median(a.seconds) for a, b in pairs]
        middle = ours.median / theirs.median
        return Rate(middle, min([middle, *ratios]), max([middle, *ratios]))

    def bandwidth(self, panel: Panel) -> float:
        """Bytes a second: the median of the reads beside the samples."""
        rates = [sample.read_gb_per_s for sample in panel.samples]
        return 1e9 * statistics.median(rates) if rates else 0.0

    def share(self, panel: Panel, task: Task) -> float | None:
        """Of what this machine could give what llmc reached: the median of its samples' median steps, each set against
        the reads right beside it.  Without such reads its rate against those of the whole run."""
        samples = [s for s in panel.counted("llmc", task, self.neighbours) if s.beside_gb_per_s]
        if not samples:
            rate, limit = self.rate(panel, "llmc", task), self.limit_of_the_run(panel, task)
            return rate.median / limit if rate and limit else None
        return statistics.median(
            statistics.median(
                least_seconds(panel, task, 1e9 * beside) / seconds
                for seconds, beside in zip(sample.seconds, sample.beside_gb_per_s or [], strict=True)
            )
            for sample in samples
        )

    def limit(self, panel: Panel, task: Task) -> float | None:
        """The most tokens a second that this machine could give while llmc was measured."""
        rate, share = self.rate(panel, "llmc", task), self.share(panel, task)
        return rate.median / share if rate and share else self.limit_of_the_run(panel, task)

    def limit_of_the_run(self, panel: Panel, task: Task) -> float | None:
        """The most tokens a second, by the median of all reads."""
        bandwidth = self.bandwidth(panel)
        if not bandwidth or not panel.model:
            return None
        return task.n_tokens / least_seconds(panel, task, bandwidth)


def least_seconds(panel: Panel, task: Task, bandwidth: float) -> float:
    """What a task takes at least: by the bytes a step of llmc reads, at so many a second, and the operations it does,
    at the rate measured in the run."""
    of_sequence = panel.model.get("kv_cache", {"bytes_per_token": panel.model["kv_bytes_per_token"]})
    cache = task.batch * context_bytes(of_sequence, task.length)
    seconds = (memory.read_bytes(panel.model, task.n_tokens) + cache) / bandwidth
    if panel.peak_operations_per_s:
        seconds = max(seconds, operations(panel.model, task) / panel.peak_operations_per_s)
    return float(seconds)


def operations(model: dict[str, Any], task: Task) -> float:
    """What the products of a task are: of a decode step, or of a whole prompt, whose last token alone needs logits, and
    in which every token attends to those before it.  (What older records don't say of a model counts as nothing.)"""
    n_weights, n = model["n_weights"], task.length
    if task.batch:
        return float(2 * task.batch * n_weights)
    head, width = model.get("head_weights", 0), model.get("attention_width", 0)
    attention = 2 * 2 * width * n * (n + 1) / 2
    return float(2 * n * (n_weights - head) + 2 * head + attention)


def spread(rates: Iterable[float]) -> Rate | None:
    listed = list(rates)
    return Rate(statistics.median(listed), min(listed), max(listed)) if listed else None


def as_text(value: Any, indent: str = "") -> str:
    """JSON with a line for every field and every sample."""
    inner = indent + " "
    if isinstance(value, dict) and value:
        items = [f"{inner}{json.dumps(key)}: {as_text(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, list | tuple) and any(isinstance(item, dict | list | tuple) for item in value):
        if any(isinstance(item, dict) for item in value):
            return "[\n" + ",\n".join(inner + as_text(item, inner) for item in value) + f"\n{indent}]"
        if all(isinstance(item, list | tuple) for item in value):
            return "[\n" + ",\n".join(inner + json.dumps(item) for item in value) + f"\n{indent}]"
    return json.dumps(value)
