"""Choose schedules by measurement, on the machine itself.

Of a model's calls those are tuned whose rule offers a space of parameters (rule.py): one job for each signature
(records.py).  Each is searched (search.py) with kernels timed as they will run (bench.py), and its record is
written at once, so that a run may be interrupted, and the next one goes on with what is missing.
"""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from llmc.compiler.kernel import Call, Implementation
from llmc.compiler.target import Target
from llmc.runtime.errors import LlmcError
from llmc.schedules import execute, records, rule_of
from llmc.schedules.records import Record, Signature
from llmc.schedules.tuning.bench import MOST_RUNS, SHORTEST_NS, Bench, Layer, Sample
from llmc.schedules.tuning.search import MOST, Found, Job, Measure, search

Progress = Callable[[int, int, Record], None]
"""progress(done, total, record) after each job."""
READING = "read bandwidth"
LONGEST_NS, FEWEST_ROUNDS = 2e9, 5
"""How long the rounds of a heat or a final should take, and how many there are however long that is."""
HEATS = 0.7
"""The part of a job's time that its heats may take; the rest is for the final."""


@dataclass
class Outcome:
    """What a run did.  new: the records it made; kept: jobs whose record was already there; left: jobs that time or
    the user cut off."""

    path: Path
    new: list[Record] = field(default_factory=list)
    kept: int = 0
    left: int = 0
    interrupted: bool = False


@dataclass(frozen=True)
class Machine:
    """What a record says of where it was made: the CPU with its threads, and the version of llmc."""

    name: str
    version: str


def tune(
    calls: Iterable[Call],
    target: Target,
    path: Path,
    machine: Machine,
    measurer: Callable[[Job], Measure],
    *,
    budget: float | None = None,
    again: bool = False,
    most: int = MOST,
    clock: Callable[[], float] = time.monotonic,
    progress: Progress = lambda done, total, record: None,
) -> Outcome:
    """Tune calls, and write their records into the file at `path` as they come.

    budget: seconds after which no search begins anew; shared evenly among the jobs that are left.
    again: measure also what this machine and version have measured before.  most: candidates a job.
    measurer: how a job's candidates are measured, see `on_bench`.  Raises LlmcError: the file is damaged.
    """
    known = records.load(path, target)
    everything = jobs(calls, target)
    waiting = [job for job in everything if again or not is_fresh(known.get(job.signature), job, target, machine)]
    outcome = Outcome(path, kept=len(everything) - len(waiting), left=len(waiting))
    end = None if budget is None else clock() + budget
    try:
        for index, job in enumerate(waiting):
            if end is not None and clock() >= end:
                break
            heats_end = None if end is None else clock() + HEATS * (end - clock()) / (len(waiting) - index)
            found = search(job, measurer(job), partial(is_past, heats_end, clock), most)
            record = as_record(job, found, target, machine)
            known[job.signature] = record
            records.save(path, target, known.values())
            outcome.new.append(record)
            outcome.left -= 1
            progress(index + 1, len(waiting), record)
    except KeyboardInterrupt:
        outcome.interrupted = True
    return outcome


def is_past(end: float | None, clock: Callable[[], float]) -> bool:
    return end is not None and clock() >= end


def jobs(calls: Iterable[Call], target: Target) -> list[Job]:
    """One for each signature among the calls whose rule offers several parameters; few rows first."""
    found: dict[Signature, Job] = {}
    for call in calls:
        key = records.signature(call, target)
        if key is None or key in found:
            continue
        rule, default = rule_of(call, target)
        space = list(rule.space(call, target))
        if space:
            found[key] = Job(key, call, rule, default, space)
    return sorted(found.values(), key=lambda job: (job.signature.m, job.signature))


def is_fresh(record: Record | None, job: Job, target: Target, machine: Machine) -> bool:
    """Whether this version of llmc has measured the job on this machine, and still has what it found."""
    if record is None or (record.machine, record.llmc) != (machine.name, machine.version):
        return False
    offered = records.params_of(record, job.rule, job.call, target, job.default) is not None
    return offered and not records.is_outdated(record, job.default)


def as_record(job: Job, found: Found, target: Target, machine: Machine) -> Record:
    n_bytes, n_operations = work(job.rule.implement(job.call, found.params, target))
    return Record(
        signature=job.signature,
        rule=job.rule.name,
        params=asdict(found.params),
        time_us=round(found.ns / 1e3, 1),
        share=round(found.share, 3),
        limit=found.limit,
        rate=round((n_bytes if found.limit == READING else n_operations) / (found.share * found.ns), 1),
        heuristic_us=round(found.default_ratio * found.ns / 1e3, 1),
        beat=str(found.beat) if found.beat is not None else "",
        beat_ratio=round(found.beat_ratio, 3),
        tried=found.tried,
        clean=round(found.clean, 2),
        date=datetime.date.today().isoformat(),
        machine=machine.name,
        llmc=machine.version,
    )


def work(implementation: Implementation) -> tuple[int, int]:
    """Bytes that a call must move, and its operations."""
    launches = implementation.launches
    return sum(launch.n_bytes for launch in launches), sum(launch.n_operations for launch in launches)


# -- on the machine ---------------------------------------------------------------


def here(bench: Bench, version: str) -> Machine:
    """This machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return Machine(f"{cpu}, {bench.n_threads} thread{'s' * (bench.n_threads > 1)}", version)


class Trial:
    """Measures the candidates for one call: `Trial(job, bench)([params, ...], n_rounds)`."""

    def __init__(self, job: Job, bench: Bench) -> None:
        self._job, self._bench = job, bench
        self._layers: dict[Any, Layer] = {}
        self._once: dict[Any, float] = {}  # how long a run takes, in ns
        self._weight, self._bits = 0, b""
        self._bytes, self._operations = work(job.rule.implement(job.call, job.default, bench.target))

    def __call__(
        self, candidates: Sequence[Any], n_rounds: int
    ) -> tuple[list[list[Sample]], Mapping[str, list[Sample]]]:
        subjects = [self._layer(params).subject() for params in candidates]
        reading, instruction = self._bench.reading(), multiplier(self._job, self._bench.target)
        limits = {READING: (reading, self._bytes / reading.n)}
        if instruction:
            multiplying = self._bench.multiplying(instruction)
            limits[instruction] = (multiplying, self._operations / multiplying.n)
        a_round_ns = sum(self._once[params] * self._layers[params].runs for params in candidates)
        n_rounds = max(FEWEST_ROUNDS, min(n_rounds, int(LONGEST_NS / a_round_ns)))
        samples = self._bench.rounds([*subjects, *(subject for subject, _ in limits.values())], n_rounds)
        shares = zip(limits.items(), samples[len(subjects) :], strict=True)
        return samples[: len(subjects)], {
            name: [replace(sample, ns=sample.ns * part) for sample in taken] for (name, (_, part)), taken in shares
        }

    def _layer(self, params: Any) -> Layer:
        """The call with these parameters, compiled, run once and found to give the same bits as the others."""
        if params in self._layers:
            return self._layers[params]
        job, bench = self._job, self._bench
        implementation = job.rule.implement(job.call, params, bench.target)
        layer = Layer(execute.Executable(job.call, implementation, bench.target), bench)
        self._weight = self._weight or bench.arena(layer.weight_bytes)
        bench.run(layer.launches(self._weight))
        self._bits = self._bits or layer.y.tobytes()
        if layer.y.tobytes() != self._bits:
            fact = f"schedules of one call give different bits: {params} and {next(iter(self._layers))}"
            raise LlmcError(fact, place=str(job.signature), hint="this is a bug in llmc; please report it")
        once = min(sample.ns for sample in bench.rounds([layer.subject()], 2)[0])
        layer.runs = max(1, min(MOST_RUNS, int(SHORTEST_NS / once)))
        self._once[params] = once
        self._layers[params] = layer
        return layer


def multiplier(job: Job, target: Target) -> str:
    """The instruction whose rate bounds a call; "" where none is measured."""
    weight = job.signature.weight
    if target.architecture != "x86_64":
        return ""
    if weight.startswith("i"):
        if job.rule.name == "linear_bytes_amx":
            return "tdpbsud"
        return "vpdpbusd" if target.has("avx512_vnni") else ""
    if weight in ("bf16", "f8") and target.has("avx512_bf16"):
        return "tdpbf16ps" if target.has("amx_bf16") else "dpbf16"
    return "fma512" if target.lanes == 16 else "fma256"
