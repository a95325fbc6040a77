"""The rounds: every system at every point in turn, each sample saved when it is taken.

Where all models fit into memory together they stay loaded and take turns at each point; where not, each is loaded for
its turn in every round, and ended after it, the pages of its files given back.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from llmc.bench.chart import baselines, memory
from llmc.bench.chart.record import Panel, Record, Sample
from llmc.bench.chart.request import READ_TOKENS, Request, Task, prompt
from llmc.bench.chart.subjects import Subject
from llmc.bench.limits import (
    Read,
    arithmetic_peak,
    gpu_arithmetic_peak,
    gpu_copy_bandwidth,
    memory_available,
    multiplied,
    reader,
)
from llmc.bench.peers.process import PeerError, PeerProcess
from llmc.bench.peers.quiet import Neighbours, wait_for_quiet

READ_BYTES = 1 << 29
TRIES = 2
"""A point is measured in at most so many times the rounds asked for, while others keep the machine busy."""
SHORTEST_JUDGED_S = 0.1
"""The system counts processors' time in hundredths of a second: in less than this nobody can tell who had it."""
STILL_SPINNING_S = 0.01
"""llmc's threads wait so long after a step before they sleep: whoever reads memory meanwhile shares processors with
them.
"""
Say = Callable[[str], None]


class OutOfTime(Exception):
    """The budget is spent."""


class Contest:
    """Runs the rounds of one subject into its panel of the record."""

    def __init__(self, subject: Subject, request: Request, record: Record, say: Say, deadline: float | None) -> None:
        self.subject, self.request, self.record, self.say, self.deadline = subject, request, record, say, deadline
        self.panel: Panel = record.panel(subject.panel)
        self.left = list(request.systems)
        self.running: dict[str, PeerProcess] = {}
        self.free = request.memory_bytes or memory_available(subject.device) - memory.SPARE_BYTES
        for name in self.left:
            self.panel.systems.setdefault(name, {})
        self.tasks = {name: self.fitting(name) for name in self.left}
        self.read = reader() if subject.device == "cpu" else gpu_read()

    def run(self) -> None:
        """Rounds until the record has as many samples as asked for.  Raises OutOfTime."""
        for name in self.left:
            self.panel.left_out.pop(name, None)
        self.record.save()
        if any(self.wanted(name) for name in self.left):
            self.panel.peak_operations_per_s = max(self.panel.peak_operations_per_s, self.arithmetic_peak())
        together = self.fit_together()
        try:
            for at in range(TRIES * self.request.rounds):
                for group in [list(self.left)] if together else [[name] for name in self.left]:
                    self.round(group, at)
                    if not together:
                        self.end(group)
                        give_back_pages(self.subject)
        finally:
            self.end(list(self.running))

    def round(self, group: list[str], at: int) -> None:
        """Every task by every system of a group in turn, but for what the record has."""
        for task in self.all_tasks():
            for name in group:
                if name in self.left and task in self.tasks[name] and self.missing(name, task, at):
                    with self.or_left_out(name):
                        self.sample(name, task, at)

    def all_tasks(self) -> Iterator[Task]:
        """Prompts, then decode by rising length: what a process dies of comes last."""
        lengths = self.subject.lengths
        yield from (Task(0, n) for n in self.request.prefills if n <= lengths[-1])
        yield from (Task(batch, length) for length in lengths for batch in self.request.batches)

    def sample(self, name: str, task: Task, at: int) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise OutOfTime
        if name not in self.running:
            self.say(f"{self.panel.name}: {name} starts")
            self.running[name], said = baselines.start(name, self.subject, self.request, self.tasks[name])
            self.describe(name, said)
            self.work(name, min(self.tasks[name], key=lambda task: (not task.batch, task.length)), steps=2, salt=0)
        process = self.running[name]
        wait_for_quiet(self.request.neighbours, self.request.patience_s)
        gb_per_s = self.read_gb_per_s()
        neighbours = Neighbours(process.process.pid, os.getpid())
        if name == "llmc" and task.batch and self.reads_show:
            seconds, beside = self.beside_reads(process, task)
        else:
            seconds, beside = self.work(name, task, self.request.steps, salt=1 + at), None
        others = neighbours.cores() if sum(seconds) > SHORTEST_JUDGED_S else 0.0
        rounded = [round(s, 7) for s in seconds]
        self.panel.samples.append(Sample(name, str(task), rounded, round(gb_per_s, 2), round(others, 2), beside))
        self.panel.systems[name]["peak_bytes"] = max(
            process.ask("memory")["peak_bytes"], self.panel.systems[name].get("peak_bytes", 0)
        )
        self.record.save()
        rate = task.n_tokens / sorted(seconds)[len(seconds) // 2]
        busy = f"  ({others:.1f} cores busy with others)" if others > self.request.neighbours else ""
        self.say(f"{self.panel.name}: round {at + 1}, {task}, {name}: {rate:.4g} tok/s{busy}")

    def work(self, name: str, task: Task, steps: int, salt: int) -> list[float]:
        """Seconds of each step, or of the prompt."""
        process, n_vocab = self.running[name], self.subject.manifest["model"]["n_vocab"]
        timeout = {"timeout_s": baselines.LONGEST_ANSWER_S}
        if not task.batch:
            return times(process.ask("prefill", prompt=prompt(task.length, n_vocab, salt), **timeout))
        context = task.length - steps - 1
        if not baselines.SYSTEMS[name].repeats:
            prompts = [prompt(context, n_vocab, sequence) for sequence in range(task.batch)]
            return times(process.ask("decode", prompts=prompts, steps=steps, **timeout))
        return times(process.ask("repeated", **self.repeating(task, context), steps=steps, **timeout))

    def beside_reads(self, process: PeerProcess, task: Task) -> tuple[list[float], list[float]]:
        """Seconds of each step of llmc, and the GB/s of the reads of memory right before and after it, their mean."""
        repeating = self.repeating(task, self.request.context(task.length))
        process.ask("hold", **repeating, timeout_s=baselines.LONGEST_ANSWER_S)
        seconds, reads = [], [self.read_gb_per_s()]
        for _ in range(self.request.steps):
            seconds += times(process.ask("step", timeout_s=baselines.LONGEST_ANSWER_S))
            time.sleep(STILL_SPINNING_S)
            reads.append(self.read_gb_per_s())
        return seconds, [round((before + after) / 2, 2) for before, after in pairwise(reads)]

    def repeating(self, task: Task, context: int) -> dict[str, Any]:
        """What is said of a task's sequences where contexts are repeated."""
        model = self.subject.manifest["model"]
        original = prompt(min(READ_TOKENS, model["n_context"], self.subject.lengths[-1]), model["n_vocab"])
        return {"prompt": original, "batch": task.batch, "context": context}

    def read_gb_per_s(self) -> float:
        return READ_BYTES / self.read(self.request.threads, READ_BYTES) / 1e9

    @property
    def reads_show(self) -> bool:
        """Whether reads between steps tell how fast memory is for them, and take nothing from them: on a CPU, beside
        steps that read as much, of which no cache keeps anything anyway."""
        return self.subject.device == "cpu" and self.panel.model["step_bytes"] >= READ_BYTES

    def describe(self, name: str, said: dict[str, Any]) -> None:
        before = self.panel.systems.get(name, {})
        self.panel.systems[name] = {**said, **{k: before[k] for k in ("load_s", "peak_bytes") if k in before}}

    # -- what is left to do --------------------------------------------------

    def missing(self, name: str, task: Task, at: int) -> bool:
        """Whether a sample is wanted in round `at`, of which the first are for the first samples."""
        samples = self.panel.of(name, task)
        quiet = sum(sample.neighbours <= self.request.neighbours for sample in samples)
        return quiet < self.request.rounds and len(samples) <= at

    def wanted(self, name: str) -> bool:
        """Whether any sample of a system is."""
        last = TRIES * self.request.rounds - 1
        return any(self.missing(name, task, last) for task in self.tasks[name])

    # -- memory ----------------------------------------------------------------

    def needs(self, name: str, task: Task) -> int:
        if name == "llmc":
            return memory.llmc_needs(self.subject.manifest, task)
        return memory.torch_needs(self.subject.manifest, task, "f32" if name == "onnxruntime" else self.subject.dtype)

    def fitting(self, name: str) -> list[Task]:
        """The tasks that a system has room for; the others are noted."""
        tasks = []
        for task in self.all_tasks():
            needed, context = self.needs(name, task), self.subject.manifest["model"]["n_context"]
            key = f"{name} {task}"
            self.panel.unfit.pop(key, None)
            if self.panel.of(name, task):
                tasks.append(task)
            elif task.length > context:
                self.panel.unfit[key] = {"reason": f"context {context}"}
            elif task.batch and self.request.context(task.length) < 1:
                self.panel.unfit[key] = {"reason": "shorter than the steps"}
            elif needed > self.free:
                self.panel.unfit[key] = {"needs": needed, "free": int(self.free)}
            else:
                tasks.append(task)
        return tasks

    def fit_together(self) -> bool:
        return sum(max((self.needs(n, t) for t in self.tasks[n]), default=0) for n in self.left) <= self.free

    # -- failures ----------------------------------------------------------------

    @contextmanager
    def or_left_out(self, name: str) -> Iterator[None]:
        """A system that fails takes no further part; what it did so far is kept."""
        try:
            yield
        except PeerError as error:
            self.say(f"{self.panel.name}: {name} left out: {error}")
            self.panel.left_out[name] = str(error)
            self.left.remove(name)
            self.end([name])
            self.record.save()

    def end(self, names: list[str]) -> None:
        for name in names:
            if name in self.running:
                self.running.pop(name).close()

    def arithmetic_peak(self) -> float:
        if self.subject.device == "cuda":
            return gpu_arithmetic_peak()
        kind = multiplied(self.subject.dtype, self.subject.quant)
        return arithmetic_peak(self.request.threads, kind) or arithmetic_peak(self.request.threads, "f32")


def gpu_read() -> Read:
    """Copies within the GPU's memory, as a Read."""
    return lambda threads, n_bytes: n_bytes / gpu_copy_bandwidth()


def times(answer: dict[str, Any]) -> list[float]:
    return [float(seconds) for seconds in answer["seconds"]]


def give_back_pages(subject: Subject) -> None:
    """Tell the system that the artifact's pages are not needed now: the next model wants the memory."""
    descriptor = os.open(subject.artifact, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
