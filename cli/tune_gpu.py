"""`llmc tune` for NVIDIA GPUs: a kit to measure with elsewhere (--emit), what it found (--import), or both at once."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from llmc.cli.compile import terminated_as_interrupted
from llmc.cli.output import compiler_installed, in_bytes, print_json, say
from llmc.runtime.errors import LlmcError

BUDGET_S = 1800.0
STDERR = 2
MOST = 16
"""The most candidates that are measured for a call."""
DEFAULT_TARGET = "cuda:sm_90a"
STAGES = "abcefi"
"""The stages of a kit's run: is it right, what is the limit, how fast is each candidate, alone and in its place."""


def tune_gpu(
    model: str | None,
    imported: Sequence[Path],
    emit: Path | None,
    out: Path | None,
    target: str,
    options: Mapping[str, Any],
    budget: float,
    as_json: bool,
) -> None:
    """Write a kit, import what one found, or do both here.

    options: batch and quantisation, as `llmc tune` has them.  budget: seconds of measuring on this machine.
    """
    if not target.startswith("cuda"):
        if not imported:
            fact, hint = "a folder to measure with elsewhere is made for GPUs alone", f"--target {DEFAULT_TARGET}"
            raise LlmcError(fact, place=f"--emit with --target {target}", hint=hint)
        target = DEFAULT_TARGET
    with compiler_installed(), terminated_as_interrupted(), redirect_stdout(sys.stderr):
        if emit and not imported:
            kit = prepare(str(model), emit, target, options)
            reports = []
        else:
            kit = {}
            reports = keep(imported, out, target) if imported else measure_here(model, out, target, options, budget)
    if reports and (left_out := reports[0]["left_out"]):
        say(f"lines that say nothing usable are left out ({len(left_out)}): {left_out[0]}")
    if as_json:
        print_json(kit or {"cards": reports})
    else:
        click.echo(kit_in_words(kit) if kit else "\n".join(map(records_in_words, reports)))


def prepare(model: str, folder: Path, target: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Write the folder of a kit that measures one model's calls.  Raises LlmcError."""
    from llmc.bench.gpu.prepare import Wanted
    from llmc.bench.gpu.prepare import prepare as write_kit
    from llmc.compiler.target import parse_target

    wanted = Wanted(model, **options, max_sequence=None)
    try:
        return write_kit(folder, parse_target(target), [wanted], most=MOST, carried=False, odd="none")
    except OSError as error:
        raise LlmcError(f"the folder cannot be written: {error.strerror}", place=str(folder)) from None


def measure_here(
    model: str | None, out: Path | None, target: str, options: Mapping[str, Any], budget: float
) -> list[dict[str, Any]]:
    """Write a kit, run it on this machine, and import what it found.

    Raises LlmcError; where there is no GPU, before anything is compiled.
    """
    from llmc.compiler.target import missing, parse_target

    if lacks := ", ".join(missing(parse_target(target))):
        hint = "--emit DIR writes a folder that measures on a machine that has it"
        raise LlmcError(f"this machine lacks {lacks}", place=f"--target {target}", hint=hint)
    with tempfile.TemporaryDirectory(prefix="llmc-tune-") as folder:
        kit, found = Path(folder, "kit"), Path(folder, "out")
        prepare(str(model), kit, target, options)
        command = [sys.executable, str(kit / "run.py"), "-o", str(found), "--stages", STAGES]
        answer = subprocess.run([*command, "--seconds", str(budget)], stdout=STDERR, check=False)
        if answer.returncode:
            raise LlmcError(f"measuring ended with status {answer.returncode}", place=str(kit / "run.py"))
        return keep([found / "results.jsonl"], out, target)


def keep(found: Sequence[Path], out: Path | None, target: str) -> list[dict[str, Any]]:
    from llmc.compiler.tune import import_tuning

    return import_tuning(*found, out=out, target=target)


def kit_in_words(said: Mapping[str, Any]) -> str:
    return (
        f"{said['path']}  {said['jobs']} calls, {said['candidates']} candidates, {in_bytes(said['bytes'])}\n"
        f"there: python run.py -o OUT --stages {STAGES}; here: llmc tune --import OUT/results.jsonl"
    )


def records_in_words(said: Mapping[str, Any]) -> str:
    records = said["records"]
    faster = [record for record in records if record["time_us"] < record["heuristic_us"]]
    n_in_place = sum(bool(record.get("in_place")) for record in records)
    tuned = f"{len(records)} tuned" + (f" ({n_in_place} in place)" if n_in_place else "")
    return "\n".join(
        [
            f"{said['path']}  {said['target']}, {said['machine']}",
            f"{tuned}, {len(faster)} of them faster than the rule's own choice; {said['kept']} known before",
            *said["switches"],
        ]
    )
