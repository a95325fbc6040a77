"""The options that say how tokens are chosen."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def parse_biases(context: click.Context, option: click.Parameter, texts: tuple[str, ...]) -> dict[int, float]:
    """ID=X, several times; the last one counts."""
    found = [re.fullmatch(r"(\d{1,9})=([-+]?\d{1,9}(?:\.\d{0,9})?)", text) for text in texts]
    for text, one in zip(texts, found, strict=True):
        if one is None:
            raise click.BadParameter(f"{text!r} is no token's id and a number, such as 7=-2.5")
    return {int(one[1]): float(one[2]) for one in found if one}


OPTIONS = (
    click.option(
        "--temperature",
        metavar="T",
        type=click.FloatRange(0),
        default=0.0,
        show_default=True,
        help="0: always the most likely token.",
    ),
    click.option(
        "--top-k",
        metavar="K",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Sample from the k best; 0: all.",
    ),
    click.option(
        "--top-p",
        metavar="P",
        type=click.FloatRange(0, 1, min_open=True),
        default=1.0,
        show_default=True,
        help="… of this probability.",
    ),
    click.option(
        "--min-p",
        metavar="P",
        type=click.FloatRange(0, 1),
        default=0.0,
        show_default=True,
        help="… each at least so many times as likely as the best.",
    ),
    click.option(
        "--repetition-penalty",
        metavar="X",
        type=click.FloatRange(0, min_open=True),
        default=1.0,
        show_default=True,
        help="Divide the logits of tokens that the text has, its prompt included.",
    ),
    click.option(
        "--presence-penalty",
        metavar="X",
        type=float,
        default=0.0,
        show_default=True,
        help="Subtract this from the logits of tokens that were generated.",
    ),
    click.option(
        "--frequency-penalty",
        metavar="X",
        type=float,
        default=0.0,
        show_default=True,
        help="… and this for each time that they were.",
    ),
    click.option(
        "--logit-bias",
        metavar="ID=X",
        multiple=True,
        callback=parse_biases,
        help="Add X to a token's logit; for several tokens say it several times.",
    ),
    click.option(
        "--seed", metavar="S", type=click.IntRange(0, 2**64 - 1), help="The same seed, the same text.  [default: drawn]"
    ),
)


def sampling_options(command: Command) -> Command:
    """--temperature and so on, named as How.choose's parameters are."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command
