"""The one error a user sees: the fact, the place, the hint."""

from __future__ import annotations

MOST_SAID = 60
"""A message repeats so many characters of what a file or a request says."""


class LlmcError(Exception):
    """A request that failed for a reason the user can act on.

    fact: what is so, in one line.  place: where it was found (a file, a tensor, an option).  hint: what to do.
    status: the llmc_status (include/llmc.h) of a call of an artifact's runtime; 0: it was not one that failed.
    """

    def __init__(self, fact: str, *, place: str | None = None, hint: str | None = None, status: int = 0) -> None:
        super().__init__(fact)
        self.fact, self.place, self.hint, self.status = fact, place, hint, status

    def __str__(self) -> str:
        parts = [self.fact]
        if self.place:
            parts.append(f"  at: {self.place}")
        if self.hint:
            parts.append(f"  hint: {self.hint}")
        return "\n".join(parts)


def shortened(said: object, most: int = MOST_SAID) -> str:
    """What a file or a request says, as a message may repeat it: in one short line."""
    text = str(said)
    short = text if len(text) <= most else f"{text[:most]}…"
    return short if short.isprintable() else repr(short)[1:-1]
