"""Pages of the KV cache: who needs how many, and those of texts that have ended, kept for others that begin alike.

A model with states has a slot for each sequence too.  A state is that behind a whole text: so of a text that has ended
all of it is kept, for others that begin with all of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llmc.runtime.sequence import as_ids, common

if TYPE_CHECKING:
    from llmc.runtime.binding import Model
    from llmc.runtime.runner import Ids
    from llmc.runtime.sequence import Sequence
    from llmc.runtime.serve.job import Job
    from llmc.runtime.serve.stored_texts import StoredTexts

MAX_KEPT = 64
"""Ended texts that are kept: each holds memory for logits besides its pages."""


class Kept(NamedTuple):
    """The tokens of a sequence, int32 [n], which fills its pages, unless it has a state or ends with a picture; and its
    adapter, whose keys and values they are."""

    ids: Ids
    sequence: Sequence
    adapter: str | None = None


class Pages:
    """The KV cache of a model in pages of `size` tokens."""

    def __init__(self, model: Model, size: int) -> None:
        self.model, self.size = model, size
        self.total = model.info.kv_tokens // size
        self.most_kept = MAX_KEPT
        self._uncut = model.info.whole
        self._kept: list[Kept] = []  # the one used last at the end

    def of(self, n_tokens: int) -> int:
        """Pages that so many tokens of a sequence take."""
        return -(-n_tokens // self.size)

    @property
    def n_free(self) -> int:
        """Pages that no sequence holds."""
        return self.model.info.kv_tokens_free // self.size

    @property
    def n_free_slots(self) -> int:
        """Slots for states that no sequence holds."""
        return self.model.info.n_slots_free

    def slots(self, job: Job) -> int:
        """Slots that a job and its followers may still take."""
        if not self.model.has_states:
            return 0
        return len(job.followers) + (job.n_fed == 0 or job.shares_tail)

    def growth(self, job: Job, n_tokens: int) -> int:
        """Pages that so many tokens more of a job may take."""
        copies = 1 if job.shares_tail and job.n_fed % self.size else 0
        return self.of(job.n_fed + n_tokens) - self.of(job.n_fed) + copies

    def make_room(self, n_pages: int, n_slots: int = 0) -> bool:
        """Whether so many pages and slots are free; ended texts are given up for them, the one unused longest first."""
        while self.n_free < n_pages or self.n_free_slots < n_slots:
            if not self._kept:
                return False
            self._kept.pop(0).sequence.close()
        return True

    def keep(self, job: Job) -> None:
        """Take over what an ended job has in full pages, or its state, unless another one has the same."""
        n = job.n_fed if self.model.has_states else self._shared(job, job.n_fed)
        sequence, job.sequence = job.sequence, None
        if sequence is None:
            return
        if self.model.is_whole:  # another text begins with other numbers, however alike the two are
            sequence.close()
            return
        if self.model.has_states:
            self._keep_state(as_ids(job.ids[:n]), sequence, job.ask.adapter)
            return
        ids, alike = as_ids(job.ids[:n]), self._kept_of(job.ask.adapter)
        longer = next((kept for kept in alike if n and common(kept.ids, ids) == n), None)
        if n == 0 or longer is not None:
            sequence.close()
            if longer is not None:
                self._use(longer)
            return
        ids = ids[: sequence.cut(n)]
        if len(ids) == 0:
            sequence.close()
            return
        shorter = [kept for kept in alike if common(kept.ids, ids) == len(kept.ids)]
        for kept in shorter:
            self._drop(kept)
        self._add(Kept(ids, sequence, job.ask.adapter))

    def _kept_of(self, adapter: str | None) -> list[Kept]:
        """The kept texts that went through an adapter; None: through the model alone."""
        return [kept for kept in self._kept if kept.adapter == adapter]

    def _keep_state(self, ids: Ids, sequence: Sequence, adapter: str | None) -> None:
        """The same with a state, unless it went beyond these tokens with guesses."""
        if len(ids) == 0 or sequence.length != len(ids):
            sequence.close()
            return
        for kept in [kept for kept in self._kept_of(adapter) if np.array_equal(kept.ids, ids)]:
            self._drop(kept)
        self._add(Kept(ids, sequence, adapter))

    def _add(self, kept: Kept) -> None:
        self._kept.append(kept)
        while len(self._kept) > self.most_kept:
            self._drop(self._kept[0])

    def begin(self, job: Job, running: Iterable[Job]) -> None:
        """Give a job its sequence: empty, or a fork of one of the same adapter that begins with the same full pages, or
        whose state is that behind the job's first tokens."""
        adapter = job.ask.adapter
        running = [other for other in running if other.ask.adapter == adapter]
        shares = not job.wants_rows and not self.model.is_whole  # the others' logits are not wanted
        ids = as_ids(job.ids[:-1] if shares else [])
        if self.model.has_states:
            self._begin_at_state(job, ids, running)
            return
        kept = max(self._kept_of(adapter), key=lambda kept: common(kept.ids, ids), default=None)
        n, source = (common(kept.ids, ids), kept.sequence) if kept else (0, None)
        leader: Job | None = None
        for other in running:
            n_common = common(as_ids(other.ids[: other.n_fed]), ids)
            if other.sequence is not None and n_common > n:
                n, source, leader = n_common, other.sequence, other
        n = self._shared(job, n)
        if source is None or n == 0:
            job.sequence = self.model.sequence(adapter)
            return
        if kept is not None and source is kept.sequence:
            self._use(kept)
        job.sequence = source.fork()
        job.n_fed = job.sequence.cut(n)
        for each in (job, leader):  # behind a picture, within a page: whoever goes on first copies that
            if each is not None and job.n_fed % self.size:
                each.shares_tail = True

    def _shared(self, job: Job, n: int) -> int:
        """At most n: how many of a job's first n tokens others may have too: those that fill pages, and the rest of a
        picture that a page would cut, if it is among the n."""
        full = n - n % self.size
        whole = self._uncut(job.ids, full)
        return whole if whole <= n else full

    def _begin_at_state(self, job: Job, ids: Ids, running: Iterable[Job]) -> None:
        adapter = job.ask.adapter
        found = [kept for kept in self._kept_of(adapter) if common(kept.ids, ids) == len(kept.ids)]
        kept = max(found, key=lambda kept: len(kept.ids), default=None)
        n, source = (len(kept.ids), kept.sequence) if kept else (0, None)
        leader: Job | None = None
        for other in running:
            if n < other.n_fed == common(as_ids(other.ids[: other.n_fed]), ids):
                n, source, leader = other.n_fed, other.sequence, other
        if leader is not None:
            leader.shares_tail = True
        elif kept is not None:
            self._use(kept)
        job.sequence = self.model.sequence(adapter) if source is None else source.fork()
        job.n_fed, job.shares_tail = n, n > 0

    def restore(self, stored: StoredTexts) -> None:
        """Keep the texts of a server that was here before."""
        for sequence in reversed(stored.restore(self.most_kept)):
            self._kept.append(Kept(as_ids(sequence.tokens), sequence, sequence.adapter))

    def save(self, stored: StoredTexts) -> None:
        """Have the next server keep these, but for those with pictures, whose rows it will not have."""
        n_ids = self.model.info.n_ids
        stored.save(kept.sequence for kept in reversed(self._kept) if kept.ids.max(initial=0) < n_ids)

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


def whole_texts(jobs: Iterable[Job], most: int) -> list[tuple[Job, int]]:
    """The first jobs whose texts have together at most so many tokens; each is read whole."""
    found: list[tuple[Job, int]] = []
    for job in jobs:
        if job.n_pending > most:
            break
        found.append((job, job.n_pending))
        most -= job.n_pending
    return found
