"""Generating: feed the prompt, then sample and feed a token at a time."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterable, Iterator, Mapping
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
    from llmc.runtime.images import Pictured
    from llmc.runtime.prompt_cache import PromptCache
    from llmc.runtime.sequence import Sequence
    from llmc.runtime.speculate import Speculation

Stop = Literal["eos", "length", "context", "grammar"]
Mask = npt.NDArray[np.uint32]
LARGEST = 3.4e38
"""Larger numbers are infinite in float32."""


class History:
    """The tokens of a text so far, for penalties: n_prompt that were given, then those that were generated."""

    def __init__(self, prompt: Iterable[int] = ()) -> None:
        self._ids = np.empty(0, np.int32)  # [n], and room for more
        self.n = self.n_prompt = 0
        self.ask(prompt)

    def ask(self, prompt: Iterable[int]) -> None:
        """Append more of a prompt; what was generated before it counts as given from now on."""
        self._append(np.fromiter(prompt, np.int32))
        self.n_prompt = self.n

    def take(self, token: int) -> None:
        """Append a token that was generated."""
        self._append(np.array([token], np.int32))

    @property
    def ids(self) -> npt.NDArray[np.int32]:
        """All tokens, int32 [n]: a view that holds until the next token is appended."""
        return self._ids[: self.n]

    def _append(self, ids: npt.NDArray[np.int32]) -> None:
        if self.n + len(ids) > len(self._ids):
            self._ids = np.concatenate((self.ids, ids, np.empty(self.n + 64, np.int32)))
        else:
            self._ids[self.n : self.n + len(ids)] = ids
        self.n += len(ids)


@dataclass(frozen=True)
class How:
    """How the next token is chosen; see llmc_sampling in include/llmc.h.

    temperature: divides the logits; 0 takes the most likely.  top_k: keep the k most likely (0: all).
    top_p: then the smallest set whose probability reaches p.  seed: with the token's position decides the draw.
    min_p: then those that are at least so many times as likely as the most likely.
    logit_bias: (token, what is added to its logit), for some tokens.  repetition_penalty: divides the logits of tokens
    that the text has, its prompt included, or multiplies those below 0.  presence_penalty: is subtracted from those of
    tokens that were generated, frequency_penalty for each time that they were.
    allowed: uint32 [(n_vocab + 31) / 32], contiguous, a bit for each token, the lowest first: those whose bit is 0 are
    never chosen; None: all are allowed.  history: what the penalties look back to; a Generation has its own.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed: Mask | None = field(default=None, compare=False)
    history: History | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise LlmcError(f"the temperature is {self.temperature}", hint="0 is greedy, 1 samples as trained")
        if self.top_k < 0:
            raise LlmcError(f"top-k is {self.top_k}", hint="0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise LlmcError(f"top-p is {self.top_p}", hint="a probability above 0; 1 keeps all tokens")
        if not 0 <= self.seed < 1 << 64:
            raise LlmcError(f"the seed is {self.seed}", hint="0 to 2**64 - 1")
        if not 0 <= self.min_p <= 1:
            raise LlmcError(f"min-p is {self.min_p}", hint="0 keeps all tokens; at most 1")
        if not 0 < self.repetition_penalty <= LARGEST:
            raise LlmcError(f"the repetition penalty is {self.repetition_penalty}", hint="above 0; 1 is none")
        numbers = {"presence penalty": self.presence_penalty, "frequency penalty": self.frequency_penalty}
        for name, number in [*numbers.items(), *(("logit bias", bias) for _, bias in self.logit_bias)]:
            if not abs(number) <= LARGEST:
                raise LlmcError(f"the {name} is {number}", hint="a number; 0 changes nothing")

    @property
    def looks_back(self) -> bool:
        """Whether the tokens so far matter."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def reshapes(self) -> bool:
        """Whether min-p, biases or penalties ask for something."""
        return bool((self.min_p and self.temperature) or self.logit_bias) or self.looks_back

    @property
    def is_plain(self) -> bool:
        """Whether a GPU's sampler knows all that is asked for, and so does every artifact's runtime."""
        return self.allowed is None and not self.reshapes

    def after(self, history: History) -> How:
        """The same, looking back to these tokens."""
        return replace(self, history=history)

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
    def choose(
        cls,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int | None,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
    ) -> How:
        """The settings, with a seed drawn here if none is given."""
        drawn = random.getrandbits(32) if seed is None else seed
        biases = tuple((logit_bias or {}).items())
        penalties = repetition_penalty, presence_penalty, frequency_penalty
        return cls(temperature, top_k, top_p, drawn, min_p, *penalties, biases)


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
        history: History | None = None,
        speculation: Speculation | None = None,
        cache: PromptCache | None = None,
        adapter: str | None = None,
    ) -> None:
        """`sequence`: continue this one, which stays open; otherwise one of its own, closed at the end.  It then has
        what was said up to the last token; or nothing, where a state went further with guesses.
        constraint: what the text has to look like.  history: what is in the sequence already; grows with the text where
        penalties look back.  speculation: guesses at the text; not asked where there are penalties or biases.
        cache: may know the prompt's first tokens, where there is no sequence; a file that could not be written is told
        of when all is said.  adapter: of a sequence of its own."""
        self.model, self.prompt, self.max_tokens, self.how = model, prompt, max_tokens, how
        self.ignore_eos, self.constraint, self.adapter = ignore_eos, constraint, adapter
        self.tokens: list[int] = []
        self.stop: Stop | None = None
        self.pictured: Pictured | None = None  # its pictures' rows are there as long as this is
        self.prefill_s = self.decode_s = 0.0
        if not prompt:
            raise LlmcError("the prompt has no tokens", place=str(model.path), hint="give at least one token")
        if sequence is not None and sequence.model is not model:
            raise LlmcError("the sequence is another model's", place=str(model.path))
        model.check_length(len(prompt) + (sequence.length if sequence else 0))
        self._text = [*(history.ids.tolist() if history else ()), *prompt]  # with what is said
        self._history = (history or History()) if how.looks_back else None
        self._how = how
        if self._history is not None:
            self._history.ask(prompt)
            self._how = how.after(self._history)
        self._sequence = sequence
        # A step on a token that ends the text could not be taken back from a state that others go on from.
        self._runs_ahead = model.runs_ahead and not (sequence is not None and model.has_states)
        self.speculation = speculation if how.is_plain else None
        self._is_fed = False  # the last token is part of the sequence
        self._right: list[int] = []  # guesses that are, and are the next tokens
        self.cache = cache
        self._steps = self._run()

    def __next__(self) -> int:
        return next(self._steps)

    def close(self) -> None:
        """Stop early."""
        self._steps.close()

    @property
    def prefill_tokens_per_s(self) -> float:
        n_read = len(self.prompt) - (self.cache.n_found if self.cache else 0)
        return n_read / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        return (len(self.tokens) - 1) / self.decode_s if self.decode_s else 0.0

    def _run(self) -> Generator[int, None, None]:
        model, own = self.model, None
        n_fed = self._sequence.length if self._sequence else 0  # of the tokens that the caller finds in it afterwards
        try:
            start = perf_counter()
            sequence = self._sequence or (
                own := self.cache.read(model, self.prompt, self.adapter) if self.cache else model.sequence(self.adapter)
            )
            sequence.feed(self.prompt[sequence.length - n_fed :])
            n_fed += len(self.prompt)
            most = min(self.max_tokens, model.info.n_context - n_fed + 1)
            if most < 1:
                self.stop, self.prefill_s = "length", perf_counter() - start
            while self.stop is None:
                token = self._next(sequence, most - len(self.tokens))
                arrived = perf_counter()
                if self.tokens:
                    self.decode_s += arrived - start
                    n_fed += 1
                else:
                    self.prefill_s = arrived - start
                self.tokens.append(token)
                self._text.append(token)
                self.stop = self._why_stop(token, most)
                if self.stop == "eos":
                    self._take_back(sequence, n_fed)
                elif self._history is not None:
                    self._history.take(token)
                yield token
                start = arrived if self._runs_ahead else perf_counter()
        finally:
            if self.speculation is not None:
                self.speculation.close()
            if own is not None:
                own.close()
            if self._sequence is not None:
                self._take_back(self._sequence, n_fed)
        if self.cache is not None:
            self.cache.check()

    def _next(self, sequence: Sequence, n_left: int) -> int:
        """The next token; the step on it is under way already unless it is known to be the last, or refused: then the
        token is here all the same, and the refusal comes when the next one is asked for."""
        if self.tokens and not self._is_fed:
            self._feed(sequence, n_left)
        if self._right:
            self._is_fed = True
            if self.constraint is not None:
                self.constraint.take(self._right[0])
            return self._right.pop(0)
        if self.constraint is not None:
            self._is_fed = False
            token = sequence.sample(self._how.among(self.constraint.allowed()))
            self.constraint.take(token)
            return token
        self._is_fed = self._runs_ahead and n_left > 1 and self._how.is_plain and self.speculation is None
        if not self._is_fed:
            return sequence.sample(self._how)
        try:
            return self.model.advance([(sequence, self._how)])[0]
        except LlmcError as refused:
            self._is_fed = False
            try:
                return sequence.sample(self._how)
            except LlmcError:
                raise refused from None

    def _feed(self, sequence: Sequence, n_left: int) -> None:
        """The last token, and guesses at the next ones, of which n_left may still be said."""
        if self.speculation is None:
            sequence.feed(self.tokens[-1:])
            return
        self._right = self.speculation.feed(sequence, self._text, self._how, n_left - 1, self.constraint)

    def _take_back(self, sequence: Sequence, n: int) -> None:
        """Leave the n tokens whose successors the caller has been given; drop what runs ahead of the caller."""
        with suppress(LlmcError):  # closed meanwhile
            sequence.cut(n)

    def _why_stop(self, token: int, most: int) -> Stop | None:
        """most: tokens that may be said before max_tokens or the context ends them."""
        if not self.ignore_eos and self.model.is_eos(token):
            return "eos"
        if self.constraint is not None and self.constraint.is_over:
            return "grammar"
        if len(self.tokens) < most:
            return None
        return "length" if most == self.max_tokens else "context"
