"""Generating: feed the prompt, then sample and feed a token at a time."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from llmc.runtime.errors import LlmcError

if TYPE_CHECKING:
    from llmc.runtime.binding import Model
    from llmc.runtime.grammar import Constraint
    from llmc.runtime.sequence import Sequence

Stop = Literal["eos", "length", "context", "grammar"]
Mask = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class How:
    """How the next token is chosen; see llmc_sampling in include/llmc.h.

    temperature: divides the logits; 0 takes the most likely.  top_k: keep the k most likely (0: all).
    top_p: then the smallest set whose probability reaches p.  seed: with the token's position decides the draw.
    allowed: uint32 [(n_vocab + 31) / 32], contiguous, a bit for each token, the lowest first: those whose bit is 0 are
    never chosen; None: all are allowed.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    allowed: Mask | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise LlmcError(f"the temperature is {self.temperature}", hint="0 is greedy, 1 samples as trained")
        if self.top_k < 0:
            raise LlmcError(f"top-k is {self.top_k}", hint="0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise LlmcError(f"top-p is {self.top_p}", hint="a probability above 0; 1 keeps all tokens")
        if not 0 <= self.seed < 1 << 64:
            raise LlmcError(f"the seed is {self.seed}", hint="0 to 2**64 - 1")

    def among(self, allowed: Mask) -> How:
        """The same, of the allowed tokens alone."""
        return replace(self, allowed=allowed)

    def check_mask(self, n_vocab: int) -> None:
        """Raise LlmcError for allowed tokens of another vocabulary's size."""
        mask, n_words = self.allowed, -(-n_vocab // 32)
        if mask is not None and not (mask.dtype == np.uint32 and mask.shape == (n_words,) and mask.flags.c_contiguous):
            fact = f"the allowed tokens are {mask.dtype}{list(mask.shape)}, not uint32[{n_words}] in a row"
            raise LlmcError(fact, place="How.allowed")

    @classmethod
    def choose(cls, temperature: float, top_k: int, top_p: float, seed: int | None) -> How:
        """With a seed drawn here when none is given."""
        return cls(temperature, top_k, top_p, random.getrandbits(32) if seed is None else seed)


GREEDY = How()


class Generation(Iterator[int]):
    """The tokens that follow a prompt, computed as they are asked for; on a GPU the next one is on its way already.

    tokens: generated so far, the end token included.  stop: why it ended ("eos", "length": max_tokens reached,
    "context": the sequence is full, "grammar": it is whole, and nothing can follow), None until then.
    prefill_s: until the first token was known.  decode_s: for those after it; without the time the caller takes between
    them, but where the model runs ahead it is the time from one token's arrival to the next one's, as the caller's time
    is the step's too.
    """

    def __init__(
        self,
        model: Model,
        prompt: list[int],
        max_tokens: int,
        how: How,
        ignore_eos: bool = False,
        sequence: Sequence | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        """`sequence`: continue this one, which stays open; otherwise one of its own, closed at the end.
        constraint: what the text has to look like."""
        self.model, self.prompt, self.max_tokens, self.how = model, prompt, max_tokens, how
        self.ignore_eos, self.constraint = ignore_eos, constraint
        self.tokens: list[int] = []
        self.stop: Stop | None = None
        self.prefill_s = self.decode_s = 0.0
        if not prompt:
            raise LlmcError("the prompt has no tokens", place=str(model.path), hint="give at least one token")
        model.check_length(len(prompt) + (sequence.length if sequence else 0))
        self._sequence = sequence
        self._is_fed = False  # the last token is part of the sequence
        self._steps = self._run()

    def __next__(self) -> int:
        return next(self._steps)

    def close(self) -> None:
        """Stop early."""
        self._steps.close()

    @property
    def prefill_tokens_per_s(self) -> float:
        return len(self.prompt) / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        return (len(self.tokens) - 1) / self.decode_s if self.decode_s else 0.0

    def _run(self) -> Generator[int, None, None]:
        model = self.model
        sequence = self._sequence or model.sequence()
        n_fed = sequence.length  # of the tokens that the caller finds in it afterwards
        try:
            start = perf_counter()
            sequence.feed(self.prompt)
            n_fed += len(self.prompt)
            if self.max_tokens < 1:
                self.stop, self.prefill_s = "length", perf_counter() - start
                return
            most = min(self.max_tokens, model.info.n_context - n_fed + 1)
            while True:
                token = self._next(sequence, is_last=len(self.tokens) + 1 == most)
                arrived = perf_counter()
                if self.tokens:
                    self.decode_s += arrived - start
                    n_fed += 1
                else:
                    self.prefill_s = arrived - start
                self.tokens.append(token)
                self.stop = self._why_stop(token, most)
                if self.stop == "eos":
                    self._take_back(sequence, n_fed)
                yield token
                if self.stop:
                    return
                start = arrived if model.runs_ahead else perf_counter()
        finally:
            if sequence is self._sequence:
                self._take_back(sequence, n_fed)
            else:
                sequence.close()

    def _next(self, sequence: Sequence, is_last: bool) -> int:
        """The next token; the step on it is under way already unless it is known to be the last, or refused: then the
        token is here all the same, and the refusal comes when the next one is asked for."""
        if self.tokens and not self._is_fed:
            sequence.feed(self.tokens[-1:])
        if self.constraint is not None:
            self._is_fed = False
            token = sequence.sample(self.how.among(self.constraint.allowed()))
            self.constraint.take(token)
            return token
        self._is_fed = self.model.runs_ahead and not is_last
        if not self._is_fed:
            return sequence.sample(self.how)
        try:
            return self.model.advance([(sequence, self.how)])[0]
        except LlmcError as refused:
            self._is_fed = False
            try:
                return sequence.sample(self.how)
            except LlmcError:
                raise refused from None

    def _take_back(self, sequence: Sequence, n: int) -> None:
        """Leave n tokens, those whose successor was given; what runs ahead of the caller goes."""
        with suppress(LlmcError):  # closed meanwhile
            if sequence.length > n:
                sequence.truncate(n)

    def _why_stop(self, token: int, most: int) -> Stop | None:
        """most: tokens that may be said before max_tokens or the context ends them."""
        if not self.ignore_eos and self.model.is_eos(token):
            return "eos"
        if self.constraint is not None and self.constraint.is_over:
            return "grammar"
        if len(self.tokens) < most:
            return None
        return "length" if most == self.max_tokens else "context"
