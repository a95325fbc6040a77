"""Signals that end a program which has something to keep: taken where it loses nothing by it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")
ENDS = (signal.SIGHUP, signal.SIGTERM)
"""What a terminal that is closed says, several times, itself and by its shell; and who stops programs."""
PERIOD_S = 0.5


class Ending:
    """A context manager, of the main thread: in it, the first of ENDS ends the program with SystemExit(128 + its
    number), but only where `check` is called, or in `waiting`.  Not entered, it does nothing.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}
        self._waits = False

    def __enter__(self) -> Ending:
        self._before = {number: signal.getsignal(number) for number in ENDS}
        for number, handler in self._before.items():
            if handler is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        self.number = self.number or number
        if self._waits:
            self._waits = False  # it is left once
            self.check()

    def check(self) -> None:
        """Raises SystemExit if a signal came."""
        if self.number is not None:
            sys.exit(128 + self.number)

    def checked(self, items: Iterator[Item]) -> Iterator[Item]:
        """The same items, and a check behind each."""
        for item in items:
            yield item
            self.check()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Read from a terminal or a pipe in it: a signal ends the wait.

        Python runs a handler when a system call was interrupted, not when the signal came just before one that then
        blocks; so a timer interrupts again and again.
        """
        if not self._before:
            yield
            return
        handler = signal.signal(signal.SIGALRM, lambda *_: None)
        try:
            signal.setitimer(signal.ITIMER_REAL, PERIOD_S, PERIOD_S)
            try:
                self._waits = True
                self.check()
                yield
            finally:
                self._waits = False
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
