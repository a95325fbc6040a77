"""The endpoints, on an event loop that never waits for the model."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llmc.runtime.binding import Model
from llmc.runtime.errors import LlmcError
from llmc.runtime.grammar import Constraint, GaveUp
from llmc.runtime.serve.chat import ChatTemplate, needs_form
from llmc.runtime.serve.engine import Closing, Engine, Full
from llmc.runtime.serve.fields import ApiError, no_such_model, shortened
from llmc.runtime.serve.formats import Format
from llmc.runtime.serve.job import Ask, Job, Said, Tells, Thinking
from llmc.runtime.serve.replies import DONE, Reply, event, usage
from llmc.runtime.serve.requests import Wanted, read_chat, read_completion
from llmc.runtime.serve.thoughts import Marks
from llmc.runtime.serve.tokenizing import detokenized, read_text, read_tokens, tokenized
from llmc.runtime.serve.tools import CallScanner
from llmc.runtime.serve.transport import CLIENT_GONE, EventStream, error_response, json_response, read_json, unless_gone
from llmc.runtime.serve.vocabulary import Vocabulary

Endpoint = Callable[[Request], Awaitable[Response]]
RETRY_AFTER_S = 1


class Service:
    """What the endpoints share.

    connections: those that are open; with more than most_connections only /health and /metrics answer.
    """

    def __init__(self, model: Model, engine: Engine, name: str, api_key: str | None = None) -> None:
        """name: of the model, for clients.  api_key: what they have to send, if anything."""
        self.model, self.engine, self.name, self.api_key = model, engine, name, api_key
        self.vocabulary = Vocabulary(model, engine.room)
        self.template = template_of(model)
        self.created = int(time.time())
        self.responses: Counter[int] = Counter()
        self.connections: Collection[object] = ()
        self.most_connections = 0

    def app(self) -> Starlette:
        routes = [
            Route("/v1/models", self.guarded(self.models), methods=["GET"]),
            Route("/v1/models/{name:path}", self.guarded(self.one_model), methods=["GET"]),
            Route("/v1/completions", self.guarded(self.completions), methods=["POST"]),
            Route("/v1/chat/completions", self.guarded(self.chat), methods=["POST"]),
            Route("/tokenize", self.guarded(self.tokenize), methods=["POST"]),
            Route("/detokenize", self.guarded(self.detokenize), methods=["POST"]),
            Route("/health", self.counted(self.health), methods=["GET"]),
            Route("/metrics", self.counted(self.metrics), methods=["GET"]),
        ]
        handlers: dict[Any, Any] = {HTTPException: self.not_found, Exception: self.failed}
        return Starlette(routes=routes, exception_handlers=handlers)

    # -- around every endpoint --------------------------------------------------

    def guarded(self, endpoint: Endpoint) -> Endpoint:
        """Only with the key, if there is one, and when there are not too many connections."""

        async def respond(request: Request) -> Response:
            if len(self.connections) > self.most_connections:
                again = {"retry-after": str(RETRY_AFTER_S), "connection": "close"}
                raise ApiError(503, "too many connections; try again", code="too_many_connections", headers=again)
            if self.api_key is not None:
                given = request.headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1")
                if not secrets.compare_digest(given, self.api_key.encode(errors="surrogateescape")):
                    raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
            return await endpoint(request)

        return self.counted(respond)

    def counted(self, endpoint: Endpoint) -> Endpoint:
        async def respond(request: Request) -> Response:
            try:
                response = await endpoint(request)
            except ApiError as error:
                response = error_response(error)
            self.responses[response.status_code] += 1
            return response

        return respond

    async def not_found(self, request: Request, error: HTTPException) -> Response:
        self.responses[error.status_code] += 1
        fact = f"{request.method} {shortened(request.url.path)}: {error.detail.lower()}"
        if error.status_code == 404 and request.url.path.startswith("/v1/"):
            fact += "; this server has /v1/completions, /v1/chat/completions and /v1/models"
        return error_response(ApiError(error.status_code, fact, headers=error.headers))

    async def failed(self, request: Request, error: Exception) -> Response:
        self.responses[500] += 1
        return error_response(ApiError(500, f"unexpected {type(error).__name__}; the server's log has more"))

    # -- facts --------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        room = self.engine.room
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "llmc",
            "max_model_len": room,
        }

    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self.facts()]})

    async def one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.name:
            raise no_such_model(name, self.name)
        return json_response(self.facts())

    async def tokenize(self, request: Request) -> Response:
        text = await read_json(request, lambda body: read_text(body, self.name, self.template))
        return json_response(await run_in_threadpool(tokenized, text, self.vocabulary))

    async def detokenize(self, request: Request) -> Response:
        ids = await read_json(request, lambda body: read_tokens(body, self.name))
        return json_response(await run_in_threadpool(detokenized, ids, self.vocabulary))

    async def health(self, request: Request) -> Response:
        failure = self.engine.failure
        return json_response({"status": f"failing: {failure}" if failure else "ok"}, 503 if failure else 200)

    async def metrics(self, request: Request) -> Response:
        page = self.engine.meters.page(self.engine.state, self.responses, len(self.connections))
        return Response(page, media_type="text/plain; version=0.0.4")

    # -- texts --------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        asked = await read_json(request, lambda body: read_completion(body, self.name, self.engine.max_batch))
        wanted = asked.wanted
        self.check_number(len(asked.prompts) * wanted.n)
        prompts = [await run_in_threadpool(self.vocabulary.ids_of, prompt) for prompt in asked.prompts]
        echoes = []
        if asked.echo:
            pairs = zip(asked.prompts, prompts, strict=True)
            echoes = [self.vocabulary.text_of(prompt, ids) for prompt, ids in pairs for _ in range(wanted.n)]
        reply = Reply("completion", self.name, wanted.with_ids, wanted.n_top is not None, echoes)
        scores = asked.echo and wanted.n_top is not None
        return await self.generate(request, wanted, prompts, reply, self.ask(wanted, scores_prompt=scores))

    async def chat(self, request: Request) -> Response:
        asked = await read_json(request, lambda body: read_chat(body, self.name, self.engine.max_batch))
        if isinstance(self.template, ApiError):
            raise self.template
        wanted, tools = asked.wanted, asked.tools
        reply = Reply("chat", self.name, wanted.with_ids, wanted.n_top is not None, with_thoughts=asked.with_thoughts)
        offered = tools.tools if tools else None
        kwargs = self.template.with_effort(asked.effort, asked.template_kwargs)
        text = await run_in_threadpool(self.template.render, asked.messages, kwargs, offered)
        must_call, shown, thinking = tools is not None and tools.must_call, dict[int, str](), None
        if self.template.marks is not None:
            marks = self.template.marks
            text, thinking = self.begin_thought(marks, text, must_call, wanted.format is not None)
            shown |= self.vocabulary.shown(marks.special)
            if thinking is not None and asked.splits:
                is_open = thinking.is_open
                reply.split = lambda: marks.scanner(is_open)
        if tools is not None:
            form = needs_form(self.template, tools)
            reply.scan = lambda: CallScanner(tools, form)
            special = self.vocabulary.shown(form.marks)
            shown |= special
            if must_call:
                text += form.opening
                wanted = replace(wanted, format=Format("tools", tools.grammar(form, special)))
        ids = await run_in_threadpool(self.vocabulary.ids_of, text, False)
        return await self.generate(request, wanted, [ids], reply, self.ask(wanted, shown=shown, thinking=thinking))

    def begin_thought(self, marks: Marks, prompt: str, must_call: bool, is_bound: bool) -> tuple[str, Thinking | None]:
        """-> (the prompt, how a thought may come behind it: None: there is none).

        Where a call has to come nothing is thought before it, nor where the end of a thought cannot be told from a
        format that is_bound to follow: what the template has begun is ended.
        """
        opening, closing = self.vocabulary.token_of(marks.opening), self.vocabulary.token_of(marks.closing)
        if marks.is_over(prompt):
            return prompt, None
        if must_call or (is_bound and closing is None):
            return prompt + marks.answer_behind(prompt), None
        return prompt, Thinking(opening, closing, marks.is_open(prompt))

    def check_number(self, n_texts: int) -> None:
        """Refuse, before any prompt is looked at, more texts than the engine ever takes."""
        most = self.engine.max_batch + self.engine.queue
        if n_texts > most:
            raise ApiError(400, f"the request asks for {n_texts} texts; at most {most} are made at once")

    async def generate(
        self,
        request: Request,
        wanted: Wanted,
        prompts: Sequence[tuple[int, ...]],
        reply: Reply,
        ask: Ask,
    ) -> Response:
        """ask: what all texts have in common."""
        news: asyncio.Queue[Said] = asyncio.Queue()
        tells: Tells = "end" if not wanted.stream else "tokens" if wanted.with_ids else "pieces"
        self.vocabulary.check(wanted)
        constraints: Sequence[Constraint | None] = [None] * (len(prompts) * wanted.n)
        if wanted.format is not None:
            constraints = await run_in_threadpool(self.constraints, wanted.format, len(constraints))
        asks = [replace(ask, prompt=ids, how=wanted.how_of(i)) for ids, i in product(prompts, range(wanted.n))]
        jobs = [
            Job(ask, self.engine.room, self.vocabulary.tokenizer, news.put_nowait, index, tells, constraint)
            for index, (ask, constraint) in enumerate(zip(asks, constraints, strict=True))
        ]
        self.submit(jobs, wanted.n)
        if wanted.stream:
            reply.told = usage_told(wanted, jobs)
            return EventStream(self.events(wanted, jobs, reply, news), lambda: self.engine.cancel(jobs))
        try:
            texts = await unless_gone(request.receive, collect(jobs, news))
        finally:
            self.engine.cancel(jobs)
        return json_response(reply.whole(jobs, texts)) if texts is not None else Response(status_code=CLIENT_GONE)

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
            after = {"retry-after": str(RETRY_AFTER_S)}
            raise ApiError(503, "the queue is full; try again", code="queue_full", headers=after) from None
        except Closing:
            raise closing() from None

    async def events(
        self, wanted: Wanted, jobs: Sequence[Job], reply: Reply, news: asyncio.Queue[Said]
    ) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        for opening in reply.openings(jobs):
            yield event(opening)
        n_open = len(jobs)
        while n_open:
            said = await news.get()
            if said.error is not None:
                yield event(api_error(said.error).body())
                return
            chunk = reply.chunk(said)
            if chunk is not None:
                yield event(chunk)
            n_open -= said.finish is not None
        if wanted.with_usage:
            yield event(reply.usage_chunk(jobs))
        yield DONE


def usage_told(wanted: Wanted, jobs: Sequence[Job]) -> Callable[[int], dict[str, Any]]:
    """What a stream's chunks say of their usage: nothing, that it comes at the end, or what it is so far."""
    if wanted.with_running_usage:
        return lambda n_told: {"usage": usage(jobs, n_told)}
    return lambda _: {"usage": None} if wanted.with_usage else {}


def template_of(model: Model) -> ChatTemplate | ApiError:
    """The model's chat template, or what those who chat are told."""
    chat = model.chat
    if chat is None or not model.has_tokenizer:
        return ApiError(400, "this model has no chat template; use /v1/completions", code="no_chat_template")
    try:
        return ChatTemplate(chat["template"], chat["tokens"])
    except ApiError as error:
        return error


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
    """What a client is told of an error of the engine's."""
    if isinstance(error, Closing):
        return closing()
    if isinstance(error, GaveUp):
        return ApiError(400, error.fact, code="invalid_value")
    return ApiError(500, error.fact if isinstance(error, LlmcError) else f"unexpected {type(error).__name__}")


def closing() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down")
