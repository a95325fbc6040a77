"""`llmc bench`: decode beside Hugging Face and others, as numbers, a table and a picture."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmc.cli.compile import terminated_as_interrupted
from llmc.cli.main import INTERRUPTED
from llmc.cli.output import compiler_installed, json_option, print_json, quant_choice, say
from llmc.cli.progress import stage_progress
from llmc.runtime.errors import LlmcError

if TYPE_CHECKING:
    from llmc.bench.chart.record import Record
    from llmc.bench.chart.request import Request


def parse_numbers(context: click.Context, option: click.Parameter, text: str | None) -> tuple[int, ...]:
    """The numbers in "128,1k"."""
    from llmc.bench.chart.request import numbers

    try:
        return numbers(text or "")
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers such as 128,1k") from None


def list_option(name: str, default: str, help: str) -> Callable[[Any], Any]:
    return click.option(name, metavar=default, default=default, show_default=True, callback=parse_numbers, help=help)


@click.command(short_help="Measure decode beside other systems, and draw it.")
@click.argument("models", metavar="[MODEL | FILE.so]...", nargs=-1)
@click.option("--against", metavar="hf,…", default="hf", show_default=True, help="Baselines; the first one is 1×.")
@list_option("--batch", "1,2,4,8", "Sequences in a step.")
@list_option("--lengths", "128,1k,2k,4k", "Tokens of each sequence.")
@list_option("--prefill", "128", "Prompts whose time to the first token is measured.")
@click.option("--dtype", type=click.Choice(["f32", "bf16"]), help="Of weights, llmc's and the baselines'.")
@click.option("--quant", type=quant_choice, default="none", show_default=True)
@click.option("--kv-dtype", type=click.Choice(["f32", "bf16", "int8"]), help="Of llmc's KV cache.  [default: dtype]")
@click.option(
    "--target",
    metavar="TARGET,…",
    default="cpu",
    show_default=True,
    help="As in llmc compile; the first one here runs.",
)
@click.option(
    "--weights",
    type=click.Choice(["real", "random"]),
    help="[default: random for known names, whose speed is the same]",
)
@click.option("--source", metavar="MODEL", help="What FILE.so was compiled from, for the baselines.")
@click.option("--steps", metavar="N", type=click.IntRange(2), default=8, show_default=True, help="In a sample.")
@click.option("--rounds", metavar="N", type=click.IntRange(1), default=3, show_default=True, help="Samples of a point.")
@click.option("--threads", metavar="N", type=click.IntRange(0), default=0, help="[default: all this process may use]")
@click.option("--memory", metavar="GB", type=click.FloatRange(0, min_open=True), help="[default: what is free]")
@click.option(
    "--neighbours", metavar="CORES", type=float, default=0.2, show_default=True, help="Others may keep so many busy."
)
@click.option("--patience", metavar="SECONDS", type=float, default=0.0, help="Wait so long for that, for each sample.")
@click.option("--budget", metavar="SECONDS", type=float, help="Stop after so long; --resume goes on.")
@click.option("--output", metavar="RECORD.json", type=click.Path(path_type=Path), help="[default: beside the picture]")
@click.option("--resume", is_flag=True, help="Go on with the record, or add to it.")
@click.option(
    "--from",
    "given",
    metavar="RECORD.json",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Measure nothing. A GPU kit's results.jsonl makes a record, kept as --output.",
)
@click.option("--plot", metavar="FIG.png|.svg", type=click.Path(path_type=Path), multiple=True, help="Draw it here.")
@click.option("--markdown", is_flag=True, help="Print Markdown tables.")
@json_option
def command(
    given: tuple[Path, ...],
    plot: tuple[Path, ...],
    output: Path | None,
    markdown: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """Measure decode of each MODEL (llama2-7b and opt-6.7b by default) beside the same model in Hugging Face
    transformers, or whoever --against names, at every batch size and length, and draw it.

    Baselines: hf, hf-compile, onnxruntime, llama.cpp, openvino, onnxruntime-genai. Each runs in a process of its own,
    with the same weights, prompts and threads, taking turns. Every sample is saved at once: --resume goes on after an
    interruption.
    """
    check_plots(plot)
    if given:
        records, complete = read(given, output), True
    else:
        with bench_installed(), terminated_as_interrupted():
            record, complete = measure(request_of(asked), output or beside(plot), asked["resume"])
        records = [record]
    if complete or any(panel.samples for panel in records[0].panels):
        show(records, plot, markdown, as_json)
    if not complete:
        say(f"not all points are measured yet: the same command with --resume goes on ({records[0].path})")
        raise click.exceptions.Exit(INTERRUPTED)


def read(given: tuple[Path, ...], output: Path | None) -> list[Record]:
    """The records in the files, and those made of all results of a GPU kit (.jsonl) together."""
    from llmc.bench.chart.record import Record

    records = [Record.read(path) for path in given if path.suffix != ".jsonl"]
    if results := [path for path in given if path.suffix == ".jsonl"]:
        from llmc.bench.gpu import chart

        made = chart.records_of(results)
        records += chart.saved(made, output) if output else made
    return records


def request_of(asked: dict[str, Any]) -> Request:
    from llmc.bench.chart.request import DEFAULT_MODELS, Request
    from llmc.bench.limits import n_cpus

    return Request(
        models=asked["models"] or DEFAULT_MODELS,
        against=tuple(dict.fromkeys(name.strip() for name in asked["against"].split(",") if name.strip())),
        batches=asked["batch"],
        lengths=asked["lengths"],
        prefills=asked["prefill"],
        memory_bytes=asked["memory"] and 1e9 * asked["memory"],
        patience_s=asked["patience"],
        budget_s=asked["budget"],
        **{key: asked[key] for key in ("dtype", "quant", "kv_dtype", "target", "weights", "source", "steps", "rounds")},
        threads=asked["threads"] or n_cpus(),
        neighbours=asked["neighbours"],
    )


def measure(request: Request, path: Path, resume: bool) -> tuple[Record, bool]:
    """The record, and whether everything asked for is in it."""
    from llmc.bench.chart.run import run

    command = shlex.join(["llmc", *sys.argv[1:]])
    with redirect_stdout(sys.stderr), stage_progress() as progress:
        return run(request, path, resume=resume, command=command, say=say, progress=progress)


def show(records: list[Record], plot: tuple[Path, ...], markdown: bool, as_json: bool) -> None:
    """Pictures to their files, numbers to standard output."""
    from llmc.bench.chart.page import markdown as tables
    from llmc.bench.chart.page import points

    for path in plot:
        with bench_installed():
            from llmc.bench.chart.draw import draw

            draw(records, path)
        say(f"drawn: {path}")
    if as_json:
        panels = [
            {
                "name": panel.name,
                "title": panel.title,
                "precision": panel.precision,
                "target": panel.model.get("target"),
                "points": points(record, panel),
            }
            for record in records
            for panel in record.panels
        ]
        print_json({"records": [str(record.path) for record in records], "panels": panels})
    elif markdown or not plot:
        click.echo(tables(records))


def check_plots(plot: tuple[Path, ...]) -> None:
    """Raise LlmcError for a picture that could not be written, before hours of measuring."""
    for path in plot:
        if path.suffix.lower() not in (".png", ".svg"):
            raise LlmcError("a picture is a .png or a .svg", place=f"--plot {path}")
        if not path.absolute().parent.is_dir():
            raise LlmcError("no such folder", place=f"--plot {path}")


def beside(plot: tuple[Path, ...]) -> Path:
    return plot[0].with_suffix(".json") if plot else Path("llmc-bench.json")


bench_installed = compiler_installed
