"""`llmc run`: generate from an artifact."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from llmc.cli.opening import (
    adapter_option,
    check_speculation,
    device_option,
    guessing,
    image_option,
    opened,
    pictures_in_seconds,
    seeing,
    speculation_options,
)
from llmc.cli.output import (
    artifact_argument,
    in_seconds,
    installed,
    json_option,
    print_json,
    say,
    threads_option,
)
from llmc.cli.sampling import sampling_options
from llmc.runtime import LlmcError

if TYPE_CHECKING:
    from llmc.runtime.binding import Model
    from llmc.runtime.generation import Generation, History, How
    from llmc.runtime.grammar import Constraint, Grammar
    from llmc.runtime.sequence import Sequence

MOST_SCHEMA = 8 << 20
"""Bytes of a JSON schema: as many as llmc serve takes."""


def parse_tokens(context: click.Context, option: click.Parameter, text: str | None) -> list[int] | None:
    """The numbers in "1,2,3"."""
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of token ids such as 1,2,3") from None


@click.command(short_help="Generate from an artifact.")
@artifact_argument
@click.option("-p", "--prompt", metavar="TEXT", help="Continue this text.")
@click.option("--tokens", metavar="1,2,3", callback=parse_tokens, help="Continue these token ids, and print ids.")
@image_option
@click.option("-i", "--interactive", is_flag=True, help="Read texts from standard input, one a line.")
@click.option(
    "-n",
    "max_tokens",
    metavar="N",
    type=click.IntRange(0),
    default=64,
    show_default=True,
    help="Most tokens to generate.",
)
@sampling_options
@click.option(
    "--json-schema",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False),
    help="Generate JSON of this schema, and nothing else.",
)
@adapter_option
@speculation_options
@click.option(
    "--prompt-cache",
    metavar="FILE",
    type=click.Path(),
    help="Keep what the model knows of the prompt in FILE: of the next one what begins alike is not read again.",
)
@click.option("--prompt-cache-ro", is_flag=True, help="Use the file of --prompt-cache, and leave it as it is.")
@click.option("--ignore-eos", is_flag=True, help="Go on after the token that ends a text.")
@threads_option
@device_option
@click.option(
    "--profile", metavar="TRACE.json", type=click.Path(), help="Time every kernel; the trace opens in Perfetto."
)
@json_option
def command(
    artifact: str,
    prompt: str | None,
    tokens: list[int] | None,
    images: tuple[str, ...],
    interactive: bool,
    max_tokens: int,
    json_schema: str | None,
    adapter: str | None,
    speculate: int | None,
    draft: str | None,
    prompt_cache: str | None,
    prompt_cache_ro: bool,
    ignore_eos: bool,
    threads: int,
    device: str | None,
    profile: str | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Generate from an artifact, printing tokens as they come.

    The prompt is a text (-p), token ids (--tokens), or lines of standard input (-i): there each line is added to the
    text so far and continued, and an empty line begins a new text. Pictures stand where the prompt has the model's mark
    for them, <image> for most, or before it where there is none; llmc chat asks about them.

    With --profile a table on standard error says where the time of a step goes, kernel by kernel.
    """
    if (prompt is not None) + (tokens is not None) + interactive != 1:
        raise click.UsageError("give one prompt: -p TEXT, --tokens 1,2,3, or -i")
    of_one = {"--json": as_json, "--json-schema": json_schema, "--speculate": speculate, "--draft": draft}
    check_one_prompt(interactive, of_one | {"--prompt-cache": prompt_cache, "--image": images})
    if prompt_cache_ro and prompt_cache is None:
        raise click.UsageError("--prompt-cache-ro is for --prompt-cache FILE")
    grammar = grammar_in(json_schema) if json_schema else None
    from llmc.runtime.generation import How
    from llmc.runtime.prompt_cache import PromptCache

    how = How.choose(**sampling)
    check_speculation(speculate, draft, how)
    start = perf_counter()
    with opened(artifact, threads, device) as model, guessing(model, speculate, draft, threads, device) as guesses:
        load_s = perf_counter() - start
        with profiling(model, profile) as report:
            if interactive:
                converse(model, max_tokens, how, ignore_eos, adapter)
                return
            given = tokens if tokens is not None else str(prompt)
            constraint = following(model, grammar) if grammar else None
            cache = PromptCache(prompt_cache, read_only=prompt_cache_ro) if prompt_cache is not None else None
            options: Any = {"constraint": constraint, "speculation": guesses(), "cache": cache, "adapter": adapter}
            with seeing():
                generation = model.stream(given, max_tokens, how, ignore_eos=ignore_eos, images=images, **options)
            if as_json:
                said = result(model, generation, load_s)
            else:
                show(text(model, generation) if tokens is None else ids(generation))
                say(timing(model, generation, load_s))
        if as_json:
            print_json(said | report)


def check_one_prompt(interactive: bool, options: dict[str, Any]) -> None:
    """Refuse options of one prompt where texts are read line by line."""
    given = [name for name, value in options.items() if value]
    if interactive and given:
        raise click.UsageError(f"{given[0]} is for one prompt, not for -i")


def grammar_in(path: str) -> Grammar:
    """The JSON schema in a file; read before a model is opened, which may take long."""
    from llmc.runtime.grammar import Grammar
    from llmc.runtime.parse_json import parse_json
    from llmc.runtime.read_file import read_file

    text = read_file(path, MOST_SCHEMA + 1)
    if len(text) > MOST_SCHEMA:
        raise LlmcError(f"the schema is longer than {MOST_SCHEMA >> 20} MiB", place=path)
    try:
        return Grammar.of_schema(parse_json(text))
    except ValueError as error:
        raise LlmcError(f"this is not JSON: {error}", place=path) from None


def following(model: Model, grammar: Grammar) -> Constraint:
    """What keeps one text of this model to a grammar."""
    with installed("following a schema", "serve"):
        guide = model.guide
    return guide.constraint(grammar)


@contextmanager
def profiling(model: Model, path: str | None) -> Iterator[dict[str, Any]]:
    """Time the steps made inside and write the trace to `path`, if there is one.  -> what --json adds, at the end."""
    if path is None:
        yield {}
        return
    from llmc.cli import profile_table, profile_trace

    report: dict[str, Any] = {}
    profile_trace.check_place(path)
    with model.profile() as profile:
        interrupted = None
        try:
            yield report
        except KeyboardInterrupt as error:  # what has run so far is worth seeing
            interrupted = error
    said = profile_trace.save(path, profile, str(model.path), model.info.n_threads, model.info.program)
    report["profile"] = {"trace": path, **said}
    say(profile_table.write(said))
    if interrupted:
        raise interrupted


def text(model: Model, generation: Generation) -> Iterator[str]:
    """The generated text, in pieces."""
    from llmc.runtime.text import TextStream, text_pieces

    return text_pieces(generation, TextStream(model.tokenizer, generation.prompt))


def ids(generation: Generation) -> Iterator[str]:
    """The generated ids, written as --tokens takes them."""
    for token in generation:
        yield f"{',' if len(generation.tokens) > 1 else ''}{token}"


def show(pieces: Iterator[str]) -> None:
    """Print pieces as they come, and end the line whatever happens."""
    try:
        for piece in pieces:
            click.echo(piece, nl=False)
    finally:
        click.echo()


def converse(model: Model, max_tokens: int, how: How, ignore_eos: bool, adapter: str | None = None) -> None:
    """Continue the text so far with each line of standard input; an empty line begins a new one."""
    from llmc.runtime.generation import History

    sequence, history = model.sequence(adapter), History()
    pending: list[int] = []
    for line in lines():
        if not line:
            sequence.truncate(0)
            pending, history = [], History()
            continue
        prompt = pending + model.encode(line, special=sequence.length == 0)
        try:
            pending = take_turn(model, sequence, history, prompt, max_tokens, how, ignore_eos)
        except LlmcError as error:
            click.echo(f"error: {error}\nbeginning a new text", err=True)
            sequence.truncate(0)
            pending, history = [], History()


def take_turn(
    model: Model,
    sequence: Sequence,
    history: History,
    prompt: list[int],
    max_tokens: int,
    how: How,
    ignore_eos: bool,
) -> list[int]:
    """Continue a sequence, whose tokens are in history, printing.  -> the last token, which belongs to the text but is
    not fed yet."""
    generation = model.stream(prompt, max_tokens, how, ignore_eos=ignore_eos, sequence=sequence, history=history)
    show(text(model, generation))
    return [] if generation.stop == "eos" else generation.tokens[-1:]


def lines() -> Iterator[str]:
    """Lines of standard input without their ends; on a terminal with a prompt."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt) as end:
            click.echo()
            if isinstance(end, KeyboardInterrupt):
                raise
            return


def result(model: Model, generation: Generation, load_s: float) -> dict[str, Any]:
    """Run a generation to its end.  -> what --json prints."""
    tokens = list(generation)
    said: dict[str, Any] = {"tokens": tokens}
    if model.has_tokenizer:
        said["text"] = model.decode(tokens, after=generation.prompt)
    if generation.how.temperature > 0:
        said["seed"] = generation.how.seed
    if guesses := generation.speculation:
        said["speculation"] = {"steps": guesses.n_steps, "guessed": guesses.n_guessed, "right": guesses.n_right}
    if generation.cache:
        said["n_cached_tokens"] = generation.cache.n_found
    if generation.pictured:
        said["images_s"] = generation.pictured.seconds
    return said | {
        "n_prompt_tokens": len(generation.prompt),
        "prefill_s": generation.prefill_s,
        "prefill_tokens_per_s": generation.prefill_tokens_per_s,
        "decode_s": generation.decode_s,
        "decode_tokens_per_s": generation.decode_tokens_per_s,
        "load_s": load_s,
        "threads": model.info.n_threads,
        "target": model.target,
        "device": model.info.device,
        "stop": generation.stop,
    }


def timing(model: Model, generation: Generation, load_s: float) -> str:
    """One line about a generation's speed."""
    n, threads = len(generation.tokens), model.info.n_threads
    target = f"{model.target} | " if "targets" in model.manifest else ""
    guesses = generation.speculation
    right = f"{guesses.n_right} of {guesses.n_guessed} guesses right | " if guesses else ""
    cache = generation.cache
    found = f", {cache.n_found} of them from {cache.path}," if cache and cache.n_found else ""
    rate = "" if found else f", {generation.prefill_tokens_per_s:.1f} tok/s"
    return (
        f"{pictures_in_seconds(generation)}"
        f"prompt {len(generation.prompt)} tokens{found} in {in_seconds(generation.prefill_s)}{rate} | "
        f"{n} tokens, {generation.decode_tokens_per_s:.1f} tok/s | {right}"
        f"loaded in {in_seconds(load_s)} | {threads} thread{'s' if threads != 1 else ''} | "
        f"{target}end: {generation.stop}"
    )
