"""The endpoints, on an event loop that never waits for the model."""

from __future__ import annotations

import re
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from datetime import datetime, timezone
from typing import Any, TypeVar

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llmc.runtime.binding import Model
from llmc.runtime.classification import Classification
from llmc.runtime.embedding import Embedding, Rows, check_finite
from llmc.runtime.errors import LlmcError, shortened
from llmc.runtime.images import Pictured
from llmc.runtime.serve.anthropic_replies import PATH as MESSAGES
from llmc.runtime.serve.anthropic_replies import MessageReply, error_body
from llmc.runtime.serve.anthropic_requests import read_anthropic
from llmc.runtime.serve.chat import ChatTemplate
from llmc.runtime.serve.embeddings import answer_of, in_groups, no_embeddings, no_texts, read_embeddings
from llmc.runtime.serve.engine import Engine
from llmc.runtime.serve.fields import ApiError, no_such_model
from llmc.runtime.serve.generating import RETRY_AFTER_S, Generator
from llmc.runtime.serve.labels import Asked, classify_answer, no_labels, rank_answer, read_classify, read_rank
from llmc.runtime.serve.prompting import Prompted, prompted
from llmc.runtime.serve.replies import Choices, Reply
from llmc.runtime.serve.requests import Chat, read_chat, read_completion
from llmc.runtime.serve.responses_replies import ResponseReply
from llmc.runtime.serve.responses_requests import read_response
from llmc.runtime.serve.sight import Sight
from llmc.runtime.serve.stored import Messages, Stored
from llmc.runtime.serve.tokenizing import detokenized, encoded_text, read_text, read_tokens, tokenized
from llmc.runtime.serve.transport import CLIENT_GONE, json_response, read_json
from llmc.runtime.serve.vocabulary import Vocabulary

T = TypeVar("T")
Endpoint = Callable[[Request], Awaitable[Response]]
PATHS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/embeddings",
    "/v1/rerank",
    "/v1/models",
)
RANKS, CLASSIFIES = ("/v1/rerank", "/v2/rerank", "/rerank"), ("/v1/classify", "/classify")
"""One endpoint under several names."""


class Service:
    """What the endpoints share.

    connections: those that are open; with more than most_connections only /health and /metrics answer.
    """

    def __init__(self, model: Model, engine: Engine, name: str, api_key: str | None = None) -> None:
        """name: of the model, for clients.  api_key: what they have to send, if anything."""
        self.model, self.engine, self.name, self.api_key = model, engine, name, api_key
        self.vocabulary = Vocabulary(model, engine.room)
        self.generator = Generator(model, engine, self.vocabulary)
        self.sight = Sight(model, engine, self.vocabulary)
        self.template, self.embedding, self.labels = template_of(model), model.embedding, model.classification
        self.stored = Stored()
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
            Route("/v1/responses", self.guarded(self.respond), methods=["POST"]),
            Route("/v1/responses/input_tokens", self.guarded(self.count_input), methods=["POST"]),
            Route("/v1/responses/{name}", self.guarded(self.one_response), methods=["GET"]),
            Route("/v1/responses/{name}", self.guarded(self.drop_response), methods=["DELETE"]),
            Route("/v1/messages", self.guarded(self.message), methods=["POST"]),
            Route("/v1/messages/count_tokens", self.guarded(self.count_message), methods=["POST"]),
            Route("/v1/embeddings", self.guarded(self.embeddings), methods=["POST"]),
            *(Route(path, self.guarded(self.rerank), methods=["POST"]) for path in RANKS),
            *(Route(path, self.guarded(self.classify), methods=["POST"]) for path in CLASSIFIES),
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
                bearer = re.sub("^bearer ", "", request.headers.get("authorization", ""), flags=re.IGNORECASE)
                if not (self.is_key(bearer) or self.is_key(request.headers.get("x-api-key", ""))):
                    raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
            return await endpoint(request)

        return self.counted(respond)

    def is_key(self, given: str) -> bool:
        wanted = (self.api_key or "").encode(errors="surrogateescape")
        return secrets.compare_digest(given.encode("latin-1"), wanted)

    def counted(self, endpoint: Endpoint) -> Endpoint:
        async def respond(request: Request) -> Response:
            try:
                response = await endpoint(request)
            except ApiError as error:
                response = error_response(request, error)
            self.responses[response.status_code] += 1
            return response

        return respond

    async def not_found(self, request: Request, error: HTTPException) -> Response:
        self.responses[error.status_code] += 1
        fact = f"{request.method} {shortened(request.url.path)}: {error.detail.lower()}"
        if error.status_code == 404 and request.url.path.startswith("/v1/"):
            fact += f"; this server has {', '.join(PATHS)}"
        return error_response(request, ApiError(error.status_code, fact, headers=error.headers))

    async def failed(self, request: Request, error: Exception) -> Response:
        self.responses[500] += 1
        return error_response(request, ApiError(500, f"unexpected {type(error).__name__}; the server's log has more"))

    # -- facts --------------------------------------------------------------------

    def asked_for(self, body: object) -> str:
        """The name that a request may ask for: an adapter's, if it does, or else the model's.  Raises ApiError."""
        name, adapters = body.get("model") if isinstance(body, dict) else None, self.model.adapters
        if isinstance(name, str) and name not in (self.name, *adapters):
            raise no_such_model(name, self.name, "model", adapters=adapters)
        return name if isinstance(name, str) else self.name

    def facts(self, name: str) -> dict[str, Any]:
        """Facts about the model or an adapter, in the fields of OpenAI, vLLM and Anthropic together."""
        created_at = datetime.fromtimestamp(self.created, timezone.utc).isoformat()
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "llmc",
            **dict.fromkeys(("max_model_len", "max_input_tokens", "max_tokens"), self.engine.room),
            "type": "model",
            "display_name": name,
            "created_at": created_at,
            **({"root": name, "parent": self.name if name != self.name else None} if self.model.adapters else {}),
        }

    async def models(self, request: Request) -> Response:
        data = [self.facts(name) for name in (self.name, *self.model.adapters)]
        return json_response({"object": "list", "data": data, "has_more": False})

    async def one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in (self.name, *self.model.adapters):
            raise no_such_model(name, self.name, adapters=self.model.adapters)
        return json_response(self.facts(name))

    async def tokenize(self, request: Request) -> Response:
        text = await read_json(request, lambda body: read_text(body, self.asked_for(body), self.template))
        return json_response(await run_in_threadpool(tokenized, text, self.vocabulary))

    async def detokenize(self, request: Request) -> Response:
        ids = await read_json(request, lambda body: read_tokens(body, self.asked_for(body)))
        return json_response(await run_in_threadpool(detokenized, ids, self.vocabulary))

    async def health(self, request: Request) -> Response:
        failure = self.engine.failure
        return json_response({"status": f"failing: {failure}" if failure else "ok"}, 503 if failure else 200)

    async def metrics(self, request: Request) -> Response:
        page = self.engine.meters.page(self.engine.state, self.responses, len(self.connections))
        return Response(page, media_type="text/plain; version=0.0.4")

    # -- embeddings ---------------------------------------------------------------

    async def embeddings(self, request: Request) -> Response:
        how = self.embedding
        if how is None:
            raise no_embeddings(self.does)
        asked = await read_json(request, lambda body: read_embeddings(body, self.name, how))
        prompts = [await run_in_threadpool(self.vocabulary.ids_of, prompt, "input") for prompt in asked.prompts]
        rows = await self.rows(request, prompts, how)
        if rows is None:
            return Response(status_code=CLIENT_GONE)
        return json_response(answer_of(rows, asked, how, self.name, sum(map(len, prompts))))

    async def rows(self, request: Request, prompts: Sequence[tuple[int, ...]], how: Embedding) -> list[Rows] | None:
        """What these are made into; None: the client has gone.  Raises ApiError: no numbers."""
        rows: list[Rows] = []
        for some in in_groups(prompts, self.engine.max_batch):
            found = await self.generator.rows(request, some, how)
            if found is None:
                return None
            rows += found
        try:
            check_finite(np.stack(rows), self.name)  # JSON has neither NaN nor infinity
        except LlmcError as error:
            raise ApiError(500, error.fact) from None
        return rows

    @property
    def does(self) -> str:
        """What the model is for, in words."""
        return "makes embeddings" if self.embedding else "gives texts labels" if self.labels else "writes texts"

    # -- labels -------------------------------------------------------------------

    async def rerank(self, request: Request) -> Response:
        return await self.label(request, lambda body, how: read_rank(body, self.name, how), rank_answer)

    async def classify(self, request: Request) -> Response:
        return await self.label(request, lambda body, how: read_classify(body, self.name), classify_answer)

    async def label(
        self, request: Request, read: Callable[[object, Classification], Asked], answer: Callable[..., Any]
    ) -> Response:
        """answer: of the texts' logits, see labels.py."""
        how = self.labels
        if how is None:
            raise no_labels(self.does)
        asked = await read_json(request, lambda body: read(body, how))
        prompts = await run_in_threadpool(self.vocabulary.ids_of_each, asked.texts, how, asked.field, asked.truncate)
        rows = await self.rows(request, prompts, how.logits)
        if rows is None:
            return Response(status_code=CLIENT_GONE)
        return json_response(answer(rows, asked, how, self.name, sum(map(len, prompts))))

    # -- texts --------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        self.check_writes()
        asked = await read_json(
            request, lambda body: read_completion(body, self.asked_for(body), self.engine.max_batch)
        )
        wanted = asked.wanted
        self.generator.check_number(len(asked.prompts) * wanted.n)
        prompts = [await run_in_threadpool(self.vocabulary.ids_of, prompt, "prompt") for prompt in asked.prompts]
        for prompt, ids in zip(asked.prompts, prompts, strict=True):
            if isinstance(prompt, str):
                self.sight.prompt(ids, [], "prompt")  # which takes no pictures
        echoes = []
        if asked.echo:
            pairs = zip(asked.prompts, prompts, strict=True)
            echoes = [self.vocabulary.text_of(prompt, ids) for prompt, ids in pairs for _ in range(wanted.n)]
        reply = Choices("completion", wanted.model, wanted, echoes)
        scores = asked.echo and wanted.n_top is not None
        return await self.generator.generate(request, wanted, prompts, reply, scores_prompt=scores)

    async def chat(self, request: Request) -> Response:
        asked = await self.read(request, read_chat, self.engine.max_batch)
        return await self.answer(
            request, asked, lambda about: Choices("chat", asked.wanted.model, asked.wanted, answer=about.answer)
        )

    async def respond(self, request: Request) -> Response:
        asked = await self.read(request, read_response, self.stored.messages)

        def keep(response: dict[str, Any], said: Messages) -> None:
            self.stored.keep(response, (*asked.talk, *said))

        kept = keep if asked.said["store"] else None
        return await self.answer(
            request,
            asked.chat,
            lambda about: ResponseReply(about.wanted.model, asked.said, about.answer(), kept),
            "input",
        )

    async def message(self, request: Request) -> Response:
        asked = await self.read(request, read_anthropic)
        return await self.answer(
            request, asked, lambda about: MessageReply(asked.wanted.model, asked.wanted, about.answer())
        )

    async def read(self, request: Request, read: Callable[..., T], *also: object, **more: object) -> T:
        """What is asked of the model, or of an adapter; its messages may have pictures, where these are taken."""
        more = more | {"takes_pictures": self.sight.takes_pictures}
        return await read_json(
            request, lambda body: read(body, self.asked_for(body), *also, **more), self.sight.most_bytes
        )

    async def one_response(self, request: Request) -> Response:
        return Response(self.stored.response(request.path_params["name"]), media_type="application/json")

    async def drop_response(self, request: Request) -> Response:
        name = request.path_params["name"]
        self.stored.drop(name)
        return json_response({"id": name, "object": "response", "deleted": True})

    async def count_input(self, request: Request) -> Response:
        asked = await self.read(request, read_response, self.stored.messages)
        n = await self.count(asked.chat, "input")
        return json_response({"object": "response.input_tokens", "input_tokens": n})

    async def count_message(self, request: Request) -> Response:
        asked = await self.read(request, read_anthropic, is_counted=True)
        return json_response({"input_tokens": await self.count(asked)})

    async def answer(
        self, request: Request, chat: Chat, reply_of: Callable[[Prompted], Reply], field: str = "messages"
    ) -> Response:
        """To messages.  field: of the request, that has them."""
        pictures = chat.pictures

        def prompt() -> tuple[Prompted, Pictured]:
            about = prompted(chat, self.known_template(), self.vocabulary)
            return about, self.sight.prompt(self.vocabulary.ids_of(about.text, field, False), pictures, field)

        self.check_writes()
        about, pictured = await self.sight.do(prompt, pictures, field)
        also = {"shown": about.shown, "thinking": about.thinking, "pictures": pictured.seen}
        return await self.generator.generate(request, about.wanted, [pictured.ids], reply_of(about), **also)

    def check_writes(self) -> None:
        if self.embedding is not None or self.labels is not None:
            raise no_texts(self.does, "/v1/embeddings" if self.embedding else "/v1/rerank, or /classify")

    async def count(self, chat: Chat, field: str = "messages") -> int:
        """Tokens of its prompt.  field: of the request, that has its messages."""
        pictures = chat.pictures

        def prompt() -> int:
            about = prompted(chat, self.known_template(), self.vocabulary)
            return self.sight.count(encoded_text(about.text, False, self.vocabulary), pictures, field)

        return await self.sight.do(prompt, pictures, field)

    def known_template(self) -> ChatTemplate:
        if isinstance(self.template, ApiError):
            raise self.template
        return self.template


def error_response(request: Request, error: ApiError) -> Response:
    path = MESSAGES if "anthropic-version" in request.headers else request.url.path  # who asks for /v1/models, too
    return json_response(error_body(error, path), error.status, error.headers)


def template_of(model: Model) -> ChatTemplate | ApiError:
    """The model's chat template, or what those who chat are told."""
    chat = model.chat
    if chat is None or not model.has_tokenizer:
        return ApiError(400, "this model has no chat template; use /v1/completions", code="no_chat_template")
    try:
        return ChatTemplate(chat["template"], chat["tokens"], chat.get("tool_use"), lambda: model.images.mark)
    except ApiError as error:
        return error
