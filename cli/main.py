"""`llmc`: the group of commands, and what happens when one fails."""

from __future__ import annotations

import importlib
import io
import os
import re
import sys
import traceback
from contextlib import suppress
from typing import Any

import click

from llmc import __version__
from llmc.runtime.errors import LlmcError

COMMANDS = ("compile", "run", "chat", "embed", "rank", "classify", "verify", "inspect", "tune", "bench", "serve")
REQUEST_FAILED, INTERRUPTED = 1, 130
NO_MEMORY = re.compile(
    "bad_alloc|(can't|cannot) allocate memory|not enough memory|failed to map segment", re.IGNORECASE
)
"""How errors that are no MemoryError say it: those of C++, of PyTorch, and of the loader of their libraries."""
REPORT_HINT = "this is a bug in llmc; please report it with what LLMC_TRACEBACK=1 shows"


class LazyGroup(click.Group):
    """Commands are imported when they are asked for; failures become lines on standard error and an exit code."""

    def main(self, *args: Any, **extra: Any) -> Any:
        open_missing_streams()
        read_any_bytes()
        if os.environ.get("NO_COLOR"):
            extra.setdefault("color", False)
        try:
            return super().main(*args, **extra)
        except OSError as error:  # of a help page, or the version, that finds no room
            report(error)
            sys.exit(REQUEST_FAILED)

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"llmc.cli.{name}").command
        return command

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click's own business
        except KeyboardInterrupt:
            context.exit(INTERRUPTED)
        except Exception as error:
            report(error)
            context.exit(REQUEST_FAILED)


@click.group(cls=LazyGroup)
@click.version_option(__version__, message="llmc %(version)s")
def main() -> None:
    """Compile a language model into one file that runs by itself.

    \b
    llmc compile path/to/model -o model.so
    llmc run model.so -p "Once upon a time"
    """


def open_missing_streams() -> None:
    """Open /dev/null in place of closed standard streams, or the next file that is opened would get their number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(descriptor, True)
            setattr(sys, name, os.fdopen(descriptor, mode))


def read_any_bytes() -> None:
    """Let standard input hold any bytes, as arguments may; what is not UTF-8 is refused by the code that uses it."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


def report(error: Exception) -> None:
    """Print fact, place and hint to standard error; with LLMC_TRACEBACK=1 after the traceback."""
    if os.environ.get("LLMC_TRACEBACK"):
        click.echo("".join(traceback.format_exception(error)), err=True)
    click.echo(f"error: {in_words(error)}", err=True)
    drop_unwritten()


def drop_unwritten() -> None:
    """Forget what standard output has found no room for: the interpreter would try once more at its end, and say so."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError, ValueError):  # it has no descriptor
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
    except ValueError:  # it is closed
        pass


def in_words(error: Exception) -> LlmcError:
    """The error as the user is told: what the system refuses as that, anything else unexpected as a bug in llmc."""
    if isinstance(error, LlmcError):
        return error
    if isinstance(error, OSError) and error.strerror:
        place = str(error.filename) if error.filename else None
        return LlmcError(f"the system refuses: {error.strerror}", place=place)
    if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
        return LlmcError("this machine has not enough memory", hint="end other programs, or take a smaller model")
    said = str(error).strip().splitlines()
    return LlmcError(f"unexpected {type(error).__name__}: {said[0] if said else ''}", hint=REPORT_HINT)
