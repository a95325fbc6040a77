"""From a request to a record: subjects one after the other, each measured to its end."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmc import __version__
from llmc.bench import limits
from llmc.bench.chart import baselines
from llmc.bench.chart.measure import Contest, OutOfTime
from llmc.bench.chart.record import Record
from llmc.bench.chart.request import Request
from llmc.bench.chart.subjects import Progress, subjects
from llmc.runtime.errors import LlmcError


def run(
    request: Request, path: Path | None, *, resume: bool, command: str, say: Callable[[str], None], progress: Progress
) -> tuple[Record, bool]:
    """Measure what the record at `path` lacks.  -> the record, and whether it is complete.

    Interrupted or out of time it is not, and holds what was measured until then.  Raises LlmcError.
    """
    baselines.check(request.against)
    is_new = path is not None and not path.exists()
    record = open_record(request, path, resume=resume)
    if command not in record.commands:
        record.commands.append(command)
    record.save()
    deadline = None if request.budget_s is None else time.monotonic() + request.budget_s
    try:
        for model in request.models:
            for subject in subjects(model, request, progress):
                if subject.device == "cuda":
                    record.machine["gpu"] = limits.gpu_name()
                Contest(subject, request, record, say, deadline).run()
    except (KeyboardInterrupt, OutOfTime):
        return record, False
    except LlmcError:
        if is_new and path is not None and not record.panels:
            path.unlink(missing_ok=True)
        raise
    return record, True


def open_record(request: Request, path: Path | None, *, resume: bool) -> Record:
    """A new record, or the one at `path` to go on with.  Raises LlmcError."""
    machine = this_machine()
    if path is None or not path.exists():
        return Record(path, machine, request.steps, request.threads, request.neighbours)
    if not resume:
        raise LlmcError(
            "there is a record already", place=str(path), hint="--resume goes on with it, --output names another"
        )
    record = Record.read(path)
    for word, theirs, ours in (
        ("machine", record.machine["name"], machine["name"]),
        ("number of threads", record.threads, request.threads),
        ("number of steps", record.steps, request.steps),
    ):
        if theirs != ours:
            fact = f"the record is of another {word}: {theirs}, not {ours}"
            raise LlmcError(fact, place=str(path), hint="name another file with --output")
    return record


def this_machine() -> dict[str, Any]:
    return {
        "name": limits.cpu_name(),
        "memory_bytes": memory_total(),
        "cpus": limits.n_cpus(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "llmc": __version__,
    }


def memory_total() -> int:
    line = Path("/proc/meminfo").read_text().splitlines()[0]
    return int(line.split()[1]) << 10
