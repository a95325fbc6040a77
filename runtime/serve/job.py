"""A job: one text being generated, from its prompt to its last token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from llmc.runtime.generation import GREEDY, History, How
from llmc.runtime.serve.stops import StopScanner
from llmc.runtime.text import TextStream

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from llmc.runtime.embedding import Embedding
    from llmc.runtime.generation import Mask
    from llmc.runtime.grammar import Constraint
    from llmc.runtime.images import Seen
    from llmc.runtime.runner import Ids, Logits
    from llmc.runtime.sequence import Sequence
    from llmc.runtime.serve.probs import TokenProb
    from llmc.runtime.speculate import TextGuesses

Finish = Literal["stop", "length"]
Tells = Literal["tokens", "pieces", "end"]


class Thinking(NamedTuple):
    """The tokens that begin and end a thought, None where that is no single one.  is_open: it began in the prompt.
    most: its tokens; behind them what may come next is `ending`, which is what closes it, uint32 as How.allowed."""

    opening: int | None
    closing: int | None
    is_open: bool
    most: int | None = None
    ending: Mask | None = None


@dataclass(frozen=True)
class Ask:
    """What is wanted of one text.

    prompt: token ids, at least one.  max_tokens: the room in the context and the cache may end it earlier; 0: read the
    prompt, and say nothing.  stops, stop_tokens: what ends it, and is not part of it.  min_tokens: before so many
    nothing does: what may come next is among going_on, uint32 as How.allowed.  n_top: None: no probabilities; otherwise
    its tokens', and those of so many likely ones at each place.  scores_prompt: those of the prompt as well.  shown:
    special tokens that have a text here.  thinking: how a thought may come before it.  embeds: how the prompt's
    embedding is made, where that is what is wanted.  adapter: of the model's, that it goes through.  pictures: of the
    prompt, whose rows are there as long as this is.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    how: How = GREEDY
    stops: tuple[str, ...] = ()
    stop_tokens: Set[int] = frozenset()
    min_tokens: int = 0
    going_on: Mask | None = None
    ignore_eos: bool = False
    n_top: int | None = None
    scores_prompt: bool = False
    shown: Mapping[int, str] = field(default_factory=dict)
    thinking: Thinking | None = None
    embeds: Embedding | None = None
    adapter: str | None = None
    pictures: tuple[Seen, ...] = ()


class Said(NamedTuple):
    """News of a job: text that is safe to show, the tokens since the last news, with their probabilities if they are
    wanted, why it ended if it has, or the error that ended it."""

    job: Job
    text: str = ""
    finish: Finish | None = None
    tokens: tuple[int, ...] = ()
    probs: tuple[TokenProb, ...] = ()
    error: Exception | None = None


class Job:
    """One text.  The engine's thread alone changes it, but for `is_cancelled`.

    index: among the texts of its request.  ids: the prompt and what follows it so far; the first n_fed are in the
    sequence.  sequence: None while it waits.  followers: jobs of the same prompt, which fork it once that is fed; they
    are no leaders.  shares_tail: its last page may be another's too, so that the next token may take a page more.
    n_reused: tokens of the prompt that another sequence had already when it first began; looked_at_step: how many steps
    there had been when such a sequence was last looked for.  probs: of the tokens said;
    prompt_probs: of the prompt's, if they are wanted, as far as they are known.  n_thought: tokens of its thought.
    guesses: at what it goes on with, once there are.  row: what the embedding is made of, float32 [size], as far as it
    is known.
    """

    def __init__(
        self,
        ask: Ask,
        room: int,
        tokenizer: Tokenizer | None,
        listen: Callable[[Said], None],
        index: int = 0,
        tells: Tells = "pieces",
        constraint: Constraint | None = None,
    ) -> None:
        """room: most tokens that a sequence can hold; the last one said needs none.  listen: told what happens: each
        token, each piece of text, or all of it at the end (tells).  constraint: what it has to look like."""
        self.ask, self.listen, self.index, self.tells, self.constraint = ask, listen, index, tells, constraint
        self.most = min(ask.max_tokens, room - len(ask.prompt) + 1)
        self.ids = list(ask.prompt)
        self.n_fed = 0
        self.number = 0
        self.sequence: Sequence | None = None
        self.followers: list[Job] = []
        self.shares_tail = False
        self.n_reused = 0
        self.looked_at_step = -1
        self.is_leader = True
        self.has_begun = False
        self.is_cancelled = False
        self.finish: Finish | None = None
        self.probs: list[TokenProb] = []
        self.prompt_probs: list[TokenProb] = []
        self.guesses: TextGuesses | None = None
        self.row = np.zeros(ask.embeds.size if ask.embeds else 0, np.float32)
        self.arrived = perf_counter()
        self.n_thought = 0
        self._is_in_thought = ask.thinking is not None and ask.thinking.is_open
        self._has_begun_answer = False  # or the thought, with more than blanks
        self._history = History(ask.prompt) if ask.how.looks_back else None
        self._how = ask.how if self._history is None else ask.how.after(self._history)
        self._text = TextStream(tokenizer, ask.prompt) if tokenizer else None
        self._scanner = StopScanner(ask.stops)
        self._untold = ""
        self._n_told = 0

    @property
    def tokens(self) -> list[int]:
        """The tokens that were generated, an end token included."""
        return self.ids[len(self.ask.prompt) :]

    @property
    def n_said(self) -> int:
        return len(self.ids) - len(self.ask.prompt)

    @property
    def stop(self) -> str | None:
        """The string that ended it, if one has."""
        return self._scanner.met

    @property
    def counts_thoughts(self) -> bool:
        """Whether n_thought says anything."""
        return self.ask.thinking is not None and self.ask.thinking.closing is not None

    @property
    def n_pending(self) -> int:
        """Tokens to be fed before the next one can be sampled."""
        return len(self.ids) - self.n_fed

    @property
    def next_is_last(self) -> bool:
        return self.n_said + 1 >= self.most

    @property
    def has_to_score(self) -> bool:
        """Whether logits of its prompt are still wanted."""
        return self.ask.scores_prompt and len(self.prompt_probs) < len(self.ask.prompt)

    @property
    def wants_rows(self) -> bool:
        """Whether the model's rows for its prompt are still wanted, one for each token."""
        return self.has_to_score or (self.ask.embeds is not None and not self.ask.embeds.of_last)

    @property
    def needs_care(self) -> bool:
        """Whether its next token is not just one more."""
        is_hosted = self.constraint is not None or not self._how.is_plain or self.has_to_go_on or self.has_to_answer
        return bool(self.n_pending or self.followers or self.most == 0 or self.ask.n_top is not None or is_hosted)

    @property
    def has_to_go_on(self) -> bool:
        """Whether its next token must not end it."""
        return self.n_said < self.ask.min_tokens

    @property
    def may_think_too_long(self) -> bool:
        """Whether there is, or may still come, a thought that has an end."""
        is_bound = self.ask.thinking is not None and self.ask.thinking.ending is not None
        return is_bound and (self._is_in_thought or not self._has_begun_answer)

    @property
    def has_to_answer(self) -> bool:
        """Whether its thought has all the tokens that it may have, beside the mark that begins it."""
        thinking = self.ask.thinking
        if not self._is_in_thought or thinking is None or thinking.most is None:
            return False
        return self.n_thought >= thinking.most + (not thinking.is_open)

    def pool(self, rows: Logits) -> None:
        """The model's rows for some of its prompt's tokens, float32 [n, n_vocab]; all of them, or the last one's."""
        if self.ask.embeds is not None:
            self.row += rows[:, : len(self.row)].sum(0) / (len(self.ask.prompt) if self.wants_rows else 1)

    def next_how(self) -> How:
        """How its next token is chosen.  Raises LlmcError: its grammar gave up."""
        thinking = self.ask.thinking
        if thinking is not None and thinking.ending is not None and self.has_to_answer:
            return self._how.among(thinking.ending)
        allowed = self._allowed()
        if self.has_to_go_on and self.ask.going_on is not None:
            rest = self.ask.going_on if allowed is None else allowed & self.ask.going_on
            allowed = rest if rest.any() else allowed  # a grammar that is at its end has the last word
        return self._how if allowed is None else self._how.among(allowed)

    def _allowed(self) -> Mask | None:
        """The tokens that the constraint allows, and those that begin a thought where one may; None: all."""
        if self.constraint is None or self._is_in_thought:
            return None
        allowed, opening = self.constraint.allowed(), self.ask.thinking and self.ask.thinking.opening
        if self._has_begun_answer or opening is None:
            return allowed
        allowed = allowed.copy()
        allowed[opening // 32] |= np.uint32(1 << opening % 32)
        return allowed

    def _think(self, token: int) -> bool:
        """Whether the token is of a thought, its marks included."""
        thinking = self.ask.thinking
        if thinking is None or thinking.closing is None:
            return False
        if not self._has_begun_answer and token == thinking.opening:
            self._is_in_thought = True
        is_thought = self._is_in_thought
        self._is_in_thought &= token != thinking.closing
        self.n_thought += is_thought
        return is_thought

    def next_ids(self, n: int) -> Ids:
        """int32 [n]: what is fed next."""
        return np.array(self.ids[self.n_fed : self.n_fed + n], dtype=np.int32)

    def take(self, token: int, is_end: bool) -> Said | None:
        """The next token, and what is to be told of it, if anything."""
        self.ids.append(token)
        if self._history is not None:
            self._history.take(token)
        ends = (is_end and not self.ask.ignore_eos) or token in self.ask.stop_tokens
        is_whole, is_thought = False, self._think(token)
        if self.constraint is not None and not is_thought:
            self.constraint.take(token)
            is_whole = self.constraint.is_over
        finish: Finish | None = "stop" if ends or is_whole else "length" if self.n_said >= self.most else None
        text = ""
        if self._text is not None:
            text = "" if ends else self._text.push(token) + self.ask.shown.get(token, "")
            text += self._text.flush() if finish else ""
        self._has_begun_answer |= self._text is None or bool(text.strip())
        is_stopped = False
        if self.n_said > self.ask.min_tokens:
            text, is_stopped = self._scanner.push(text, is_last=finish is not None)
        self.finish = "stop" if is_stopped else finish
        self._untold += text
        is_news = self.tells == "tokens" or (self.tells == "pieces" and self._untold)
        return self.tell() if self.finish or is_news else None

    def tell(self) -> Said:
        """All that nobody has been told yet."""
        text, self._untold = self._untold, ""
        tokens, probs = self.ids[len(self.ask.prompt) + self._n_told :], self.probs[self._n_told :]
        self._n_told = self.n_said
        return Said(self, text, self.finish, tuple(tokens), tuple(probs))

    def end(self) -> None:
        """There is no more of it."""
        self.leave()
        if self.guesses is not None:
            self.guesses.close()

    def leave(self) -> None:
        """Give the pages back."""
        if self.sequence is not None:
            self.sequence.close()
        self.sequence, self.n_fed, self.shares_tail = None, 0, False
