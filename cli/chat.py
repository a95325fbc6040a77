"""`llmc chat`: talk with a model in the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from llmc.cli.ending import Ending
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
from llmc.cli.output import artifact_argument, in_seconds, installed, json_option, print_json, say, threads_option
from llmc.cli.sampling import sampling_options
from llmc.runtime import LlmcError
from llmc.runtime.parse_json import parse_json

if TYPE_CHECKING:
    from llmc.runtime.binding import Model
    from llmc.runtime.conversation import Conversation, Piece
    from llmc.runtime.pictures import Picture

Turn = Callable[[str | None, "Sequence[Picture]"], "Iterator[Piece]"]
"""Begins the answer to a message with pictures, or another one to the last message (None)."""
COMMANDS = """/new         begin another conversation
/again       another answer to the last message
/image FILE  show a picture with the next message, if the model was compiled with --images
/exit        end, as Ctrl-D does; Ctrl-C ends an answer
\"\"\"          begins and ends a message of several lines"""
FENCE, SHOW = '"""', "/image "
NOT_KEPT = "pictures are not kept in a file: leave --session out"


def parse_variables(context: click.Context, option: click.Parameter, texts: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE, several times; a value that is JSON is what it says, any other is text."""
    variables: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise click.BadParameter(f"{text!r} is no name and a value, such as enable_thinking=false")
        variables[name] = value
        with suppress(ValueError):
            variables[name] = parse_json(value)
    return variables


@click.command(short_help="Talk with a model in the terminal.")
@artifact_argument
@click.option("-p", "--prompt", metavar="TEXT", help="One message: print the answer, and end.")
@image_option
@click.option("--system", metavar="TEXT", help="What the model is told before the first message.")
@click.option(
    "--set",
    "variables",
    metavar="NAME=VALUE",
    multiple=True,
    callback=parse_variables,
    help="A variable of the model's chat template, such as enable_thinking=false or reasoning_effort=low.",
)
@click.option(
    "-n",
    "max_tokens",
    metavar="N",
    type=click.IntRange(0),
    help="Most tokens of an answer.  [default: what the context holds]",
)
@click.option(
    "--session",
    metavar="FILE",
    type=click.Path(),
    help="Keep the conversation in FILE when it ends, and go on with the one that is there.",
)
@sampling_options
@adapter_option
@speculation_options
@threads_option
@device_option
@json_option
def command(
    artifact: str,
    prompt: str | None,
    images: tuple[str, ...],
    system: str | None,
    variables: dict[str, Any],
    max_tokens: int | None,
    session: str | None,
    adapter: str | None,
    speculate: int | None,
    draft: str | None,
    threads: int,
    device: str | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Talk with a model in the terminal, in the form that its chat template gives messages.

    Messages are lines, typed or of standard input; there an empty line begins another conversation. Answers go to
    standard output, what a model thinks before them, dim, to standard error. A turn reads what is new in it alone.

    Pictures come with the first message, or with -p's.

    Typed: /new begins another conversation, /again asks for another answer, /image FILE shows a picture, /help lists
    more.
    """
    if images and session:
        raise click.UsageError(NOT_KEPT)
    if as_json and prompt is None:
        raise click.UsageError("--json is for one message: -p TEXT")
    from llmc.runtime.generation import How

    how = How.choose(**sampling)
    check_speculation(speculate, draft, how)
    with opened(artifact, threads, device) as model, guessing(model, speculate, draft, threads, device) as guesses:
        with installed("a chat template", "serve"):
            from llmc.runtime.conversation import Conversation

            talk = Conversation(model, system, adapter=adapter, **variables)

        shown, ending = [picture_in(path, model) for path in images], Ending()

        def turn(message: str | None, pictures: Sequence[Picture] = ()) -> Iterator[Piece]:
            nonlocal how
            if message is None:  # another answer is drawn in another way
                how = replace(how, seed=(how.seed + 1) % 2**64)
                return ending.checked(talk.answer(max_tokens, how, speculation=guesses()))
            return ending.checked(talk.ask(message, max_tokens, how, images=pictures, speculation=guesses()))

        with talk, kept(talk, session, system, ending):
            if prompt is None:
                typed = sys.stdin.isatty()
                Terminal(talk, turn, ending, shown, session).run() if typed else answer_lines(talk, turn, ending, shown)
            elif as_json:
                print_json(result(talk, turn(prompt, shown)))
            else:
                show(turn(prompt, shown))
                say(timing(talk))


@contextmanager
def kept(talk: Conversation, path: str | None, system: str | None, ending: Ending) -> Iterator[None]:
    """Go on with the conversation of a file, if one is named, and write it when it ends: the terminal may be closed."""
    if path is None:
        yield
        return
    if os.path.lexists(path):
        talk.restore(path)
        if system is not None and talk.messages[:1] != [{"role": "system", "content": system}]:
            fact, hint = "the conversation in this file has another --system", "leave it out, or name another file"
            raise LlmcError(fact, place=path, hint=hint)
        say(f"going on after {len(talk.messages)} messages")
    else:
        from llmc.runtime.prompt_cache import check_folder

        check_folder(path)
    before = list(talk.messages)
    with ending:
        try:
            yield
        finally:
            if talk.messages != before:
                talk.save(path)


def picture_in(path: str, model: Model) -> Picture:
    """A picture that this model can read: what is wrong with it is said before it is asked about.  Raises LlmcError."""
    from llmc.runtime.pictures import Picture

    with seeing():
        _ = model.images.processor
        picture = Picture.of(path)
        picture.decode()
    return picture


def answer_lines(talk: Conversation, turn: Turn, ending: Ending, pictures: Sequence[Picture] = ()) -> None:
    """A message a line of standard input; an empty one begins another conversation.  pictures: of the first."""
    while line := read_line(ending):
        message = line.rstrip("\n")
        if message:
            show(turn(message, pictures))
            pictures = ()
        else:
            talk.begin_anew()


def read_line(ending: Ending) -> str:
    """A line of standard input, or "" at its end."""
    with ending.waiting():
        return sys.stdin.readline()


class Terminal:
    """Messages that are typed, with commands between them."""

    def __init__(
        self,
        talk: Conversation,
        turn: Turn,
        ending: Ending,
        pictures: Sequence[Picture] = (),
        session: str | None = None,
    ) -> None:
        """pictures: of the next message.  session: the file that keeps the conversation."""
        self.talk, self.turn, self.ending, self.pictures, self.session = talk, turn, ending, [*pictures], session

    def run(self) -> None:
        with suppress(ImportError):
            import readline  # noqa: F401  # with it, input() keeps a history and edits lines
        say("/help says what can be typed; Ctrl-D ends")
        while (message := self.read()) is not None:
            if message == "/new":
                self.talk.begin_anew()
            elif message == "/again":
                self.again()
            elif message.startswith(SHOW):
                self.show_picture(message.removeprefix(SHOW).strip())
            elif message.startswith("/"):
                say(COMMANDS)
            elif message:
                self.answer(message)

    def read(self) -> str | None:
        """A message, or None at the end."""
        try:
            with self.ending.waiting():
                line = input("> ")
                if line.startswith(FENCE):
                    line = line.removeprefix(FENCE)
                    while FENCE not in line:
                        line += f"\n{input('… ')}"
                    line = line.partition(FENCE)[0]
        except EOFError:
            click.echo()
            return None
        return None if line.strip() == "/exit" else line.strip()

    def show_picture(self, path: str) -> None:
        """Show a picture with the next message; what is wrong with it is said."""
        try:
            if self.session is not None:
                raise LlmcError(NOT_KEPT)
            self.pictures.append(picture_in(os.path.expanduser(path), self.talk.model))
            say(f"{len(self.pictures)} for the next message")
        except LlmcError as error:
            click.echo(f"error: {error}", err=True)

    def again(self) -> None:
        """Another answer to the last message."""
        if self.talk.messages and self.talk.messages[-1]["role"] == "assistant":
            self.talk.messages.pop()
            self.answer(None)

    def answer(self, message: str | None) -> None:
        """Print the answer to a message, or to the last one; what goes wrong ends it alone, and so does Ctrl-C."""
        pictures, self.pictures = ([], self.pictures) if message is None else (self.pictures, [])
        try:
            show(self.turn(message, pictures))
            said = self.talk.generation
            if said is not None and said.stop == "context":
                say("the context is full; /new begins another conversation")
        except KeyboardInterrupt:
            say("interrupted")
        except LlmcError as error:
            click.echo(f"error: {error}", err=True)


def show(pieces: Iterator[Piece]) -> None:
    """Print an answer as it comes, and end the line whatever happens."""
    has_thought = False
    try:
        for thought, answer in pieces:
            click.secho(thought, dim=True, err=True, nl=False)
            has_thought |= bool(thought)
            if answer and has_thought:
                say("\n")
                has_thought = False
            click.echo(answer, nl=False)
    finally:
        click.echo()


def result(talk: Conversation, pieces: Iterator[Piece]) -> dict[str, Any]:
    """Run a turn to its end.  -> what --json prints."""
    said = list(pieces)
    generation = talk.generation
    assert generation is not None
    seen = {"images_s": generation.pictured.seconds} if generation.pictured else {}
    return {
        "text": "".join(piece.answer for piece in said),
        "thought": "".join(piece.thought for piece in said),
        "tokens": generation.tokens,
        "n_prompt_tokens": len(generation.prompt),
        **seen,
        "prefill_s": generation.prefill_s,
        "decode_s": generation.decode_s,
        "decode_tokens_per_s": generation.decode_tokens_per_s,
        "stop": generation.stop,
    }


def timing(talk: Conversation) -> str:
    """One line about the last turn's speed."""
    said = talk.generation
    assert said is not None
    return (
        f"{pictures_in_seconds(said)}prompt {len(said.prompt)} tokens in {in_seconds(said.prefill_s)} | "
        f"{len(said.tokens)} tokens, {said.decode_tokens_per_s:.1f} tok/s | end: {said.stop}"
    )
