"""`llmc classify`: labels of texts."""

from __future__ import annotations

from typing import Any

import click

from llmc.cli.opening import device_option, labelling_options, opened, or_lines, texts_option
from llmc.cli.output import artifact_argument, json_option, print_json, threads_option


@click.command(short_help="Give texts labels.")
@artifact_argument
@texts_option()
@click.option("--pair", "pairs", metavar="TEXT TEXT", nargs=2, multiple=True, help="Two texts, judged together.")
@labelling_options
@threads_option
@device_option
@json_option
def command(
    artifact: str,
    texts: tuple[str, ...],
    pairs: tuple[tuple[str, str], ...],
    raw: bool,
    truncate: bool,
    threads: int,
    device: str | None,
    as_json: bool,
) -> None:
    """Give texts labels, or pairs of texts, with an artifact of a model for that.

    Each has a line of labels with their scores, the best first; texts come first, then pairs, both in their order.
    --json prints one object with all.
    """
    listed: list[Any] = [*texts, *pairs] or or_lines(())
    with opened(artifact, threads, device) as model:
        rows = model.classify(listed, raw=raw, truncate=truncate)
        labels = model.classification.labels if model.classification else ()
    if as_json:
        print_json({"labels": list(labels), "scores": rows.tolist()})
        return
    for row in rows:
        click.echo("  ".join(f"{labels[i]} {row[i]:.4g}" for i in (-row).argsort(kind="stable")))
