"""`llmc compile`: a model becomes one file."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any

import click

from llmc.cli.output import (
    adapters_in_words,
    certificate_in_words,
    compiler_installed,
    in_bytes,
    in_seconds,
    json_option,
    pictures_in_words,
    print_json,
    quant_choice,
    say,
)
from llmc.cli.progress import stage_progress


def parse_batch(context: click.Context, option: click.Parameter, text: str) -> tuple[int, ...]:
    """The numbers in "1,2,4,8"."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers such as 1,2,4,8") from None


@click.command(short_help="Compile a model into one file.")
@click.argument("model")
@click.option("-o", "--out", metavar="FILE.so", type=click.Path(path_type=Path), help="[default: the model's name]")
@click.option(
    "--target",
    "targets",
    metavar="TARGET",
    default=["cpu"],
    multiple=True,
    show_default=True,
    help="cpu (this machine), cpu:x86-64-v3, cpu:x86-64-v4, …, cpu:aarch64, cuda (this machine's GPU), cuda:sm_90a, …; "
    "several, the best first: the file runs on all of them.",
)
@click.option("--dtype", type=click.Choice(["f32", "bf16", "f16"]), help="Of the weights.  [default: the model's own]")
@click.option(
    "--quant",
    type=quant_choice,
    default="none",
    show_default=True,
    help="Of the weights of linear layers.",
)
@click.option(
    "--quant-group", type=click.Choice(["32", "128"]), help="Weights that share a scale in int4.  [default: 32]"
)
@click.option(
    "--quant-lm-head/--no-quant-lm-head",
    default=None,
    help="The product that makes the logits, quantised like the others, or not.  [default: in 8 bits]",
)
@click.option(
    "--quant-bits",
    metavar="BITS",
    type=click.FloatRange(4, 16),
    help="Of a weight on average: with int4, products where 4 cost most have 8. Needs --calibrate.",
)
@click.option(
    "--calibrate",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Fit the quantised weights to this text (.json: token ids).",
)
@click.option(
    "--kv-dtype",
    type=click.Choice(["f32", "bf16", "int8"]),
    help="Of the KV cache.  [default: the model's dtype]",
)
@click.option(
    "--batch",
    metavar="1,2,…",
    default="1,2,4,8",
    show_default=True,
    callback=parse_batch,
    help="Batch sizes to compile decoding for.",
)
@click.option(
    "--max-seq", metavar="N", type=click.IntRange(1), help="Most tokens of a sequence.  [default: the model's own]"
)
@click.option(
    "--weights", type=click.Choice(["real", "random"]), default="real", show_default=True, help="random: shapes only."
)
@click.option(
    "--adapter",
    "adapters",
    metavar="[NAME=]DIR",
    multiple=True,
    help="Merge this LoRA adapter (a folder or hub id) into the weights; several: one after another. With a name it "
    "stays beside them, and each text chooses.",
)
@click.option(
    "--task",
    type=click.Choice(["auto", "generate", "embed", "classify"]),
    default="auto",
    show_default=True,
    help="embed: embeddings in place of texts; classify: labels, or ranks; auto: what the model's files say.",
)
@click.option("--images", is_flag=True, help="Take pictures too, where the model does; on CPUs.")
@click.option(
    "--max-image-rows",
    metavar="N",
    type=click.IntRange(64, 16384),
    default=1024,
    show_default=True,
    help="Most tokens that a picture becomes, where they are of any size: larger ones are made smaller.",
)
@click.option("--seed", metavar="S", type=click.IntRange(0), default=0, show_default=True, help="Of random weights.")
@click.option(
    "--verify", type=click.Choice(["on", "off"]), default="on", show_default=True, help="Compare with the source model."
)
@click.option("--dump", metavar="DIR", type=click.Path(path_type=Path), help="Write the graph after every stage here.")
@json_option
def command(
    model: str,
    out: Path | None,
    targets: tuple[str, ...],
    dtype: str | None,
    quant: str,
    quant_group: str | None,
    quant_lm_head: bool | None,
    quant_bits: float | None,
    calibrate: Path | None,
    kv_dtype: str | None,
    batch: tuple[int, ...],
    max_seq: int | None,
    weights: str,
    adapters: tuple[str, ...],
    task: Any,
    images: bool,
    max_image_rows: int,
    seed: int,
    verify: str,
    dump: Path | None,
    as_json: bool,
) -> None:
    """Compile MODEL into one file: machine code, weights, tokenizer and runtime.

    MODEL is a folder in Hugging Face's layout, a hub id, a known name (llama2-7b, opt-6.7b), a .gguf file or an .onnx
    file of a causal decoder. Of a folder or hub id with a LoRA adapter the model that it names is compiled, with it.
    """
    with compiler_installed(), terminated_as_interrupted(), redirect_stdout(sys.stderr), stage_progress() as progress:
        from llmc.compiler.driver import compile_model

        report = compile_model(
            model,
            out=out,
            target=",".join(targets),
            dtype=dtype,
            quant=quant,
            quant_group=int(quant_group) if quant_group else None,
            quant_lm_head=quant_lm_head,
            quant_bits=quant_bits,
            calibrate=calibrate,
            kv_dtype=kv_dtype,
            batch=batch,
            max_sequence=max_seq,
            weights=weights,
            task=task,
            images=images,
            max_image_rows=max_image_rows,
            verify=verify == "on",
            dump=dump,
            seed=seed,
            adapters=adapters,
            progress=progress,
        )
    for note in report.get("notes", ()):
        say(f"note: {note}")
    if as_json:
        print_json(report)
    else:
        click.echo(summary(report))


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM and a closed terminal end the compile as Ctrl-C does, so that no partial file stays behind."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def summary(report: Mapping[str, Any]) -> str:
    """The report of a compile, for people."""
    seconds, certificate = report.get("seconds", {}), report["certificate"]
    stages = ", ".join(f"{stage} {in_seconds(value)}" for stage, value in seconds.items())
    targets = ", ".join(report.get("targets", [report["target"]]))
    shares = ", ".join(f"{in_bytes(each['bytes'])} for {names(each, report)}" for each in report.get("weights", ()))
    lines = [
        f"{report['path']}  {in_bytes(report['bytes'])}  {report['model']}, {report['dtype']}, {targets}",
        *([f"weights      {shares}"] if shares else []),
        f"time         {in_seconds(sum(seconds.values()))}: {stages}",
        f"certificate  {certificate_in_words(certificate, 'targets' in report)}",
        *(f"adapter      {said}" for said in adapters_in_words(certificate)),
        *([f"pictures     {pictures_in_words(certificate['images'])}"] if "images" in certificate else []),
    ]
    return "\n".join(lines)


def names(share: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """The targets that share weights, in words: "all", or their names."""
    return "all" if share["targets"] == report["targets"] else " and ".join(share["targets"])
