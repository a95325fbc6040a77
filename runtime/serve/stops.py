"""Stop strings in a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Gives a text on, without the first stop string and what follows it.

    What may be the beginning of a stop string is held back until the next piece decides.  met: the one that was found.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.met: str | None = None

    def push(self, piece: str, is_last: bool = False) -> tuple[str, bool]:
        """-> (the text that is safe to show, whether a stop string has been met).  is_last: hold nothing back."""
        text = self._held + piece
        ends = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            end, self.met = min(ends)
            self._held = ""
            return text[:end], True
        n_safe = len(text) - (0 if is_last else max((overlap(text, stop) for stop in self._stops), default=0))
        self._held = text[n_safe:]
        return text[:n_safe], False


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins the stop string, and is not all of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
