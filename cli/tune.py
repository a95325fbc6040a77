"""`llmc tune`: choose schedules for a model by measuring them on this machine."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from llmc.cli.compile import parse_batch, terminated_as_interrupted
from llmc.cli.main import INTERRUPTED
from llmc.cli.output import compiler_installed, json_option, print_json, quant_choice, say, threads_option
from llmc.cli.schedules_view import microseconds, share_in_words, weight_in_words
from llmc.cli.tune_gpu import BUDGET_S, tune_gpu


@click.command(short_help="Choose the fastest schedules by measuring.")
@click.argument("model", required=False)
@click.option("-o", "--out", metavar="FILE.json", type=click.Path(path_type=Path), help="[default: the user's own]")
@click.option("--target", metavar="TARGET", default="cpu", show_default=True, help="cpu, cpu:x86-64-v3, …")
@click.option("--dtype", type=click.Choice(["f32", "bf16"]), help="Of the weights.  [default: the model's own]")
@click.option("--quant", type=quant_choice, default="none", show_default=True)
@click.option("--quant-group", type=click.Choice(["32", "128"]), help="As in llmc compile.")
@click.option("--quant-lm-head/--no-quant-lm-head", default=None, help="As in llmc compile.")
@click.option(
    "--batch",
    metavar="1,2,…",
    default="1,2,4,8",
    show_default=True,
    callback=parse_batch,
    help="Batch sizes to tune decoding for; prefill is tuned too.",
)
@click.option("--budget", metavar="SECONDS", type=click.FloatRange(0, min_open=True), help="Stop after this time.")
@threads_option
@click.option("--again", is_flag=True, help="Measure anew what this machine has measured before.")
@click.option(
    "--emit",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Measure nothing: write a folder whose run.py does, on a machine with a GPU and without llmc.",
)
@click.option(
    "--import",
    "imported",
    metavar="FILE.jsonl",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    multiple=True,
    help="Measure nothing: keep what such runs found, for each card in a file of its own.",
)
@json_option
def command(
    model: str | None,
    out: Path | None,
    target: str,
    dtype: str | None,
    quant: str,
    quant_group: str | None,
    quant_lm_head: bool | None,
    batch: tuple[int, ...],
    budget: float | None,
    threads: int,
    again: bool,
    emit: Path | None,
    imported: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Measure the schedules of MODEL's linear layers on this machine, and keep the fastest for llmc compile.

    Only shapes matter: no weight is read. Results are written as they come; Ctrl-C keeps them, and the next run
    goes on from there. Let nothing else run meanwhile.
    """
    group = int(quant_group) if quant_group else None
    what: dict[str, Any] = {"quant": quant, "quant_group": group, "quant_lm_head": quant_lm_head}
    if not (model or imported):
        raise click.UsageError("Missing argument 'MODEL'.")
    if "," in target:
        raise click.UsageError("--target: one at a time is tuned")
    if imported or emit or target.startswith("cuda"):
        if dtype == "f32":
            raise click.UsageError("--dtype f32: for GPUs products of bf16 are tuned")
        tune_gpu(model, imported, emit, out, target, {"batch": batch, **what}, budget or BUDGET_S, as_json)
        return
    with compiler_installed(), terminated_as_interrupted(), redirect_stdout(sys.stderr):
        from llmc.compiler.tune import tune_model

        report = tune_model(
            str(model),
            out=out,
            target=target,
            dtype=dtype,
            batch=batch,
            budget=budget,
            threads=threads,
            again=again,
            progress=show,
            **what,
        )
    if as_json:
        print_json(report)
    else:
        click.echo(summary(report))
    if report["interrupted"]:
        raise click.exceptions.Exit(INTERRUPTED)


def show(done: int, total: int, record: Mapping[str, Any]) -> None:
    """A line for each call that was tuned."""
    say(f"{done}/{total}  {record['op']} {weight_in_words(record)} M={record['m']}: {in_words(record)}")


def in_words(record: Mapping[str, Any]) -> str:
    """What was found for a call."""
    gain = record["heuristic_us"] / record["time_us"] if record["time_us"] else 1.0
    said = f"{microseconds(record['time_us'])}, {share_in_words(record)}"
    return f"{said}, {gain:.2f}x faster than the rule's own" if gain > 1 else f"{said}, the rule's own"


def summary(report: Mapping[str, Any]) -> str:
    records = report["records"]
    faster = [record for record in records if record["time_us"] < record["heuristic_us"]]
    lines = [
        f"{report['path']}  {report['model']}, {report['target']}, {report['machine']}",
        f"{len(records)} tuned, {len(faster)} of them faster than the rule's own choice; "
        f"{report['kept']} known before, {report['left']} left",
    ]
    if records and sum(record["clean"] for record in records) < len(records) / 2:
        lines.append("the machine was loaded: run llmc tune --again when nothing else does")
    if report["interrupted"]:
        lines.append("interrupted: what was measured is kept, and the next run goes on from there")
    return "\n".join(lines)
