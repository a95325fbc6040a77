"""An engine for tests, whose turns they take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmc.runtime.binding import Model
from llmc.runtime.generation import GREEDY, How
from llmc.runtime.serve.engine import Engine
from llmc.runtime.serve.job import Ask, Job, Said
from tests.runtime import toy_artifact as toy

PAGE, CONTEXT = toy.PAGE_TOKENS, toy.CONTEXT
DRAWN = How(temperature=1.0, top_k=20, seed=7)


def prompt(n: int, salt: int = 0) -> tuple[int, ...]:
    """Tokens that are not the poisonous one."""
    return tuple((7 * i * i + 3 + salt) % toy.POISON for i in range(n))


class Served:
    """An engine whose turns the test takes, and what its jobs were told."""

    def __init__(
        self,
        model: Model,
        max_batch: int = 4,
        queue: int = 8,
        chunk: int = 4,
        speculate: int = 0,
        draft: Model | None = None,
        prompt_cache: str | None = None,
    ) -> None:
        self.model, self.news = model, list[Said]()
        options: Any = {"max_batch": max_batch, "queue": queue, "chunk": chunk, "speculate": speculate}
        self.engine = Engine(model, self.news.extend, **options, draft=draft, prompt_cache=prompt_cache)

    def job(self, ids: Sequence[int], n: int = 6, how: How = GREEDY) -> Job:
        return Job(Ask(tuple(ids), n, how, ignore_eos=True), self.engine.room, None, self.news.append)

    def scored(self, ids: Sequence[int], n: int, n_top: int) -> Job:
        ask = Ask(tuple(ids), n, DRAWN, ignore_eos=True, n_top=n_top, scores_prompt=True)
        return Job(ask, self.engine.room, None, self.news.append)

    def submit(self, *jobs: Job) -> None:
        self.engine.submit(jobs)

    def turn(self) -> None:
        assert self.engine.collect()
        self.engine.turn()

    def finish(self, *jobs: Job) -> None:
        """Turns until these have ended."""
        for _ in range(500):
            if all(job.finish for job in jobs) or any(said.error for said in self.news):
                break
            self.turn()
        assert not [said.error for said in self.news if said.error]
        assert all(job.finish for job in jobs)

    def check(self, *jobs: Job) -> None:
        """Each has said what it says alone; gives up what is kept."""
        self.engine.batch.pages.clear()
        for job in jobs:
            ask = job.ask
            assert job.tokens == list(self.model.stream(ask.prompt, ask.max_tokens, ask.how, ignore_eos=True))

    def leave(self) -> None:
        """All pages are free once nothing is kept."""
        self.engine.batch.pages.clear()
        assert self.engine.batch.pages.n_free == self.engine.batch.pages.total
