"""`llmc embed`: embeddings of texts."""

from __future__ import annotations

from typing import Any

import click

from llmc.cli.opening import device_option, opened, or_lines, texts_option
from llmc.cli.output import artifact_argument, json_option, print_json, threads_option


@click.command(short_help="Make embeddings of texts.")
@artifact_argument
@texts_option()
@click.option("--dimensions", metavar="N", type=click.IntRange(1), help="The first N alone, brought to length 1 again.")
@threads_option
@device_option
@json_option
def command(
    artifact: str, texts: tuple[str, ...], dimensions: int | None, threads: int, device: str | None, as_json: bool
) -> None:
    """Make embeddings of texts, with an artifact of a model for that.

    Each is a line of numbers with blanks between them, in the order of the texts; --json prints one object with all.
    """
    listed = or_lines(texts)
    with opened(artifact, threads, device) as model:
        rows = model.embed(listed, dimensions)
        if as_json:
            said: dict[str, Any] = {"embeddings": rows.tolist(), "dimensions": rows.shape[1]}
            print_json(said)
            return
    for row in rows:
        click.echo(" ".join(f"{value:.7g}" for value in row))
