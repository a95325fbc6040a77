"""Files that a user names, which may be pipes."""

from __future__ import annotations

import os
import select
import stat
import time
from pathlib import Path

from llmc.runtime.errors import LlmcError

PATIENCE_S = 10.0
"""Whoever writes to a pipe has so long to come."""


def read_file(path: str | os.PathLike[str], most: int = -1) -> bytes:
    """What is in a file, or comes out of a pipe; most: bytes that are looked at, -1: all.

    Raises OSError as open does, and LlmcError for a pipe that nobody writes to, which would be waited for without end.
    """
    with open(path, "rb", opener=at_once) as file:
        descriptor = file.fileno()
        is_pipe = stat.S_ISFIFO(os.fstat(descriptor).st_mode)
        first = first_bytes(descriptor, str(path)) if is_pipe else b""
        os.set_blocking(descriptor, True)
        return first + file.read(most if most < 0 else most - len(first))


def at_once(path: str, flags: int) -> int:
    """An opener that waits for nobody."""
    return os.open(path, flags | os.O_NONBLOCK)


def first_bytes(descriptor: int, place: str) -> bytes:
    """Some of the first that come out of a pipe, as soon as somebody writes to it, or has: none, if he lets us wait."""
    told = select.poll()
    told.register(descriptor, select.POLLIN)
    end = time.monotonic() + PATIENCE_S
    while not told.poll(0):  # it tells of what was written, and that a writer has gone
        try:
            if found := os.read(descriptor, 1):
                return found
        except BlockingIOError:
            break  # there is one
        if time.monotonic() > end:
            raise LlmcError("nobody writes to this pipe", place=place)
        time.sleep(0.01)
    return b""


def refuse_pipe(path: Path) -> None:
    """Raise LlmcError for what is no file, but a pipe or a device, where what is read in pieces is looked for."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise LlmcError("this is a pipe or a device, and no file", place=str(path))
