"""Opening an artifact to run it, and the options of it that commands share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from llmc.cli.output import in_seconds, installed, show_upload
from llmc.runtime import LlmcError, load

if TYPE_CHECKING:
    from llmc.runtime.binding import Model
    from llmc.runtime.generation import Generation, How
    from llmc.runtime.speculate import Speculation

Command = TypeVar("Command", bound=Callable[..., Any])


def parse_device(context: click.Context, option: click.Parameter, text: str | None) -> str | None:
    """cpu, cuda, cuda:1, 1."""
    from llmc.runtime.capi import Device

    try:
        Device.parse(text)
    except LlmcError as error:
        raise click.BadParameter(f"{text!r} is none of {error.hint}") from None
    return text


device_option = click.option(
    "--device",
    metavar="cpu|cuda|cuda:N|N",
    callback=parse_device,
    help="What to run on, of what the file is for; N: which GPU.  [default: the first that is here; GPU: "
    "$LLMC_CUDA_DEVICE, or 0]",
)
adapter_option = click.option(
    "--adapter", metavar="NAME", help="Of the artifact's adapters the one to go through.  [default: the model alone]"
)
image_option = click.option(
    "--image",
    "images",
    metavar="FILE",
    type=click.Path(),
    multiple=True,
    help="A picture of the prompt, for a model compiled with --images; several.",
)
raw_option = click.option("--raw", is_flag=True, help="Logits in place of scores.")
truncate_option = click.option(
    "--truncate", is_flag=True, help="Cut texts, of pairs the second one, that are longer than the model takes."
)
speculate_option = click.option(
    "--speculate",
    metavar="N",
    type=click.IntRange(0, 63),
    help="Guess up to N tokens ahead, and check them in one step: the same text, sooner.  [default: 0; with --draft 7]",
)
draft_option = click.option(
    "--draft",
    metavar="SMALL.so",
    type=click.Path(),
    help="Who guesses: a smaller model of the same tokenizer; otherwise what the text has said before.",
)


def texts_option(what: str = "A text") -> Callable[[Command], Command]:
    """The option --prompt, which may be given several times.  what: what one is, for the help."""
    said = f"{what}; several.  [default: lines of standard input]"
    return click.option("-p", "--prompt", "texts", metavar="TEXT", multiple=True, help=said)


def labelling_options(command: Command) -> Command:
    """Adds the options --raw and --truncate."""
    return raw_option(truncate_option(command))


def or_lines(texts: Sequence[str]) -> list[str]:
    """The texts, or the lines of standard input, without line ends, where none was given."""
    return list(texts) or [line.rstrip("\n") for line in sys.stdin]


def speculation_options(command: Command) -> Command:
    """Adds the options --speculate and --draft."""
    return speculate_option(draft_option(command))


def check_speculation(speculate: int | None, draft: str | None, how: How) -> None:
    """Refuse ways of choosing tokens that speculation does not support."""
    if (speculate or draft) and how.reshapes:
        raise click.UsageError("--speculate and --draft know --temperature, --top-k, --top-p and --seed alone")


def opened(artifact: str, threads: int, device: str | None) -> Model:
    """The artifact, opened; on a terminal, with a line that shows how much of the weights is on the GPU already."""
    return load(artifact, threads=threads, device=device, progress=show_upload if sys.stderr.isatty() else None)


def seeing() -> AbstractContextManager[None]:
    """Around code that reads pictures: an error says what to install."""
    return installed("reading pictures", "images")


def pictures_in_seconds(generation: Generation) -> str:
    """How long a prompt's pictures took, as a line about a generation begins; "" where it has none."""
    pictured = generation.pictured
    n = len(pictured.seen) if pictured else 0
    return f"{n} picture{'s' if n != 1 else ''} in {in_seconds(pictured.seconds)} | " if pictured else ""


@contextmanager
def guessing(
    model: Model, most: int | None, draft: str | None, threads: int, device: str | None
) -> Iterator[Callable[[], Speculation | None]]:
    """A function that gives the speculation for the next text, or None if none was asked for.

    most: tokens guessed in a step.  draft: an artifact that guesses them, and is open meanwhile; None: no such model.
    """
    if most == 0 or not (most or draft):
        yield lambda: None
        return
    from llmc.runtime.speculate import DraftModel, InTurns, Speculation

    if not draft:
        yield lambda: Speculation.of(model, most or 0)
        return
    with opened(draft, threads, device) as small, closing(DraftModel(small, model)) as guesser:
        yield lambda: Speculation.of(model, most or 0, InTurns(guesser))
