"""Guesses at what the texts of a step go on with: see runtime/speculate.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from llmc.runtime.speculate import Guessed, Guesser, Pace, PromptLookup, check_runtime, speculate

if TYPE_CHECKING:
    from llmc.runtime.binding import Model
    from llmc.runtime.serve.job import Job

Of: TypeAlias = Mapping["Job", list[int]]

LIGHT_STEP = 8
"""Tokens of a step that take little longer than one.  On paper: a 7B model in bf16 multiplies 8 tokens in 0.2 s (460
Gop/s) on a CPU that reads the weights in 0.4 (35 GB/s)."""


class Lookup:
    """One text's guesses, from what it has said before."""

    def __init__(self, most: int) -> None:
        self.guesser: Guesser = PromptLookup()
        self.pace = Pace(most)


class Guesses:
    """The guesses of all texts, which share what a light step has room for."""

    def __init__(self, model: Model, most: int) -> None:
        """most: guesses of a text in a step; 0: none.  Raises LlmcError for an artifact that is older than them."""
        self.model, self.most = model, most
        self._n_tokens = max(LIGHT_STEP, 1 + most) if most else 0
        if most:
            check_runtime(model)
        self._logits = np.empty((self._n_tokens, model.info.n_vocab), np.float32)

    def of(self, inputs: Iterable[tuple[Job, int]]) -> Of:
        """What may follow in a step's texts: of those that go on, and are asked for in a way that guesses know."""
        if not self.most:
            return {}
        ongoing = [job for job, _ in inputs if job.n_pending == 1 and job.n_said]
        room = self._n_tokens // max(1, len(ongoing)) - 1
        found = {job: self._guess(job, room) for job in ongoing if room > 0 and can_guess(job)}
        return {job: guesses for job, guesses in found.items() if guesses}

    def _guess(self, job: Job, room: int) -> list[int]:
        if job.lookup is None:
            job.lookup = Lookup(self.most)
        most = min(room, job.lookup.pace.next, job.most - job.n_said - 1)
        return job.lookup.guesser.guess(job.ids, job.ask.how, most) if most > 0 else []

    def step(self, inputs: Sequence[tuple[Job, int]], guesses: Of) -> dict[Job, list[int]]:
        """A step with guesses.  -> those that are right."""
        entries, n_used = [], 0
        for job, n in inputs:
            assert job.sequence is not None
            guessed = guesses.get(job, [])
            ids = np.append(job.next_ids(n), np.array(guessed, np.int32))
            rows = self._logits[n_used : n_used + len(ids)] if guessed else None
            n_used += len(ids) if guessed else 0
            entries.append(Guessed(job.sequence, job.ask.how, ids, len(guessed), rows))
        n_right = speculate(self.model, entries)
        right = {job: guesses.get(job, [])[:n] for (job, _), n in zip(inputs, n_right, strict=True)}
        for job, guessed in guesses.items():
            assert job.lookup is not None
            job.lookup.pace.learn(len(guessed), len(right[job]))
        return right


def can_guess(job: Job) -> bool:
    """Not where a token's logits are looked at, or changed, before the next one is chosen."""
    return job.constraint is None and job.ask.n_top is None and job.ask.how.is_plain and not job.has_to_go_on
