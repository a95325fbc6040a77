"""`llmc tune`, top to bottom: load, rewrite, plan, and measure the calls that can be executed in several ways."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmc import __version__
from llmc.compiler import driver
from llmc.compiler.frontend import load_source
from llmc.compiler.quantization.quantize import Scheme
from llmc.compiler.rewrite import rewrite
from llmc.compiler.target import missing, parse_target
from llmc.runtime.errors import LlmcError
from llmc.runtime.read_file import refuse_pipe
from llmc.schedules import records
from llmc.schedules.tuning import import_measured as tune_import
from llmc.schedules.tuning import tune
from llmc.schedules.tuning.bench import Bench

Progress = Callable[[int, int, dict[str, Any]], None]
"""progress(done, total, record) after each call that was tuned."""


def import_tuning(
    *sources: str | Path, out: str | Path | None = None, target: str = "cuda:sm_90a"
) -> list[dict[str, Any]]:
    """Keep what another machine has measured: the results.jsonl of a kit's runs (bench/gpu).

    out: the file of records; by default one of the user's own, which `compile_model` reads, for each card that was
    measured.  Returns a report a card: path, machine, records, how many of other calls were there already, and lines
    that were left out.  Raises LlmcError.
    """
    paths = [Path(source) for source in sources]
    return tune_import.import_records(paths, parse_target(target), None if out is None else Path(out), __version__)


def tune_model(
    model: str | Path,
    *,
    out: str | Path | None = None,
    target: str = "cpu",
    dtype: str | None = None,
    quant: str = "none",
    quant_group: int | None = None,
    quant_lm_head: bool | None = None,
    batch: Sequence[int] = (1, 2, 4, 8),
    budget: float | None = None,
    threads: int = 0,
    again: bool = False,
    progress: Progress = lambda done, total, record: None,
) -> dict[str, Any]:
    """Find the fastest schedules for a model's linear layers by measuring them here, and record them.

    The model's shapes are all that matters: no weight is read.  out: the file of records; the user's own, which
    `compile_model` reads, when None.  budget: seconds; None is until all is done.  threads: 0 is as many as this
    process may use.  again: measure anew what this machine has measured before.  The rest is as in `compile_model`.
    Returns a report: path, records made, how many were there already, how many are left.  Raises LlmcError.
    """
    began = time.monotonic()
    machine = parse_target(target)
    if lacking := missing(machine):
        fact = f"this machine lacks {', '.join(lacking)}, and only what runs can be measured"
        raise LlmcError(fact, place=f"--target {target}", hint="tune on the machine that the artifact is for")
    scheme = Scheme.parse(quant, quant_group, quant_lm_head)
    driver.check_request([machine], batch, scheme, None)
    path = Path(out) if out is not None else records.folder() / records.file_name(machine)
    refuse_pipe(path)
    source = load_source(str(model), weights="random", dtype=dtype)
    step_graph, _ = rewrite(source, scheme, None)
    calls = [choice.call for choice in driver.plan(step_graph, source, machine, batch, source.dtype).choices]
    with Bench(machine, threads) as bench:
        here = tune.here(bench, __version__)
        outcome = tune.tune(
            calls,
            machine,
            path,
            here,
            lambda job: tune.Trial(job, bench),
            budget=None if budget is None else budget - (time.monotonic() - began),
            again=again,
            progress=lambda done, total, record: progress(done, total, record.to_json()),
        )
    return {
        "path": str(path),
        "model": source.name,
        "target": str(machine),
        "machine": here.name,
        "records": [record.to_json() for record in outcome.new],
        "kept": outcome.kept,
        "left": outcome.left,
        "interrupted": outcome.interrupted,
    }
