"""How the commands say things: JSON, sizes, tables, a certificate in words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import click

from llmc.runtime.errors import LlmcError, shortened

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
artifact_argument = click.argument("artifact", metavar="FILE.so", type=click.Path())
threads_option = click.option(
    "--threads", metavar="N", type=click.IntRange(0), default=0, help="[default: as many as this process may use]"
)

quant_choice = click.Choice(["none", "int8", "int4", "fp8", "mxfp4"])


def print_json(value: Mapping[str, Any]) -> None:
    """The one JSON object of a command."""
    click.echo(json.dumps(value, ensure_ascii=False))


def say(text: str) -> None:
    """A line beside the result: dim, on standard error."""
    click.secho(text, dim=True, err=True)


def in_bytes(n: float) -> str:
    """A size for people: 512 B, 13.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            break
        n /= 1000
    return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"


def in_seconds(seconds: float) -> str:
    """A duration for people: 3 ms, 12.5 s, 2 min 5 s."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as they need; numbers to the right."""
    cells = [[str(cell) for cell in row] for row in (titles, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(titles))]
    right = [bool(rows) and all(isinstance(row[i], int | float) for row in rows) for i in range(len(titles))]
    lines = [
        "  ".join(
            f"{cell:>{width}}" if r else f"{cell:{width}}" for cell, width, r in zip(row, widths, right, strict=True)
        )
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def certificate_in_words(certificate: Mapping[str, Any], several: bool = False) -> str:
    """What a parity certificate says, in one line.  several: the artifact is for several targets: on which, too."""
    status = certificate.get("status", "missing")
    if status != "passed":
        return f"{status}: {certificate['reason']}" if "reason" in certificate else str(status)
    said = []
    if "relative_error" in certificate:
        said.append(f"logits within {certificate['relative_error']:.1e} of their range")
    if "least_cosine" in certificate:
        said = [said[0].replace("logits", "embeddings"), f"cosines of {certificate['least_cosine']:.6f} and more"]
    if "top1_agreement" in certificate:
        said.append(f"{certificate['top1_agreement']:.1%} of most likely tokens agree")
    if "kl_mean" in certificate:
        said.append(f"KL {certificate['kl_mean']:.1e} nats")
    status += f" on {certificate['target']}" if several and "target" in certificate else ""
    return f"{status}: {', '.join(said)}" if said else str(status)


def adapters_in_words(certificate: Mapping[str, Any]) -> list[str]:
    """What the certificates of an artifact's adapters say, a line each."""
    return [f"{name}, {certificate_in_words(own)}" for name, own in certificate.get("adapters", {}).items()]


def pictures_in_words(certificate: Mapping[str, Any]) -> str:
    """What the certificate of what an artifact makes of pictures says."""
    rows = f"rows within {certificate['rows']['relative_error']:.1e} of their range"
    return f"{certificate_in_words(certificate)}{', ' if 'kl_mean' in certificate else ': '}{rows}"


def show_upload(done: int, total: int) -> None:
    """Show how much of the weights is on the GPU already, in a line that each call writes over."""
    click.echo(f"\rweights    {in_bytes(done)} of {in_bytes(total)} ", err=True, nl=done >= total)


@contextmanager
def installed(doing: str, extra: str) -> Iterator[None]:
    """Around code that needs the packages of one of llmc's extras: an error says how to install a missing one."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "llmc"):
            raise
        hint = f"pip install 'llmc[{extra}]'"
        raise LlmcError(f"{doing} needs the Python package {missing}, which is not installed", hint=hint) from None


@contextmanager
def manifest_shown(by: str, place: str) -> Iterator[None]:
    """Around code that shows parts of a manifest: one that lacks them, or has nonsense there, is an LlmcError.

    A manifest may come from anywhere.  by: what shows it.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        fact = f"the manifest lacks what {by} shows: {type(error).__name__}: {shortened(error)}"
        raise LlmcError(fact, place=place, hint="compile the model again with this llmc") from error


compiler_installed = partial(installed, "compiling", "compiler")
