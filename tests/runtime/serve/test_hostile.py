"""Bodies that no client should send: each is answered in a line, and nothing is left of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llmc
from llmc.runtime.grammar import Grammar
from llmc.runtime.parse_json import parse_strict_json
from llmc.runtime.serve import anthropic_requests, requests, responses_requests
from llmc.runtime.serve.app import Service
from llmc.runtime.serve.engine import Engine
from llmc.runtime.serve.fields import ApiError
from llmc.runtime.serve.job import Said
from llmc.runtime.serve.server import deliver
from llmc.runtime.serve.wanted import TEXT_FIELDS

DEEP = "[" * 400 + "]" * 400
VALUES = (
    *("true", "-1", "1.5", "1e400", "NaN", "9" * 30, "9" * 5000, "[]", "{}", "[[1]]", "[true]", DEEP, "[" * 100_000),
    *('""', '"\\ud800"', '"x\\ny"', f'"{"a" * 9999}"', '{"a": 1}', '{"a": 1, "a": 2}', '{"1": 1e400}', '{"99": 1}'),
    *('["x", 1]', '[""]', '{"type": ["x"]}', '{"regex": "("}', '[{"role": 3}]', '[{"role": "user", "content": {}}]'),
)
FIELDS = (*requests.FIELDS, "frob", "a\nb")


def bodies(good: dict[str, Any], fields: tuple[str, ...]) -> Iterator[bytes]:
    """A good one with each field replaced by each value."""
    for name in dict.fromkeys(fields):
        rest = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in good.items() if key != name]
        yield from (f"{{{', '.join([*rest, f'{json.dumps(name)}: {value}'])}}}".encode() for value in VALUES)


async def ask(service: Service, path: str, body: bytes) -> tuple[int, bytes]:
    """A request to the server's application -> (status, body)."""
    said: list[Any] = []
    messages = iter([{"type": "http.request", "body": body}])

    async def receive() -> Any:
        return next(messages, None) or await asyncio.Event().wait()

    async def send(message: Any) -> None:
        said.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
    await service.app()(scope, receive, send)
    return said[0]["status"], b"".join(message.get("body", b"") for message in said[1:])


def check(status: int, said: bytes) -> None:
    assert status in (200, 400, 404), said
    if status != 200:
        words = json.loads(said)["error"]["message"]
        assert words
        assert "\n" not in words
        assert len(words) < 300


def test_nothing_is_left_of_bodies_that_are_wrong(toy_so: Path) -> None:
    """Some of them are right: they are texts."""
    statuses: set[int] = set()

    async def storm(service: Service) -> None:
        good = {"prompt": [1, 2], "max_tokens": 2}
        for body in bodies(good, (*FIELDS, *requests.REFUSED_IN_COMPLETIONS, "prompt", "echo", "logprobs")):
            status, said = await ask(service, "/v1/completions", body)
            statuses.add(status)
            check(status, said)

    with llmc.load(toy_so, threads=1) as model:
        loop = asyncio.new_event_loop()

        def post(news: list[Said]) -> None:
            loop.call_soon_threadsafe(deliver, news)

        engine = Engine(model, post, max_batch=2, queue=2)
        service = Service(model, engine, "toy")
        service.most_connections = 1
        engine.start()
        try:
            loop.run_until_complete(storm(service))
        finally:
            engine.close()
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()
        assert statuses == {200, 400, 404}
        assert engine.meters.counts["failed"] == 0
        assert engine.batch.pages.n_free == engine.batch.pages.total
        assert not engine.batch.running


TALK: Any = [{"role": "user", "content": "x"}]
APIS: Any = {
    "chat": (
        {"messages": TALK},
        (*FIELDS, *requests.REFUSED_IN_CHATS, *requests.CHAT_FIELDS),
        lambda body: requests.read_chat(body, "toy", 2),
    ),
    "responses": (
        {"input": TALK},
        (*TEXT_FIELDS, *responses_requests.REFUSED_IN_RESPONSES, *responses_requests.RESPONSE_FIELDS),
        lambda body: responses_requests.read_response(body, "toy"),
    ),
    "messages": (
        {"messages": TALK, "max_tokens": 2},
        (*TEXT_FIELDS, *anthropic_requests.REFUSED_IN_MESSAGES, *anthropic_requests.MESSAGE_FIELDS),
        lambda body: anthropic_requests.read_anthropic(body, "toy"),
    ),
}


@pytest.mark.parametrize("api", APIS)
def test_whatever_a_chat_is_made_of_it_is_read_or_refused(api: str) -> None:
    good, fields, read = APIS[api]
    n_read = 0
    for body in bodies(good, fields):
        try:
            read(parse_strict_json(body))
            n_read += 1
        except (ApiError, ValueError) as error:
            check(400, json.dumps({"error": {"message": str(error)}}).encode())
    assert n_read > 30


def test_a_choice_is_named_once() -> None:
    assert Grammar.of_choice(["x"] * 5000) == Grammar.of_choice(["x"])
