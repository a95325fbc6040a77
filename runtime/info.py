"""What a model says of itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llmc.runtime import capi
from llmc.runtime.errors import LlmcError, shortened

if TYPE_CHECKING:
    from llmc.runtime.generation import How

MOST_IDS = 1 << 31
"""Numbers of tokens and of rows that stand for them are int32."""


class Info(NamedTuple):
    """Facts about a model; see llmc_info in include/llmc.h.  Counts are in elements."""

    n_vocab: int
    n_context: int
    n_threads: int
    max_step_tokens: int
    bos_token: int
    weight_bytes: int
    kv_bytes_per_token: int
    kv_tokens: int
    kv_tokens_free: int
    device: str
    program: int
    page_tokens: int
    sampling_bytes: int
    n_slots: int
    n_slots_free: int
    slot_bytes: int
    n_tokens: int
    is_whole: int
    n_types: int
    n_adapters: int
    n_row: int
    tile: tuple[int, int, int]
    n_tile_rows: int
    picture_rows: int
    n_rows: int
    patch: int
    merge: int
    most_rows: int

    @property
    def n_ids(self) -> int:
        """How many different tokens there are: columns of the logits, but where these are what a text is made into; of
        each type so many as there are of the first."""
        return (self.n_tokens or self.n_vocab) * max(self.n_types, 1)

    def check_how(self, how: How, place: str) -> None:
        """Raise LlmcError where it asks for what the artifact's runtime does not heed, or is of another vocabulary."""
        if how.allowed is not None:
            self.check_masks(place)
            how.check_mask(self.n_vocab)
        if how.reshapes:
            self.check_penalties(place)

    def check_ids(self, tokens: Iterable[int], place: str) -> npt.NDArray[np.int32]:
        """int32 [n], contiguous.  Raises LlmcError naming the first token that is out of range; the runtime knows which
        rows there are that stand for tokens."""
        listed, n_ids = list(tokens), self.n_ids
        limit = MOST_IDS if self.n_row else n_ids
        for index, token in enumerate(listed):
            if not hasattr(token, "__index__") or not 0 <= token < limit:  # neither 1.5 nor "a"
                where, hint = f"{place} (token {index + 1} of {len(listed)})", f"ids go from 0 to {n_ids - 1}"
                raise LlmcError(f"token {shortened(token)} is out of range", place=where, hint=hint)
        return np.array(listed, dtype=np.int32)

    def whole(self, ids: Sequence[int] | npt.NDArray[np.int32], n: int) -> int:
        """How many ids to read where n are to be: more, so that no picture is cut whose rows see each other."""
        if not self.picture_rows or n >= len(ids) or ids[n] < self.n_ids:
            return n
        place = (int(ids[n]) - self.n_ids) % self.picture_rows
        return n + (self.picture_rows - place if place else 0)

    def check_length(self, n_tokens: int, place: str) -> None:
        """Raise LlmcError when a sequence cannot hold so many tokens."""
        if n_tokens > self.n_context:
            fact = f"the text is {n_tokens} tokens long; this artifact's context holds {self.n_context}"
            raise LlmcError(fact, place=place, hint="shorten it, or compile with a larger --max-seq")

    def check_masks(self, place: str) -> None:
        """Raise LlmcError when the artifact's runtime does not heed which tokens are allowed."""
        self._check_sampling(capi.Sampling.allowed, "choose among some tokens only", place)

    def check_penalties(self, place: str) -> None:
        """Raise LlmcError when the artifact's runtime does not heed min-p, penalties and biases."""
        self._check_sampling(capi.Sampling.presence_penalty, "heed min-p, penalties or logit biases", place)

    def _check_sampling(self, field: Any, what: str, place: str) -> None:
        if self.sampling_bytes < field.offset + field.size:  # fields may follow it some day
            fact, hint = f"the artifact's runtime cannot {what}", "compile the model again with this llmc"
            raise LlmcError(fact, place=place, hint=hint)

    @classmethod
    def of(cls, raw: capi.Info) -> Info:
        known = {"device": (raw.device or b"CPU").decode("utf-8", "replace"), "tile": tuple(raw.tile)}
        return cls._make(known[name] if name in known else getattr(raw, name) for name in cls._fields)
