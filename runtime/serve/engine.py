"""Continuous batching: one thread owns the model, and every step takes what all texts have to be read.

A turn gives each text that is wholly read its next token, then makes one step of what has not been read yet: the new
token of each, and beside them a chunk of the prompts that wait, the oldest first.  So a text joins the others at the
next step, and a long prompt makes their steps longer, but not by more than a chunk.

Texts are admitted in the order they came.  One is when its prompt has room in the KV cache; what it says later may
fill the cache all the same, and then the youngest gives its pages up, goes back to the head of the queue, and is read
again when there is room.  A CPU gives the same bits for any chunks and neighbours, so that nobody can tell; the draws
of a sampled text depend on its seed and the position alone.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from time import monotonic, perf_counter
from typing import TYPE_CHECKING

import numpy as np

from llmc.runtime.binding import Model
from llmc.runtime.errors import LlmcError
from llmc.runtime.serve.job import Job, Said
from llmc.runtime.serve.meters import Meters, State
from llmc.runtime.serve.pages import Pages

if TYPE_CHECKING:
    from llmc.runtime.sequence import Sequence as TokenSequence

CPU_CHUNK, CPU_PROMPT = 32, 128
"""Most tokens of a step beside texts that go on, and of one that reads prompts alone: where a step on a CPU takes
little longer than for one token, and where longer ones no longer read prompts faster."""
GPU_CHUNK = 256
"""On a GPU, where prompts alone take the longest steps there are."""
PAGE_TOKENS = 64
"""Of an artifact whose manifest does not say."""


class Full(Exception):
    """The queue is full."""


class Closing(Exception):
    """The server is going to end."""


class Engine:
    """The model's thread, and those who wait for it.

    post: called on that thread with news, a list for each turn.
    """

    def __init__(
        self, model: Model, post: Callable[[list[Said]], None], *, max_batch: int, queue: int, chunk: int = 0
    ) -> None:
        """max_batch: most texts in a step; queue: most that wait; chunk: tokens of a step beside texts that go on."""
        info = model.info
        on_cpu = info.device == "CPU"
        self.model, self.post = model, post
        self.max_batch = min(max_batch, info.max_step_tokens)
        self.queue = queue
        self.chunk = min(chunk or (CPU_CHUNK if on_cpu else GPU_CHUNK), info.max_step_tokens)
        self.prompt_chunk = max(self.chunk, min(CPU_PROMPT if on_cpu else info.max_step_tokens, info.max_step_tokens))
        self.pages = Pages(model, int(model.manifest.get("kv_cache", {}).get("page_tokens", PAGE_TOKENS)))
        self.room = min(info.n_context, self.pages.total * self.pages.size)
        self.meters = Meters()
        self.failure: Exception | None = None  # of the last step, if it failed
        self._wake = threading.Condition()
        self._inbox: list[Job] = []
        self._n_jobs = 0
        self._closes_at: float | None = None
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []  # the oldest first
        self._may_admit = True  # nothing has changed for the worse of the queue's head since it was refused
        self._news: list[Said] = []
        self._free_pages = self.pages.n_free
        self._has_moved = False  # pages have, since they were counted
        self._is_end: dict[int, bool] = {}
        self._thread = threading.Thread(target=self._run, name="llmc-model", daemon=True)

    # -- for other threads ----------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Let jobs join, all or none; a job's followers come with it.  Raises Full or Closing."""
        n_new = sum(1 + len(job.followers) for job in jobs)
        with self._wake:
            if self._closes_at is not None:
                raise Closing
            state = self.state
            n_slots = max(0, self.max_batch - state.running - state.waiting)
            if state.waiting + n_new - n_slots > self.queue:
                raise Full
            for job in jobs:
                self._n_jobs += 1
                job.number = self._n_jobs
                for follower in job.followers:
                    follower.number = self._n_jobs
            self._inbox += jobs
            self._wake.notify()

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Nobody waits for these any more: their pages are free before the next step."""
        for job in jobs:
            job.is_cancelled = True
        with self._wake:
            self._wake.notify()

    @property
    def state(self) -> State:
        """As it was at the last turn, with those who came since."""
        waiting = [*self._inbox, *self._waiting]
        n_running, n_waiting = (sum(1 + len(job.followers) for job in jobs) for jobs in (list(self._running), waiting))
        return State(n_running, n_waiting, self.pages.total, self._free_pages)

    def drain(self, seconds: float) -> None:
        """Take nothing more; what runs has so long to end."""
        with self._wake:
            self._closes_at = monotonic() + seconds
            self._wake.notify()

    def close(self) -> None:
        """End what still runs after its step, and the thread."""
        self.drain(0)
        if self._thread.is_alive():
            self._thread.join()
        self.pages.clear()

    # -- the thread -------------------------------------------------------------

    def _run(self) -> None:
        while self.collect():
            self.turn()

    def collect(self) -> bool:
        """Wait until there is something to do; False: never again."""
        with self._wake:
            while not (self._inbox or self._running or self._waiting or self._closes_at is not None):
                self._wake.wait()
            self._waiting.extend(self._inbox)
            self._inbox.clear()
            if self._closes_at is not None and monotonic() >= self._closes_at:
                self._fail([*self._running, *self._waiting], Closing())
                self._waiting.clear()
                self._tell()
            return bool(self._running or self._waiting or self._closes_at is None)

    def _tell(self) -> None:
        if self._has_moved:
            self._free_pages, self._has_moved = self.pages.n_free, False
        if self._news:
            news, self._news = self._news, []
            self.post(news)

    def turn(self) -> None:
        """The next tokens, a step, and the news of both."""
        try:
            self._forget_cancelled()
            self._admit()
            if not self._run_ahead():
                self._sample()
                self._admit()
                self._feed()
        except Exception as error:  # a bug: whoever waits has to be told, and others may be luckier
            traceback.print_exc(file=sys.stderr)
            self._fail(self._running, error)
        self._tell()

    # -- coming and going -------------------------------------------------------

    def _forget_cancelled(self) -> None:
        gone = [job for job in self._running if job.is_cancelled]
        for job in gone:
            self._end(job)
        still = [job for job in self._waiting if not job.is_cancelled]
        self.meters.add("cancelled", len(gone) + len(self._waiting) - len(still))
        self._may_admit |= len(still) < len(self._waiting)
        self._waiting = deque(still)

    def _admit(self) -> None:
        """Let those in that have room, in the order they came."""
        while self._may_admit and self._waiting:
            job = self._waiting[0]
            n_slots = self.max_batch - sum(1 + len(other.followers) for other in self._running)
            if 1 + len(job.followers) > n_slots or not self._begin(job):
                self._may_admit = False
                return
            self._waiting.popleft()
            self._running.append(job)
            self._running.sort(key=lambda job: job.number)

    def _begin(self, job: Job) -> bool:
        """Give a job a sequence if its tokens fit beside all that the others have still to read."""
        self.pages.begin(job, self._running)
        promised = sum(self.pages.growth(other, other.n_pending) for other in self._running)
        spare = 1 + len(job.followers) if self._running else 0
        if not self.pages.make_room(promised + self.pages.growth(job, job.n_pending) + spare):
            job.leave()
            return False
        if not job.has_begun:
            job.has_begun, job.n_reused = True, job.n_fed
            self.meters.add("texts", 1 + len(job.followers))
            self.meters.add("prompt_tokens", len(job.ids))
            self.meters.add("reused_tokens", job.n_fed)
        return True

    def _end(self, job: Job) -> None:
        """A running job goes; what it has read is kept for others."""
        self._running.remove(job)
        self.pages.keep(job)
        job.leave()
        self._may_admit = self._has_moved = True

    def _fail(self, jobs: Iterable[Job], error: Exception) -> None:
        for job in list(jobs):
            job.leave()
            for one in (job, *job.followers):
                self._news.append(Said(one, error=error))
                self.meters.add("failed")
            if job in self._running:
                self._running.remove(job)
        self._may_admit = self._has_moved = True

    def _give_way(self) -> None:
        """The youngest gives its pages up, and is the next to be admitted."""
        job = self._running[-1]
        if len(self._running) == 1 and job.shares_tail:
            job.shares_tail = False  # those it shared with have ended
            return
        if len(self._running) == 1:
            self._fail([job], LlmcError("the KV cache is full", hint="open it with more --kv-tokens"))
            return
        self._running.pop()
        job.leave()
        self._waiting.appendleft(job)
        self._may_admit = False
        self.meters.add("preemptions")

    # -- the next tokens --------------------------------------------------------

    def _sample(self) -> None:
        """A token for each job that is wholly read."""
        for job in [job for job in self._running if not job.n_pending and job.followers]:
            self._fork(job)
        ready = [job for job in self._running if not job.n_pending]
        if not ready:
            return
        try:
            tokens = self.model.sample([(sequence_of(job), job.ask.how) for job in ready])
        except LlmcError:
            self._sample_each(ready)
            return
        for job, token in zip(ready, tokens, strict=True):
            self._take(job, token)

    def _sample_each(self, jobs: Iterable[Job]) -> None:
        """One by one, so that only those fail that must."""
        for job in jobs:
            try:
                token = sequence_of(job).sample(job.ask.how)
            except LlmcError as error:
                self._fail([job], error)
            else:
                self._take(job, token)

    def _fork(self, job: Job) -> None:
        """The prompt has been read: its followers go on from it."""
        followers, job.followers = job.followers, []
        for follower in followers:
            if not follower.is_cancelled:
                follower.sequence = sequence_of(job).fork()
                follower.n_fed, follower.n_reused, follower.shares_tail = job.n_fed, job.n_fed, True
                self._running.insert(self._running.index(job) + 1, follower)
        job.shares_tail = True

    def _take(self, job: Job, token: int) -> None:
        if not job.n_said:
            self.meters.first_token.add(perf_counter() - job.arrived)
        if token not in self._is_end:
            self._is_end[token] = self.model.is_eos(token)
        said = job.take(token, self._is_end[token])
        self.meters.add("generated_tokens")
        if said is not None:
            self._news.append(said)
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
        ids = [np.array(job.ids[job.n_fed : job.n_fed + n], dtype=np.int32) for job, n in inputs]
        start = perf_counter()
        try:
            self.model.run_step([(sequence_of(job), part, None) for (job, _), part in zip(inputs, ids, strict=True)])
        except LlmcError as error:
            self.failure = error
            self._fail([job for job, _ in inputs], error)
            return
        self._stepped(start)
        for job, n in inputs:
            job.n_fed += n
            job.shares_tail = False

    def _make_room(self, inputs: Iterable[tuple[Job, int]]) -> bool:
        """Whether there are pages for a step."""
        n_pages = sum(self.pages.growth(job, n) for job, n in inputs)
        self._has_moved |= n_pages > 0
        return n_pages == 0 or self.pages.make_room(n_pages)

    def _compose(self) -> list[tuple[Job, int]]:
        """How many tokens of each job the next step takes: those that go on first, then prompts in a chunk."""
        pending = [job for job in self._running if job.n_pending]
        ongoing = [job for job in pending if job.n_pending == 1]
        left = max(1, self.chunk - len(ongoing)) if ongoing else self.prompt_chunk
        inputs = [(job, 1) for job in ongoing]
        for job in pending:
            n = min(left, job.n_pending)
            if job.n_pending > 1 and n:
                inputs.append((job, n))
                left -= n
        return inputs

    def _run_ahead(self) -> bool:
        """Tokens and the step on them in one call, where a GPU goes on meanwhile; False: not now."""
        jobs = self._running
        if not jobs or not self.model.runs_ahead or any(job.n_pending or job.followers for job in jobs):
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
        except LlmcError:
            return False  # whose fault it is comes out one by one
        self._stepped(start)
        for job, token in zip(rest, tokens, strict=True):
            job.n_fed += 1
            job.shares_tail = False
            self._take(job, token)
        return True

    def _stepped(self, start: float) -> None:
        self.failure = None
        self.meters.step.add(perf_counter() - start)


def sequence_of(job: Job) -> TokenSequence:
    """Of a job that runs."""
    assert job.sequence is not None
    return job.sequence
