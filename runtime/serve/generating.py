"""From a request to its texts: jobs for the engine, and what is heard of them, whole or as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from llmc.runtime.binding import Model
from llmc.runtime.embedding import Embedding, Rows
from llmc.runtime.errors import LlmcError
from llmc.runtime.grammar import Constraint, GaveUp
from llmc.runtime.serve.engine import Closing, Engine, Full
from llmc.runtime.serve.fields import ApiError
from llmc.runtime.serve.formats import Format
from llmc.runtime.serve.job import Ask, Job, Said, Tells
from llmc.runtime.serve.replies import Reply
from llmc.runtime.serve.transport import CLIENT_GONE, EventStream, json_response, unless_gone
from llmc.runtime.serve.vocabulary import Vocabulary
from llmc.runtime.serve.wanted import Wanted

RETRY_AFTER_S = 1
PULSE_S = 15.0
"""Shorter than the minute after which proxies give a silent answer up."""


class Generator:
    """Makes the texts of requests on one engine."""

    def __init__(self, model: Model, engine: Engine, vocabulary: Vocabulary) -> None:
        self.model, self.engine, self.vocabulary = model, engine, vocabulary

    def check_number(self, n_texts: int) -> None:
        """Refuse, before any prompt is looked at, more texts than the engine ever takes."""
        most = self.engine.max_batch + self.engine.queue
        if n_texts > most:
            raise ApiError(400, f"the request asks for {n_texts} texts; at most {most} are made at once")

    async def generate(
        self, request: Request, wanted: Wanted, prompts: Sequence[tuple[int, ...]], reply: Reply, **also: Any
    ) -> Response:
        """also: fields of Ask that all texts have in common."""
        news: asyncio.Queue[Said] = asyncio.Queue()
        tells: Tells = "end" if not wanted.stream else "tokens" if wanted.with_ids else "pieces"
        self.vocabulary.check(wanted)
        constraints: Sequence[Constraint | None] = [None] * (len(prompts) * wanted.n)
        if wanted.format is not None:
            constraints = await run_in_threadpool(self.constraints, wanted.format, len(constraints))
        ask = self.ask(wanted, **also)
        asks = [replace(ask, prompt=ids, how=wanted.how_of(i)) for ids, i in product(prompts, range(wanted.n))]
        jobs = [
            Job(ask, self.engine.room, self.vocabulary.tokenizer, news.put_nowait, index, tells, constraint)
            for index, (ask, constraint) in enumerate(zip(asks, constraints, strict=True))
        ]
        self.submit(jobs, wanted.n)
        if wanted.stream:
            return EventStream(events(jobs, reply, news), lambda: self.engine.cancel(jobs))
        try:
            texts = await unless_gone(request.receive, collect(jobs, news))
        finally:
            self.engine.cancel(jobs)
        return json_response(reply.whole(jobs, texts)) if texts is not None else Response(status_code=CLIENT_GONE)

    async def rows(self, request: Request, prompts: Sequence[tuple[int, ...]], how: Embedding) -> list[Rows] | None:
        """What the embeddings of these are made of, float32 [size] each; None: the client has gone."""
        news: asyncio.Queue[Said] = asyncio.Queue()
        asks = [Ask(ids, max_tokens=0, embeds=how) for ids in prompts]
        room, tokenizer = self.engine.room, self.vocabulary.tokenizer
        jobs = [Job(ask, room, tokenizer, news.put_nowait, index, "end") for index, ask in enumerate(asks)]
        self.submit(jobs, 1)
        try:
            texts = await unless_gone(request.receive, collect(jobs, news))
        finally:
            self.engine.cancel(jobs)
        return None if texts is None else [job.row for job in jobs]

    def constraints(self, wanted: Format, n: int) -> list[Constraint]:
        """For n texts of this format.  Raises ApiError."""
        try:
            first = self.model.guide.constraint(wanted.grammar)
        except LlmcError as error:
            raise ApiError(400, error.fact, param=wanted.param, code="invalid_value") from None
        except ModuleNotFoundError as error:
            fact = f"'{wanted.param}' needs the Python package {error.name}, which the server does not have"
            raise ApiError(400, fact, param=wanted.param, code="unsupported_parameter") from None
        return [first, *(first.copy() for _ in range(n - 1))]

    def ask(self, wanted: Wanted, **also: Any) -> Ask:
        """Without a prompt.  also: more of its fields."""
        return Ask(
            prompt=(),
            max_tokens=self.engine.room if wanted.max_tokens is None else wanted.max_tokens,
            stops=wanted.stops,
            stop_tokens=wanted.stop_tokens,
            min_tokens=wanted.min_tokens,
            going_on=self.vocabulary.going_on(wanted.stop_tokens) if wanted.min_tokens else None,
            ignore_eos=wanted.ignore_eos,
            n_top=wanted.n_top,
            adapter=wanted.model if wanted.model in self.model.adapters else None,
            **also,
        )

    def submit(self, jobs: Sequence[Job], n: int) -> None:
        """Into the engine, of n texts a prompt the first as the others' leader."""
        leaders = jobs[::n]
        for at, leader in enumerate(leaders):
            leader.followers = list(jobs[at * n + 1 : (at + 1) * n])
            for follower in leader.followers:
                follower.is_leader = False
        try:
            self.engine.submit(leaders)
        except Full:
            raise queue_is_full() from None
        except Closing:
            raise closing() from None


async def events(jobs: Sequence[Job], reply: Reply, news: asyncio.Queue[Said]) -> AsyncIterator[bytes]:
    """The answer as server-sent events, and now and then one that says nothing, for those who give up a stream that is
    silent, as it is while it waits or its prompt is read."""
    if opening := reply.opening(jobs):
        yield opening
    n_open, beat = len(jobs), Said(jobs[0])
    with beats(news, beat):
        while n_open:
            said = await news.get()
            if said is beat:
                yield reply.pulse
                continue
            if said.error is not None:
                yield reply.failure(api_error(said.error))
                return
            if piece := reply.piece(said):
                yield piece
            n_open -= said.finish is not None
    if ending := reply.ending(jobs):
        yield ending


@contextmanager
def beats(news: asyncio.Queue[Said], beat: Said) -> Iterator[None]:
    """A beat among the news every PULSE_S seconds."""

    async def strike() -> None:
        while True:
            await asyncio.sleep(PULSE_S)
            news.put_nowait(beat)

    striking = asyncio.create_task(strike())
    try:
        yield
    finally:
        striking.cancel()


async def collect(jobs: Sequence[Job], news: asyncio.Queue[Said]) -> list[str]:
    """The whole texts of jobs.  Raises ApiError when one fails."""
    texts: list[list[str]] = [[] for _ in jobs]
    n_open = len(jobs)
    while n_open:
        said = await news.get()
        if said.error is not None:
            raise api_error(said.error)
        texts[said.job.index].append(said.text)
        n_open -= said.finish is not None
    return ["".join(pieces) for pieces in texts]


def api_error(error: Exception) -> ApiError:
    """The error that a client gets for one of the engine."""
    if isinstance(error, Closing):
        return closing()
    if isinstance(error, GaveUp):
        return ApiError(400, error.fact, code="invalid_value")
    return ApiError(500, error.fact if isinstance(error, LlmcError) else f"unexpected {type(error).__name__}")


def queue_is_full() -> ApiError:
    after = {"retry-after": str(RETRY_AFTER_S)}
    return ApiError(503, "the queue is full; try again", code="queue_full", headers=after)


def closing() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down")
