"""The options that say how tokens are chosen."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def parse_biases(context: click.Context, option: click.Parameter, texts: tuple[str, ...]) -> dict[int, float]:
    """The biases given as ID=X, by token; of several for one token, the last counts."""
    found = [re.fullmatch(r"(\d{1,9})=([-+]?\d{1,9}(?:\.\d{0,9})?)", text) for text in texts]
    for text, one in zip(texts, found, strict=True):
        if one is None:
            raise click.BadParameter(f"{text!r} is no token's id and a number, such as 7=-2.5")
    return {int(one[1]): float(one[2]) for one in found if one}


def setting(name: str, metavar: str, kind: Any, default: float, help: str) -> Callable[[Command], Command]:
    """An option that is a number."""
    return click.option(name, metavar=metavar, type=kind, default=default, show_default=True, help=help)


OPTIONS = (
    setting("--temperature", "T", click.FloatRange(0), 0.0, "0: always the most likely token."),
    setting("--top-k", "K", click.IntRange(0), 0, "Sample from the k best; 0: all."),
    setting("--top-p", "P", click.FloatRange(0, 1, min_open=True), 1.0, "… of this probability."),
    setting("--min-p", "P", click.FloatRange(0, 1), 0.0, "… each at least so many times as likely as the best."),
    setting(
        "--repetition-penalty",
        "X",
        click.FloatRange(0, min_open=True),
        1.0,
        "Divide the logits of tokens that the text has, its prompt included.",
    ),
    setting("--presence-penalty", "X", float, 0.0, "Subtract this from the logits of tokens that were generated."),
    setting("--frequency-penalty", "X", float, 0.0, "… and this for each time that they were."),
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
    """Adds --temperature and so on, with the names of How.choose's parameters."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command
