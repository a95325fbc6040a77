"""Pages of the KV cache: who needs how many, and those of texts that have ended, kept for others that begin alike."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Tokens
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from llmc.runtime.binding import Ids, Model
    from llmc.runtime.sequence import Sequence
    from llmc.runtime.serve.job import Job

MAX_KEPT = 64
"""Ended texts that are kept: each holds memory for logits besides its pages."""


class Kept(NamedTuple):
    """The tokens of a sequence, int32 [n], which fills its pages."""

    ids: Ids
    sequence: Sequence


class Pages:
    """The KV cache of a model in pages of `size` tokens."""

    def __init__(self, model: Model, size: int) -> None:
        self.model, self.size = model, size
        self.total = model.info.kv_tokens // size
        self._kept: list[Kept] = []  # the one used last at the end

    def of(self, n_tokens: int) -> int:
        """Pages that so many tokens of a sequence take."""
        return -(-n_tokens // self.size)

    @property
    def n_free(self) -> int:
        """Pages that no sequence holds."""
        return self.model.info.kv_tokens_free // self.size

    def growth(self, job: Job, n_tokens: int) -> int:
        """Pages that so many tokens more of a job may take."""
        copies = 1 if job.shares_tail and job.n_fed % self.size else 0
        return self.of(job.n_fed + n_tokens) - self.of(job.n_fed) + copies

    def make_room(self, n_pages: int) -> bool:
        """Whether so many pages are free; ended texts are given up for them, the one unused longest first."""
        while self.n_free < n_pages:
            if not self._kept:
                return False
            self._kept.pop(0).sequence.close()
        return True

    def keep(self, job: Job) -> None:
        """Take over what an ended job has in full pages, unless another one has the same."""
        n = job.n_fed - job.n_fed % self.size
        sequence, job.sequence = job.sequence, None
        if sequence is None:
            return
        ids = as_ids(job.ids[:n])
        longer = next((kept for kept in self._kept if n and common(kept.ids, ids) == n), None)
        if n == 0 or longer is not None:
            sequence.close()
            if longer is not None:
                self._use(longer)
            return
        sequence.truncate(n)
        shorter = [kept for kept in self._kept if common(kept.ids, ids) == len(kept.ids)]
        for kept in shorter:
            self._drop(kept)
        self._kept.append(Kept(ids, sequence))
        if len(self._kept) > MAX_KEPT:
            self._drop(self._kept[0])

    def begin(self, job: Job, running: Iterable[Job]) -> None:
        """Give a job its sequence: empty, or a fork of one that begins with the same full pages."""
        ids = as_ids([] if job.has_to_score else job.ids[:-1])  # the others' logits are not wanted
        kept = max(self._kept, key=lambda kept: common(kept.ids, ids), default=None)
        n, source = (common(kept.ids, ids), kept.sequence) if kept else (0, None)
        for other in running:
            n_common = common(as_ids(other.ids[: other.n_fed]), ids)
            if other.sequence is not None and n_common > n:
                n, source = n_common, other.sequence
        n -= n % self.size
        if source is None or n == 0:
            job.sequence = self.model.sequence()
            return
        if kept is not None and source is kept.sequence:
            self._use(kept)
        job.sequence = source.fork()
        job.sequence.truncate(n)
        job.n_fed = n

    def clear(self) -> None:
        """Give up all that is kept."""
        for kept in self._kept:
            kept.sequence.close()
        self._kept.clear()

    def _use(self, kept: Kept) -> None:
        self._remove(kept)
        self._kept.append(kept)

    def _drop(self, kept: Kept) -> None:
        self._remove(kept)
        kept.sequence.close()

    def _remove(self, kept: Kept) -> None:
        self._kept = [other for other in self._kept if other is not kept]


def as_ids(tokens: Tokens[int]) -> Ids:
    return np.array(tokens, dtype=np.int32)


def common(first: Ids, second: Ids) -> int:
    """How many tokens two texts begin with in common."""
    n = min(len(first), len(second))
    differs = first[:n] != second[:n]
    return int(differs.argmax()) if differs.any() else n
