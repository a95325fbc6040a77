"""A job: one text being generated, from its prompt to its last token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Literal, NamedTuple

from llmc.runtime.generation import GREEDY, How
from llmc.runtime.serve.stops import StopScanner
from llmc.runtime.text import TextStream

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from llmc.runtime.sequence import Sequence

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Ask:
    """What is wanted of one text.

    prompt: token ids, at least one.  max_tokens: at least 1; the room in the context and the cache may end it earlier.
    stops: strings that end it, and are not part of it.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    how: How = GREEDY
    stops: tuple[str, ...] = ()
    ignore_eos: bool = False


class Said(NamedTuple):
    """News of a job: text that is safe to show, why it ended if it has, or the error that ended it."""

    job: Job
    text: str = ""
    finish: Finish | None = None
    error: Exception | None = None


class Job:
    """One text.  The engine's thread alone changes it, but for `is_cancelled`.

    index: among the texts of its request.  ids: the prompt and what follows it so far; the first n_fed are in the
    sequence.  sequence: None while it waits.  followers: jobs of the same prompt, which fork it once that is fed; they
    are no leaders.  shares_tail: its last page may be another's too, so that the next token may take a page more.
    n_reused: tokens of the prompt that another sequence had already when it first began.
    """

    def __init__(
        self,
        ask: Ask,
        room: int,
        tokenizer: Tokenizer | None,
        listen: Callable[[Said], None],
        index: int = 0,
        streams: bool = True,
    ) -> None:
        """room: most tokens that a sequence can hold; the last one said needs none.  listen: told what happens: every
        piece of the text, or all of it at the end (streams)."""
        self.ask, self.listen, self.index, self.streams = ask, listen, index, streams
        self.most = min(ask.max_tokens, room - len(ask.prompt) + 1)
        self.ids = list(ask.prompt)
        self.n_fed = 0
        self.number = 0
        self.sequence: Sequence | None = None
        self.followers: list[Job] = []
        self.shares_tail = False
        self.n_reused = 0
        self.is_leader = True
        self.has_begun = False
        self.is_cancelled = False
        self.finish: Finish | None = None
        self.arrived = perf_counter()
        self._text = TextStream(tokenizer, ask.prompt) if tokenizer else None
        self._scanner = StopScanner(ask.stops)
        self._untold = ""

    @property
    def tokens(self) -> list[int]:
        """What was generated, an end token included."""
        return self.ids[len(self.ask.prompt) :]

    @property
    def n_said(self) -> int:
        return len(self.ids) - len(self.ask.prompt)

    @property
    def n_pending(self) -> int:
        """Tokens to be fed before the next one can be sampled."""
        return len(self.ids) - self.n_fed

    @property
    def next_is_last(self) -> bool:
        return self.n_said + 1 >= self.most

    def take(self, token: int, is_end: bool) -> Said | None:
        """The next token, and what is to be told of it, if anything."""
        self.ids.append(token)
        ends = is_end and not self.ask.ignore_eos
        finish: Finish | None = "stop" if ends else "length" if self.n_said >= self.most else None
        text = ""
        if self._text is not None:
            text = "" if ends else self._text.push(token)
            text += self._text.flush() if finish else ""
        text, is_stopped = self._scanner.push(text, is_last=finish is not None)
        self.finish = "stop" if is_stopped else finish
        text = self._untold + text
        tells = self.finish is not None or (self.streams and text != "")
        self._untold = "" if tells else text
        return Said(self, text, self.finish) if tells else None

    def leave(self) -> None:
        """Give the pages back."""
        if self.sequence is not None:
            self.sequence.close()
        self.sequence, self.n_fed, self.shares_tail = None, 0, False
