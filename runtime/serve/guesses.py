"""Guesses at what the texts of a step go on with: see runtime/speculate.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from llmc.runtime.speculate import (
    FORCED,
    DraftModel,
    Guess,
    Guessed,
    Guesser,
    PromptLookup,
    TextGuesses,
    check_runtime,
    check_vocabulary,
    n_forced,
    speculate,
)

if TYPE_CHECKING:
    from llmc.runtime.binding import Model
    from llmc.runtime.serve.job import Job

ByJob: TypeAlias = Mapping["Job", Guess]

LIGHT_STEP = 1 + FORCED
"""Tokens of a step that take little longer than one.  On paper: a 7B model in bf16 multiplies 8 tokens in 0.2 s (460
Gop/s) on a CPU that reads the weights in 0.4 (35 GB/s)."""
DRAFT_CHUNK = 64
"""Tokens of a prompt that a draft model reads between two steps, which wait for it."""
NONE = Guess([])


class Guesses:
    """The guesses of all texts, which share what a light step has room for."""

    def __init__(self, model: Model, most: int, draft: Model | None = None) -> None:
        """most: guesses of a text in a step; 0: of those that follow a grammar alone.  draft: who guesses, instead of
        the texts themselves; the caller keeps it open.  Raises LlmcError: an artifact that is older than guesses, a
        draft of another vocabulary."""
        if most:
            check_runtime(model)
        if draft is not None:
            check_vocabulary(draft, model)
        self.model, self.most, self.n_forced = model, most, n_forced(model)
        self._draft, self.draft_chunk = draft, DRAFT_CHUNK
        self._n_tokens = max(LIGHT_STEP, 1 + most) if most or self.n_forced else 0
        self._logits = np.empty((self._n_tokens, model.info.n_vocab), np.float32)

    def of(self, inputs: Sequence[tuple[Job, int]]) -> ByJob:
        """Guesses for the texts of a step: those that go on, and whose way of choosing tokens allows guessing."""
        if not self.most and all(job.constraint is None for job, _ in inputs):
            return {}
        ongoing = [job for job, _ in inputs if job.n_pending == 1 and job.n_said]
        room = self._n_tokens // max(1, len(ongoing)) - 1
        found = {job: self._guess(job, room) for job in ongoing if room > 0 and self._can_guess(job)}
        return {job: guess for job, guess in found.items() if guess.ids}

    def _can_guess(self, job: Job) -> bool:
        """Not where a token's logits are looked at, or changed, before the next one is chosen."""
        if job.ask.n_top is not None or not job.ask.how.is_plain or job.has_to_go_on or job.may_think_too_long:
            return False
        if job.constraint is None:
            return self.most > 0
        return job.ask.thinking is None and (self.most or self.n_forced) > 0

    def _guess(self, job: Job, room: int) -> Guess:
        if job.guesses is None:
            job.guesses = TextGuesses(self._guesser(), self.most or self.n_forced)
        return job.guesses.guess(job.ids, job.ask.how, min(room, job.most - job.n_said - 1), job.constraint)

    def _guesser(self) -> Guesser | None:
        if not self.most:
            return None
        return (
            PromptLookup(self.model.info.n_vocab)
            if self._draft is None
            else DraftModel(self._draft, self.model, self.draft_chunk)
        )

    def step(self, inputs: Sequence[tuple[Job, int]], guesses: ByJob) -> dict[Job, list[int]]:
        """A step with guesses.  -> those that are right."""
        entries, n_used = [], 0
        for job, n in inputs:
            assert job.sequence is not None
            guess = guesses.get(job, NONE)
            ids = np.append(job.next_ids(n), np.array(guess.ids, np.int32))
            rows = self._logits[n_used : n_used + len(ids)] if guess.ids else None
            n_used += len(ids) if guess.ids else 0
            entries.append(Guessed(job.sequence, job.ask.how, ids, guess, rows))
        n_right = speculate(self.model, entries)
        right = {job: guesses[job].ids[:n] for (job, _), n in zip(inputs, n_right, strict=True) if job in guesses}
        for job, guess in guesses.items():
            assert job.guesses is not None
            job.guesses.learn(len(guess.ids), len(right[job]))
        return right
