"""`llmc rank`: texts in the order of how well they answer a query."""

from __future__ import annotations

import click

from llmc.cli.opening import device_option, labelling_options, opened, or_lines, texts_option
from llmc.cli.output import artifact_argument, json_option, print_json, threads_option


@click.command(short_help="Order texts by how well they answer a query.")
@artifact_argument
@click.option("-q", "--query", metavar="TEXT", required=True, help="What is asked.")
@texts_option("A text that may answer it")
@click.option("--top", metavar="N", type=click.IntRange(1), help="The best N alone.")
@labelling_options
@threads_option
@device_option
@json_option
def command(
    artifact: str,
    query: str,
    texts: tuple[str, ...],
    top: int | None,
    raw: bool,
    truncate: bool,
    threads: int,
    device: str | None,
    as_json: bool,
) -> None:
    """Order texts by how well they answer a query, with an artifact of a reranker.

    Each has a line with its score, its number, counted from 0, and the text; --json prints one object with all of them.
    """
    listed = or_lines(texts)
    with opened(artifact, threads, device) as model:
        ranked = model.rank(query, listed, top, raw=raw, truncate=truncate)
    if as_json:
        print_json({"results": [{"index": i, "score": score, "text": listed[i]} for i, score in ranked]})
        return
    for index, score in ranked:
        click.echo(f"{score:.4g}\t{index}\t{listed[index]}")
