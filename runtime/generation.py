"""Generating: feed the prompt, then sample and feed a token at a time."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Literal

from llmc.runtime.errors import LlmcError

if TYPE_CHECKING:
    from llmc.runtime.binding import Model, Sequence

Stop = Literal["eos", "length", "context"]


@dataclass(frozen=True)
class How:
    """How the next token is chosen; see llmc_sampling in include/llmc.h.

    temperature: divides the logits; 0 takes the most likely.  top_k: keep the k most likely (0: all).
    top_p: then the smallest set whose probability reaches p.  seed: with the token's position decides the draw.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise LlmcError(f"the temperature is {self.temperature}", hint="0 is greedy, 1 samples as trained")
        if self.top_k < 0:
            raise LlmcError(f"top-k is {self.top_k}", hint="0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise LlmcError(f"top-p is {self.top_p}", hint="a probability above 0; 1 keeps all tokens")
        if not 0 <= self.seed < 1 << 64:
            raise LlmcError(f"the seed is {self.seed}", hint="0 to 2**64 - 1")

    @classmethod
    def choose(cls, temperature: float, top_k: int, top_p: float, seed: int | None) -> How:
        """With a seed drawn here when none is given."""
        return cls(temperature, top_k, top_p, random.getrandbits(32) if seed is None else seed)


class Generation(Iterator[int]):
    """The tokens that follow a prompt, computed as they are asked for.

    tokens: generated so far, the end token included.  stop: why it ended ("eos", "length": max_tokens reached,
    "context": the sequence is full), None until then.  prefill_s: until the first token was known.
    decode_s: for those after it, without the time the caller takes between them.
    """

    def __init__(
        self,
        model: Model,
        prompt: list[int],
        max_tokens: int,
        how: How,
        ignore_eos: bool = False,
        sequence: Sequence | None = None,
    ) -> None:
        """`sequence`: continue this one, which stays open; otherwise one of its own, closed at the end."""
        self.model, self.prompt, self.max_tokens, self.how = model, prompt, max_tokens, how
        self.ignore_eos = ignore_eos
        self.tokens: list[int] = []
        self.stop: Stop | None = None
        self.prefill_s = self.decode_s = 0.0
        if not prompt:
            raise LlmcError("the prompt has no tokens", place=str(model.path), hint="give at least one token")
        model.check_length(len(prompt) + (sequence.length if sequence else 0))
        self._sequence = sequence
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
        sequence = self._sequence or self.model.sequence()
        try:
            start = perf_counter()
            sequence.feed(self.prompt)
            if self.max_tokens < 1:
                self.stop, self.prefill_s = "length", perf_counter() - start
                return
            token = sequence.sample(self.how)
            self.prefill_s = perf_counter() - start
            while True:
                self.tokens.append(token)
                self.stop = self._why_stop(token, sequence)
                yield token
                if self.stop:
                    return
                start = perf_counter()
                sequence.feed([token])
                token = sequence.sample(self.how)
                self.decode_s += perf_counter() - start
        finally:
            if sequence is not self._sequence:
                sequence.close()

    def _why_stop(self, token: int, sequence: Sequence) -> Stop | None:
        if not self.ignore_eos and self.model.is_eos(token):
            return "eos"
        if len(self.tokens) >= self.max_tokens:
            return "length"
        return "context" if sequence.length >= self.model.info.n_context else None
