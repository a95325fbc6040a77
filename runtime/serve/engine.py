"""The thread that owns the model, and those who wait for it."""

from __future__ import annotations

import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from time import monotonic
from typing import Any

from llmc.runtime.binding import Model
from llmc.runtime.serve.batch import Batch, n_texts
from llmc.runtime.serve.guesses import Guesses
from llmc.runtime.serve.job import Job, Said
from llmc.runtime.serve.meters import Meters, State
from llmc.runtime.serve.stored_texts import StoredTexts


class Full(Exception):
    """The queue is full."""


class Closing(Exception):
    """The server is going to end."""


class Engine:
    """Texts of many clients on one model.

    Its thread takes turns (see batch.py) as long as there is something to do; other threads submit and cancel jobs.
    """

    def __init__(
        self,
        model: Model,
        post: Callable[[list[Said]], None],
        *,
        max_batch: int,
        queue: int,
        chunk: int = 0,
        speculate: int = 0,
        draft: Model | None = None,
        prompt_cache: str | None = None,
    ) -> None:
        """post: called on the model's thread with the news of a turn.  queue: most texts that wait.  max_batch, chunk:
        see Batch.  speculate, draft: see Guesses.  prompt_cache: a folder that keeps texts which have ended, over a
        restart."""
        self.post, self.queue = post, queue
        self.meters = Meters()
        self.batch = Batch(model, self.meters, Guesses(model, speculate, draft), max_batch, chunk)
        self._stored = StoredTexts(model, prompt_cache) if prompt_cache is not None else None
        if self._stored is not None:
            self.batch.pages.restore(self._stored)
        self._free_pages = self.batch.pages.n_free
        self._wake = threading.Condition()
        self._inbox: list[Job] = []
        self._errands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._n_jobs = 0
        self._closes_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="llmc-model", daemon=True)

    # -- for other threads ----------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    @property
    def room(self) -> int:
        """Most tokens of a sequence."""
        return self.batch.room

    @property
    def max_batch(self) -> int:
        """Most texts in a step."""
        return self.batch.max_batch

    @property
    def failure(self) -> Exception | None:
        """The error of the last step, if it failed."""
        return self.batch.failure

    @property
    def state(self) -> State:
        """The state as it was at the last turn, with those who came since."""
        running, waiting = list(self.batch.running), [*self._inbox, *self.batch.waiting]
        return State(n_texts(running), n_texts(waiting), self.batch.pages.total, self._free_pages)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Let jobs join, all or none; a job's followers come with it.  Raises Full or Closing.

        Who has come takes a free place in the steps, if there is one, though no turn may have seen it yet.
        """
        with self._wake:
            if self._closes_at is not None:
                raise Closing
            state = self.state
            if state.running + state.waiting + n_texts(jobs) > self.max_batch + self.queue:
                raise Full
            for job in jobs:
                self._n_jobs += 1
                for one in (job, *job.followers):
                    one.number = self._n_jobs
            self._inbox += jobs
            self._wake.notify()

    def call(self, work: Callable[[], Any]) -> Any:
        """The result of what is done on the model's thread, between two steps.  Raises Closing."""
        return self.later(work).result()

    def later(self, work: Callable[[], Any]) -> Future[Any]:
        """The same, not waited for.  Raises Closing."""
        done = Future[Any]()
        with self._wake:
            if self._closes_at is not None:
                raise Closing
            self._errands.append((work, done))
            self._wake.notify()
        return done

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Nobody waits for these any more: their pages are free before the next step."""
        for job in jobs:
            job.is_cancelled = True
        with self._wake:
            self._wake.notify()

    def drain(self, seconds: float) -> None:
        """Take no more jobs; those that run have so long to end."""
        with self._wake:
            self._closes_at = monotonic() + seconds
            self._wake.notify()

    def close(self) -> None:
        """End what still runs after its step, and the thread.  Raises LlmcError: texts could not be kept."""
        self.drain(0)
        if self._thread.is_alive():
            self._thread.join()
        try:
            if self._stored is not None:
                self.batch.pages.save(self._stored)
        finally:
            self.batch.close()

    # -- the thread -------------------------------------------------------------

    def _run(self) -> None:
        while self.collect():
            self.turn()

    def collect(self) -> bool:
        """Wait until there is something to do; False: never again."""
        batch = self.batch
        with self._wake:
            while not (self._has_work or self._closes_at is not None):
                self._wake.wait()
            batch.waiting.extend(self._inbox)
            self._inbox.clear()
            if self._closes_at is not None and monotonic() >= self._closes_at:
                batch.fail([*batch.running, *batch.waiting], Closing())
                self._tell()
                while self._errands:
                    self._errands.popleft()[1].set_exception(Closing())
            return self._has_work or self._closes_at is None

    @property
    def _has_work(self) -> bool:
        return bool(self._inbox or self._errands or self.batch.running or self.batch.waiting)

    def turn(self) -> None:
        """One errand, the next tokens, a step, and the news of both."""
        self._run_errand()
        try:
            self.batch.turn()
        except BaseException as error:  # a bug, or a tokenizer's panic: whoever waits is told, others may be luckier
            traceback.print_exc(file=sys.stderr)
            said = error if isinstance(error, Exception) else RuntimeError(str(error))
            self.batch.fail([*self.batch.running, *self.batch.waiting], said)
        self._tell()

    def _run_errand(self) -> None:
        if not self._errands:
            return
        work, done = self._errands.popleft()
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    def _tell(self) -> None:
        self._free_pages = self.batch.pages.n_free
        news, self.batch.news = self.batch.news, []
        if news:
            self.post(news)
