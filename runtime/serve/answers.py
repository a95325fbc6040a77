"""An answer taken apart: what is thought, what is said to people, and the calls of functions."""

from __future__ import annotations

import secrets
import string
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from llmc.runtime.serve.calls import CallScanner
from llmc.runtime.serve.forms import Call
from llmc.runtime.serve.thoughts import Scanner

CALL_ID_LETTERS = 9
"""Some templates take ids of nine letters and digits, and no others."""
Kind = Literal["thought", "text", "call"]
Parts = tuple[str, list[str | Call]]
"""More of a thought; and what is said, with the calls that have come to their end, in their order."""


class Answer:
    """Takes a text apart that comes in pieces."""

    def __init__(self, split: Scanner | None = None, scan: CallScanner | None = None, shows: bool = True) -> None:
        """split: finds the thought that it begins with, if there may be one, which is left out unless it shows.  scan:
        finds the calls, if there may be some."""
        self._split, self._scan, self._shows = split, scan, shows
        self.is_plain = split is None and scan is None  # all of it is said to people

    @property
    def n_calls(self) -> int:
        """How many calls have come to their end."""
        return self._scan.n_calls if self._scan else 0

    def push(self, piece: str, is_last: bool) -> Parts:
        """is_last: hold nothing back."""
        thought, said = self._split.push(piece, is_last) if self._split is not None else ("", piece)
        return thought if self._shows else "", self._scan.push(said, is_last) if self._scan is not None else [said]


@dataclass
class Block:
    """A part of an answer that is all of one kind.  index: in the answer.  name: of a call, whose text is its
    arguments, as JSON; call_id: by which its result is given later."""

    kind: Kind
    index: int
    name: str = ""
    call_id: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Change(NamedTuple):
    """What happens to a block: it begins, grows, or ends."""

    what: Literal["begin", "more", "end"]
    block: Block
    text: str = ""


class Blocks:
    """An answer as a row of blocks, the last of which may not be whole.  Blanks alone make no block beside others."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._open: Block | None = None
        self._blanks = ""
        self.blocks: list[Block] = []

    @property
    def n_calls(self) -> int:
        return self._answer.n_calls

    def push(self, piece: str, is_last: bool) -> Iterator[Change]:
        thought, parts = self._answer.push(piece, is_last)
        if thought:
            yield from self._more("thought", thought)
        for part in parts:
            yield from self._say(part) if isinstance(part, str) else self._call(part)
        if is_last and all(block.kind == "thought" for block in self.blocks):
            yield from self._more("text", self._blanks)
        if is_last:
            yield from self._end()

    def _say(self, said: str) -> Iterator[Change]:
        """Blanks before a text are held back until that comes."""
        if self._open is None or self._open.kind != "text":
            self._blanks += said
            if not self._blanks.strip():
                return
            said, self._blanks = self._blanks, ""
        if said:
            yield from self._more("text", said)

    def _call(self, call: Call) -> Iterator[Change]:
        yield from self._begin("call", call.name, new_call_id())
        yield from self._more("call", call.arguments)
        yield from self._end()

    def _begin(self, kind: Kind, name: str = "", call_id: str = "") -> Iterator[Change]:
        yield from self._end()
        self._open = Block(kind, len(self.blocks), name, call_id)
        self.blocks.append(self._open)
        yield Change("begin", self._open)

    def _more(self, kind: Kind, text: str) -> Iterator[Change]:
        if self._open is None or self._open.kind != kind:
            yield from self._begin(kind)
        assert self._open is not None
        if text:
            self._open.pieces.append(text)
            yield Change("more", self._open, text)

    def _end(self) -> Iterator[Change]:
        if self._open is not None:
            yield Change("end", self._open)
        self._open, self._blanks = None, ""


def new_call_id() -> str:
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(CALL_ID_LETTERS))
