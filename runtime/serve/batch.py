"""Continuous batching: every step takes what all texts have to be read.

A turn gives each text that is wholly read its next token, then makes one step of what has not been read yet: the new
token of each, and beside them a chunk of the prompts that wait, the oldest first.  So a text joins the others at the
next step, and a long prompt makes their steps longer, but not by more than a chunk.

Texts are admitted in the order they came.  One is when its prompt has room in the KV cache; what it says later may
fill the cache all the same, and then the youngest gives its pages up, goes back to the head of the queue, and is read
again when there is room.  A CPU gives the same bits for any chunks and neighbours, so that nobody can tell; the draws
of a sampled text depend on its seed and the position alone.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from llmc.runtime.errors import LlmcError
from llmc.runtime.serve.guesses import ByJob, Guesses
from llmc.runtime.serve.job import Job, Said
from llmc.runtime.serve.pages import Pages, whole_texts
from llmc.runtime.serve.probs import Texts, TokenProb, token_prob

if TYPE_CHECKING:
    from llmc.runtime.binding import Model
    from llmc.runtime.runner import Logits
    from llmc.runtime.sequence import Sequence as TokenSequence
    from llmc.runtime.serve.meters import Meters

CPU_CHUNK, CPU_PROMPT = 32, 128
"""Most tokens of a step beside texts that go on, and of one that reads prompts alone.  On paper: a 7B model in bf16
multiplies 32 tokens in 0.9 s (460 Gop/s) on a CPU that reads the weights in 0.4 (35 GB/s)."""
GPU_CHUNK = 256
"""On a GPU, where prompts alone take the longest steps there are.  On paper: with 7B weights in bf16 an H200 multiplies
256 tokens in 4.4 ms (776 TFLOP/s) and reads the weights in 3.1 (4.3 TB/s)."""
SCORED_CHUNK = 64
"""Most tokens of a prompt in a step that keeps the logits of each."""
LOOKERS = 4
"""Threads that follow grammars while a GPU makes a step."""


class Batch:
    """The texts of a model, and its steps; for one thread.

    running: admitted, the oldest first.  waiting: the next one first.  news: what their clients are to be told.
    failure: of the last step, if it failed.
    """

    def __init__(self, model: Model, meters: Meters, guesses: Guesses, max_batch: int, chunk: int = 0) -> None:
        """max_batch: most texts in a step.  chunk: tokens of a step beside texts that go on; 0: the default."""
        info = model.info
        on_cpu, longest = info.device == "CPU", info.max_step_tokens
        self.model, self.meters = model, meters
        self.max_batch = min(max_batch, longest)
        self.chunk = min(chunk or (CPU_CHUNK if on_cpu else GPU_CHUNK), longest)
        at_once = CPU_PROMPT if on_cpu and not model.is_whole else longest
        self.prompt_chunk = max(self.chunk, min(at_once, longest))
        self.pages = Pages(model, model.page_tokens)
        self.guesses = guesses
        if model.has_states:  # beside those of all texts, and of as many that guesses are made from
            self.pages.most_kept = max(0, info.n_slots - 2 * self.max_batch)
        self.room = min(info.n_context, self.pages.total * self.pages.size)
        self.running: list[Job] = []
        self.waiting: deque[Job] = deque()
        self.news: list[Said] = []
        self.failure: Exception | None = None
        self._n_vocab, self._whole = info.n_vocab, info.whole
        self._n_steps = 0
        self._may_admit = True  # nothing has changed for the better of the queue's head since it was refused: False
        self._is_end: dict[int, bool] = {}
        self._texts = Texts(model)
        self._lookers = ThreadPoolExecutor(LOOKERS, "llmc-grammar")  # has no thread until it is asked for something

    def turn(self) -> None:
        """The next tokens, and a step."""
        self._forget_cancelled()
        self._admit()
        if not self._run_ahead():
            self._sample()
            self._admit()
            self._feed()

    def fail(self, jobs: Iterable[Job], error: Exception) -> None:
        """End these with an error."""
        for job in list(jobs):
            job.end()
            for one in (job, *job.followers):
                self.news.append(Said(one, error=error))
                self.meters.add("failed")
            if job in self.running:
                self.running.remove(job)
            elif job in self.waiting:
                self.waiting.remove(job)
        self._may_admit = True

    def close(self) -> None:
        """Give up what is kept of ended texts."""
        self._lookers.shutdown()
        self.pages.clear()

    # -- coming and going -------------------------------------------------------

    def _forget_cancelled(self) -> None:
        gone = [job for job in self.running if job.is_cancelled]
        still = [job for job in self.waiting if not job.is_cancelled]
        self.meters.add("cancelled", n_texts(gone) + n_texts(self.waiting) - n_texts(still))
        for job in gone:
            self._end(job)
        for job in self.waiting:
            if job.is_cancelled:
                job.end()
        self._may_admit |= len(still) < len(self.waiting)
        self.waiting = deque(still)

    def _admit(self) -> None:
        """Let those in that have room, in the order they came."""
        while self._may_admit and self.waiting:
            job = self.waiting[0]
            n_slots = self.max_batch - n_texts(self.running)
            try:
                has_begun = 1 + len(job.followers) <= n_slots and self._begin(job)
            except LlmcError as error:
                self.fail([job], error)
                continue
            if not has_begun and not self.running:  # nothing will ever make more room
                self.fail([job], cache_is_full())
                continue
            if not has_begun:
                self._may_admit = False
                return
            self.waiting.popleft()
            insort(self.running, job, key=lambda job: job.number)  # never empty in between: other threads look at it

    def _begin(self, job: Job) -> bool:
        """Give a job a sequence if its tokens fit beside all that the others have still to read."""
        self._find_prefix(job)
        promised = sum(self.pages.growth(other, other.n_pending) for other in self.running)
        spare = 1 + len(job.followers) if self.running else 0
        slots = sum(self.pages.slots(other) for other in (*self.running, job))
        if not self.pages.make_room(promised + self.pages.growth(job, job.n_pending) + spare, slots):
            job.leave()
            return False
        if not job.has_begun:
            job.has_begun = True
            self.meters.add("texts", 1 + len(job.followers))
            self.meters.add("prompt_tokens", len(job.ids))
            self._count_reused(job)
        return True

    def _begin_again(self, job: Job) -> None:
        """Before anything of a job is read: others may have read more of its prompt since it was admitted."""
        if job.looked_at_step == self._n_steps:
            return
        job.leave()
        self._find_prefix(job)
        self._count_reused(job)

    def _find_prefix(self, job: Job) -> None:
        """A sequence for a job, with what another one has of its prompt."""
        self.pages.begin(job, self.running)
        job.looked_at_step = self._n_steps

    def _count_reused(self, job: Job) -> None:
        if not job.n_said and job.n_fed:
            job.n_reused = job.n_fed
            self.meters.add("reused_tokens", job.n_fed)

    def _end(self, job: Job) -> None:
        """A running job goes; what it has read is kept for others."""
        self.running.remove(job)
        self.pages.keep(job)
        job.end()
        self._may_admit = True

    def _give_way(self) -> None:
        """The youngest gives its pages up, and is the next to be admitted."""
        job = self.running[-1]
        if len(self.running) == 1 and job.shares_tail:
            job.shares_tail = False  # those it shared with have ended
            return
        if len(self.running) == 1:
            self.fail([job], cache_is_full())
            return
        self.running.pop()
        job.leave()
        self.waiting.appendleft(job)
        self._may_admit = False
        self.meters.add("preemptions")

    # -- the next tokens --------------------------------------------------------

    def _sample(self) -> None:
        """A token for each job that is wholly read."""
        for job in [job for job in self.running if not job.n_pending and job.followers]:
            self._fork(job)
        for job in [job for job in self.running if not job.n_pending and job.most == 0]:
            if job.ask.embeds is not None and not job.wants_rows:
                job.pool(sequence_of(job).logits()[None])
            job.finish = "length"
            self.news.append(job.tell())
            self._end(job)
        ready = [job for job in self.running if not job.n_pending]
        if not ready:
            return
        try:
            tokens = self.model.sample([(sequence_of(job), job.next_how()) for job in ready])
        except LlmcError:
            self._sample_each(ready)
            return
        for job, token in zip(ready, tokens, strict=True):
            self._take(job, token)

    def _sample_each(self, jobs: Iterable[Job]) -> None:
        """One by one, so that only those fail that must."""
        for job in jobs:
            try:
                self._take(job, sequence_of(job).sample(job.next_how()))
            except LlmcError as error:
                self.fail([job], error)

    def _fork(self, job: Job) -> None:
        """The prompt has been read: its followers go on from it."""
        followers, job.followers = job.followers, []
        for follower in followers:
            if follower.is_cancelled:
                continue
            try:
                follower.sequence = sequence_of(job).fork()
            except LlmcError as error:
                self.fail([follower], error)
                continue
            follower.n_fed, follower.n_reused, follower.shares_tail = job.n_fed, job.n_fed, True
            follower.prompt_probs = job.prompt_probs
            self.running.insert(self.running.index(job) + 1, follower)
        job.shares_tail = True

    def _take(self, job: Job, token: int) -> None:
        if not job.n_said:
            self.meters.first_token.add(perf_counter() - job.arrived)
        if job.ask.n_top is not None:
            logits = sequence_of(job).logits()
            job.probs.append(token_prob(logits, token, job.ask.n_top, self._texts.of))
        if token not in self._is_end:
            self._is_end[token] = self.model.is_eos(token)
        said = job.take(token, self._is_end[token])
        self.meters.add("generated_tokens")
        if said is not None:
            self.news.append(said)
        if job.finish:
            self._end(job)

    # -- the step ---------------------------------------------------------------

    def _feed(self) -> None:
        """One step of what is to be read."""
        inputs = self._compose()
        while inputs and not self._make_room(inputs):
            self._give_way()
            inputs = self._compose()
        if not inputs:
            return
        guesses = self._guess(inputs)
        logits = [np.empty((n, self._n_vocab), np.float32) if job.wants_rows else None for job, n in inputs]
        right: dict[Job, list[int]] = {}
        start = perf_counter()
        looks = self._look_ahead(job for job, _ in inputs)
        try:
            if guesses:
                right = self.guesses.step(inputs, guesses)
            else:
                ids = [job.next_ids(n) for job, n in inputs]
                sequences = [sequence_of(job) for job, _ in inputs]
                self.model.run_step(list(zip(sequences, ids, logits, strict=True)))
        except LlmcError as error:
            self.failure = error
            self.fail([job for job, _ in inputs], error)
            return
        finally:
            wait(looks)
        self._stepped(start)
        for (job, n), rows in zip(inputs, logits, strict=True):
            if rows is not None:
                self._score(job, rows) if job.has_to_score else job.pool(rows)
            job.n_fed += n
            job.shares_tail = False
            if right:
                self._take_guesses(job, right.get(job, []))

    def _guess(self, inputs: list[tuple[Job, int]]) -> ByJob:
        """At what the texts of a step go on with, where there are pages for it, and nobody wants a prompt's logits."""
        guesses = {} if any(job.wants_rows for job, _ in inputs) else self.guesses.of(inputs)
        if not guesses:
            return {}
        n_pages = [self.pages.growth(job, n + len(guesses[job].ids) if job in guesses else n) for job, n in inputs]
        if self.pages.n_free < sum(n_pages):  # no text that is kept is given up for guesses
            return {}
        self.meters.add("guessed_tokens", sum(len(guess.ids) for guess in guesses.values()))
        return guesses

    def _take_guesses(self, job: Job, right: Iterable[int]) -> None:
        """Guesses that were right are in the sequence already; those behind the end of a text go with it."""
        for token in right:
            if job.finish:
                return
            job.n_fed += 1
            self.meters.add("right_guesses")
            self._take(job, token)

    def _look_ahead(self, jobs: Iterable[Job]) -> list[Future[object]]:
        """While a GPU makes a step, find out which tokens may follow it; a CPU has better to do."""
        if not self.model.runs_ahead:
            return []
        return [self._lookers.submit(job.constraint.look) for job in jobs if job.constraint is not None]

    def _score(self, job: Job, logits: Logits) -> None:
        """The probabilities of the prompt's tokens behind those just read.  logits: float32 [n, n_vocab]."""
        prompt = job.ask.prompt
        if not job.prompt_probs:
            job.prompt_probs.append(TokenProb(prompt[0], self._texts.of(prompt[0]), None))
        for position, row in enumerate(logits, job.n_fed + 1):
            if position < len(prompt) and position == len(job.prompt_probs):
                job.prompt_probs.append(token_prob(row, prompt[position], job.ask.n_top or 0, self._texts.of))

    def _make_room(self, inputs: Iterable[tuple[Job, int]]) -> bool:
        """Whether there are pages for a step, and slots."""
        listed = list(inputs)
        n_pages = sum(self.pages.growth(job, n) for job, n in listed)
        n_slots = sum(self.pages.slots(job) for job, _ in listed)
        return n_pages == n_slots == 0 or self.pages.make_room(n_pages, n_slots)

    def _compose(self) -> list[tuple[Job, int]]:
        """How many tokens of each job the next step takes: those that go on first, then prompts in a chunk."""
        pending = [job for job in self.running if job.n_pending]
        if self.model.is_whole:
            return whole_texts(pending, self.prompt_chunk)
        ongoing = [job for job in pending if job.n_pending == 1]
        left = max(1, self.chunk - len(ongoing)) if ongoing else self.prompt_chunk
        inputs = [(job, 1) for job in ongoing]
        for job in [job for job in pending if job.n_pending > 1]:
            if left and job.n_fed == 0:
                self._begin_again(job)
            n = min(left, job.n_pending, SCORED_CHUNK if job.wants_rows else left)
            if n:
                n = self._whole(job.ids, job.n_fed + n) - job.n_fed
                inputs.append((job, n))
                left = max(0, left - n)
        return inputs

    def _run_ahead(self) -> bool:
        """Tokens and the step on them in one call, where a GPU goes on meanwhile; False: not now."""
        jobs = self.running
        if not jobs or not self.model.runs_ahead or self.guesses.most or any(job.needs_care for job in jobs):
            return False
        if not self._make_room([(job, 1) for job in jobs]):
            return False
        lasts = [job for job in jobs if job.next_is_last]
        rest = [job for job in jobs if not job.next_is_last]
        self._sample_each(lasts)
        if not rest:
            return True
        start = perf_counter()
        try:
            tokens = self.model.advance([(sequence_of(job), job.ask.how) for job in rest])
        except LlmcError as error:
            self.failure = error
            return False  # whose fault it is comes out one by one
        self._stepped(start)
        for job, token in zip(rest, tokens, strict=True):
            job.n_fed += 1
            job.shares_tail = False
            self._take(job, token)
        return True

    def _stepped(self, start: float) -> None:
        self.failure = None
        self._n_steps += 1
        self.meters.step.add(perf_counter() - start)


def cache_is_full() -> LlmcError:
    return LlmcError("the KV cache is full", hint="open it with more --kv-tokens")


def n_texts(jobs: Iterable[Job]) -> int:
    """Jobs, their followers included."""
    return sum(1 + len(job.followers) for job in jobs)


def sequence_of(job: Job) -> TokenSequence:
    """Of a job that runs."""
    assert job.sequence is not None
    return job.sequence
