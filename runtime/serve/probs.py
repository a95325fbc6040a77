"""Log-probabilities of tokens, from the logits that they were chosen from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from llmc.runtime.binding import Model
    from llmc.runtime.runner import Logits


LEAST = -9999.0
"""Stands for the logarithm of 0, which JSON has no number for, as in the APIs of OpenAI and vLLM."""


class TokenProb(NamedTuple):
    """A token, its text, the natural logarithm of its probability, and the most likely tokens there, best first.

    Probabilities are the model's own: before temperature, top-k and top-p.  The first token of a prompt has none.
    """

    token: int
    text: bytes
    logprob: float | None
    top: tuple[TokenProb, ...] = ()


def token_prob(logits: Logits, token: int, n_top: int, text_of: Callable[[int], bytes]) -> TokenProb:
    """logits: float32 [n_vocab], before the token.  n_top: most likely tokens that are told beside it."""
    logprobs = np.where(np.isnan(logits), -np.inf, logits.astype(np.float64))  # as sampling sees them
    with np.errstate(invalid="ignore", divide="ignore"):
        logprobs -= logprobs.max()
        logprobs -= np.log(np.exp(logprobs).sum())
    logprobs = np.nan_to_num(logprobs, nan=LEAST, neginf=LEAST)
    n_top = min(n_top, len(logprobs))
    best = np.argpartition(-logprobs, n_top - 1)[:n_top] if n_top else np.empty(0, np.int64)
    best = best[np.lexsort((best, -logprobs[best]))]
    top = tuple(TokenProb(int(one), text_of(int(one)), float(logprobs[one])) for one in best)
    return TokenProb(token, text_of(token), float(logprobs[token]), top)


class Texts:
    """The text of each token, of special ones their names, and where there is no tokenizer token_id:17, as vLLM names
    them when it is asked to; on the model's thread."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._known: dict[int, bytes] = {}

    def of(self, token: int) -> bytes:
        if token not in self._known:
            self._known[token] = self._of(token)
        return self._known[token]

    def _of(self, token: int) -> bytes:
        if not self._model.has_tokenizer:
            return f"token_id:{token}".encode()
        return self._model.token_bytes(token) or (self._model.tokenizer.id_to_token(token) or "").encode()
