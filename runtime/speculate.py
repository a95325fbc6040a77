"""Speculative decoding: guess what a text goes on with, and have the guesses checked by one step.

A step on eight tokens reads a model's weights once, as a step on one token does, so a guess that is right is a token
for nearly nothing (Leviathan, Kalman, Matias 2023, arXiv:2211.17192).  The text is the same as without guesses, greedy
or drawn: see `speculate` in include/llmc.h.

Who guesses: `PromptLookup`, from what the text has said before, or `DraftModel`, a smaller model of the same tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence as Row
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from llmc.runtime import capi
from llmc.runtime.embedding import check_writes
from llmc.runtime.errors import LlmcError

if TYPE_CHECKING:
    from llmc.runtime.binding import Model
    from llmc.runtime.generation import How, Mask
    from llmc.runtime.grammar import Constraint
    from llmc.runtime.runner import Ids, Logits
    from llmc.runtime.sequence import Sequence

MOST = 63
"""Guesses in a step, whoever asks for them; cli/opening.py says so too."""
FORCED = 7
"""With the token before them they are as many as a light step has."""
RUNS = (4, 3, 2, 1)
"""Tokens at the end of a text that are looked up in it."""
MOST_READ = 8192
"""Tokens of a text that are read for a guess, in some 15 ms; of a longer prompt the rest at the next ones."""


class Guesser(Protocol):
    def guess(self, text: Row[int], how: How, most: int) -> list[int]:
        """At most so many tokens that may follow the text; each call's text begins with that of the call before."""
        ...

    def close(self) -> None:
        """The text has ended."""
        ...


class PromptLookup:
    """What followed the last tokens where the text, or its prompt, said them before (Saxena 2023; transformers'
    prompt_lookup_num_tokens).  Of several places the latest, for the longest run of tokens that is found; a guess that
    reaches the end of the text goes on in itself, and one that reaches a row of a picture ends there."""

    def __init__(self, n_tokens: int) -> None:
        """n_tokens: that there are; rows that stand for tokens have larger numbers."""
        self._n_tokens = n_tokens
        self._n = 0  # tokens that were read
        self._after: dict[tuple[int, ...], int] = {}  # some tokens that stand in the text -> the place behind them

    def guess(self, text: Row[int], how: How, most: int) -> list[int]:
        end = min(len(text), self._n + MOST_READ)
        for place in range(self._n, end):  # the token there stands behind those before it
            for n in RUNS:
                if n <= place:
                    self._after[tuple(text[place - n : place])] = place
        self._n = end
        for n in RUNS:
            start = self._after.get(tuple(text[-n:])) if n <= len(text) else None
            if start is not None:
                guesses = list(text[start : start + most])
                while len(guesses) < most:
                    guesses.append(guesses[start - len(text)])
                return list(takewhile(lambda token: token < self._n_tokens, guesses))
        return []

    def close(self) -> None:
        """Holds nothing."""


class DraftModel:
    """What another model says, with the same settings: equal seeds draw alike where the two models agree."""

    def __init__(self, draft: Model, model: Model, chunk: int = 0) -> None:
        """chunk: most tokens of a text that are read for a guess, of which there is none until all are; 0: all.
        Raises LlmcError for another vocabulary, and for a model that writes no texts."""
        check_writes(draft)
        check_vocabulary(draft, model)
        self._chunk = chunk
        self._n_ours, self._n_theirs = model.info.n_vocab, draft.info.n_vocab
        self._model, self._sequence = draft, draft.sequence()
        self._known: list[int] = []  # of the text, in the sequence
        self._guessed: list[int] = []  # in the sequence, behind it
        self._has_ended = False

    def guess(self, text: Row[int], how: How, most: int) -> list[int]:
        most = min(most, self._model.info.n_context - len(text))
        n_common = min(self._n_theirs, self._n_ours)  # padding has no meaning, nor have rows of pictures
        is_strange = any(token >= n_common for token in text[len(self._known) :])
        if most < 1 or is_strange:
            self.close()
        if self._has_ended:
            return []
        try:
            say = self._say_beside if self._model.has_states else self._say
            return [token for token in say(text, how, most) if token < self._n_ours]
        except LlmcError as error:
            if error.status != capi.NO_MEMORY:
                raise
            self.close()
            return []

    def close(self) -> None:
        """Give the pages back; there are no guesses any more."""
        self._has_ended = True
        self._sequence.close()

    def begin_anew(self) -> None:
        """Another text comes: what it has in common with this one is not read again."""
        if self._has_ended:
            self._sequence, self._has_ended = self._model.sequence(), False
            self._known, self._guessed = [], []
        self._known, self._guessed = [], [*self._known, *self._guessed]

    def _say_beside(self, text: Row[int], how: How, most: int) -> list[int]:
        """The same of a model with states: what is known stays in the sequence, guesses are made in a copy."""
        held = [*self._known, *self._guessed]
        if held != list(text[: len(held)]) or len(held) == len(text):
            self._sequence.truncate(0)  # a state is of a whole text
            held = []
        if not self._read(text, len(held)):
            return []
        guesses = [self._sequence.sample(how)]
        with self._sequence.fork() as ahead:
            while len(guesses) < most:
                ahead.feed(guesses[-1:])
                guesses.append(ahead.sample(how))
        return guesses

    def _say(self, text: Row[int], how: How, most: int) -> list[int]:
        n_same = min(len(self._known), len(text) - 1)  # the last token is fed in any case, to have logits
        for guessed, said in zip(self._guessed, text[len(self._known) : -1], strict=False):
            if guessed != said:
                break
            n_same += 1
        self._sequence.truncate(n_same)
        if not self._read(text, n_same):
            return []
        guesses = [self._sequence.sample(how)]
        while len(guesses) < most:
            self._sequence.feed(guesses[-1:])
            self._guessed.append(guesses[-1])
            guesses.append(self._sequence.sample(how))
        return guesses

    def _read(self, text: Row[int], n_held: int) -> bool:
        """Feed what stands behind the first n_held tokens, at most a chunk; whether that is all."""
        n_read = min(len(text), n_held + self._chunk) if self._chunk else len(text)
        del self._known[n_held:]
        self._known += text[len(self._known) : n_read]
        self._guessed = []
        self._sequence.feed(text[n_held:n_read])
        return n_read == len(text)


class InTurns:
    """A draft model's guesses at texts that come one after another and begin alike, as turns of a conversation do."""

    def __init__(self, guesser: DraftModel) -> None:
        self.guess, self.close = guesser.guess, guesser.begin_anew


def check_vocabulary(draft: Model, model: Model) -> None:
    """Raise LlmcError unless two models mean the same by a token; their logits may be padded to other sizes."""
    if draft.has_tokenizer and model.has_tokenizer:
        is_same = draft.tokenizer.get_vocab() == model.tokenizer.get_vocab()
        fact = "the draft model's tokenizer has other tokens than the model's"
    else:
        theirs, ours = draft.info.n_vocab, model.info.n_vocab
        is_same = theirs == ours
        fact = f"the draft model has {theirs} tokens in its vocabulary, and the model {ours}"
    if not is_same:
        raise LlmcError(fact, place=str(draft.path), hint="a draft is a smaller model with the same tokenizer")


class Guess(NamedTuple):
    """ids: what may follow.  allowed: uint32 [n, (n_vocab + 31) / 32], what is in the place of each; None: anything."""

    ids: list[int]
    allowed: Mask | None = None


class TextGuesses:
    """The guesses at one text: twice as many in a step after some that were all right, after others one more than were
    right; at most `most`."""

    def __init__(self, guesser: Guesser | None, most: int) -> None:
        """guesser: None guesses only what a constraint leaves no choice about."""
        self._guesser, self._most, self._next = guesser, most, most

    def guess(self, text: Row[int], how: How, room: int, constraint: Constraint | None = None) -> Guess:
        """At most `room` guesses.

        A constraint that has taken the text knows best; where it leaves a choice, the guesser is asked.  It never looks
        further than a light step: where a guess is wrong, a grammar may lose itself in what could follow it.
        """
        most = min(self._next, room, FORCED if constraint else room)
        if most < 1:
            return Guess([])
        ids = constraint.forced(most) if constraint else []
        if not ids and self._guesser:
            ids = self._guesser.guess(text, how, most)
        return Guess(*constraint.foresee(ids)) if constraint and ids else Guess(ids)

    def learn(self, n_guessed: int, n_right: int) -> None:
        """How the last guesses fared."""
        if n_guessed:
            self._next = min(self._most, max(self._next, 2 * n_guessed) if n_right == n_guessed else n_right + 1)

    def close(self) -> None:
        """The text has ended."""
        if self._guesser is not None:
            self._guesser.close()


class Speculation:
    """The guesses of one text that has the model for itself, and how they fared.

    n_steps: of the model.  n_guessed, n_right: guesses that were checked, and those that stayed.
    """

    def __init__(self, model: Model, guesser: Guesser | None, most: int) -> None:
        """guesser: see TextGuesses.  most: guesses in a step.  Raises LlmcError for an artifact that is older."""
        check_runtime(model)
        self.n_steps = self.n_guessed = self.n_right = 0
        self._model, self._guesses = model, TextGuesses(guesser, most)
        self._logits = np.empty((most + 1, model.info.n_vocab), np.float32)

    @classmethod
    def of(cls, model: Model, most: int, draft: Model | InTurns | None = None) -> Speculation | None:
        """At most so many guesses, 0: none, but for a draft model as many as a light step has room for; by that model,
        or by what the text has said before."""
        if not 0 <= most <= MOST:
            raise LlmcError(f"there cannot be {most} guesses in a step", place="speculate", hint=f"0 to {MOST}")
        most = FORCED if most == 0 and draft is not None else most
        if most == 0:
            return None
        if draft is None or isinstance(draft, InTurns):
            return cls(model, draft or PromptLookup(model.info.n_vocab), most)
        return cls(model, DraftModel(draft, model), most)

    @classmethod
    def forced(cls, model: Model) -> Speculation | None:
        """Of a text that nobody guesses at but its constraint; None where that is not done."""
        most = n_forced(model)
        return cls(model, None, most) if most else None

    def feed(
        self, sequence: Sequence, text: Row[int], how: How, room: int, constraint: Constraint | None = None
    ) -> list[int]:
        """Append the text's last token, which is not in the sequence yet, and what is right of at most `room` guesses.
        -> these guesses, which the constraint, if there is one, has not taken yet."""
        guess = self._guesses.guess(text, how, room, constraint)
        try:
            n_right = self._check(sequence, how, text[-1], guess)
        except LlmcError as error:
            if error.status != capi.NO_MEMORY or not guess.ids:
                raise
            guess = Guess([])  # there may be pages without them
            n_right = self._check(sequence, how, text[-1], guess)
        self.n_steps += 1
        self.n_guessed += len(guess.ids)
        self.n_right += n_right
        self._guesses.learn(len(guess.ids), n_right)
        return guess.ids[:n_right]

    def _check(self, sequence: Sequence, how: How, token: int, guess: Guess) -> int:
        ids = self._model.check_ids([token, *guess.ids])
        return speculate(self._model, [Guessed(sequence, how, ids, guess, self._logits)])[0]

    def close(self) -> None:
        """The text has ended."""
        self._guesses.close()


def can_speculate(model: Model) -> bool:
    """Whether the artifact is new enough."""
    with model.running() as (api, _):
        return capi.has(api, "speculate")


def check_runtime(model: Model) -> None:
    """Raise LlmcError for an artifact that is older than speculation."""
    with model.running() as (api, _):
        capi.check_has(api, "speculate", "check guesses", str(model.path))


def n_forced(model: Model) -> int:
    """How many guesses a step may have where a constraint leaves no choice and nobody has said how many: on a GPU
    none, since it has not been measured there."""
    return FORCED if can_speculate(model) and model.info.device == "CPU" else 0


class Guessed(NamedTuple):
    """A sequence's part of a step with guesses.

    tokens: int32 [n], of which the last are the guess's.  logits: float32 [n or more, n_vocab], written; None where
    there are no guesses and nobody wants them.
    """

    sequence: Sequence
    how: How
    tokens: Ids
    guess: Guess
    logits: Logits | None


def speculate(model: Model, inputs: Row[Guessed]) -> list[int]:
    """Append the tokens of each, and the guesses that are right.  -> how many guesses those are."""
    raw = (capi.SpeculateInput * len(inputs))()
    with model.running() as (api, handle):
        for entry, (sequence, how, tokens, guess, logits) in zip(raw, inputs, strict=True):
            entry.sequence, entry.how = sequence.handle, capi.pointer_to(how)
            entry.tokens, entry.n_tokens, entry.n_guesses = tokens.ctypes.data, len(tokens), len(guess.ids)
            entry.logits = None if logits is None else logits.ctypes.data
            entry.allowed = None if guess.allowed is None else guess.allowed.ctypes.data
        goes_on = all(len(one.tokens) == 1 + len(one.guess.ids) for one in inputs)
        with model.recording([(one.sequence, one.tokens) for one in inputs], "decode" if goes_on else None):
            model.check(api.speculate(handle, raw, len(inputs)))
        return [int(entry.n_right) for entry in raw]
