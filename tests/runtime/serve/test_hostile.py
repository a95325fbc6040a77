"""Bodies that no client should send: each is answered in a line, and nothing is left of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator
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
from llmc.runtime.serve.stored import Stored
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
    if status == 200:
        lines = said.split(b"\n") if said.startswith((b"event: ", b"data: ")) else [said]
        for line in lines:
            if line.startswith((b"data: {", b"{")):
                json.loads(line.removeprefix(b"data: "), parse_constant=pytest.fail)
    else:
        words = json.loads(said)["error"]["message"]
        assert words
        assert "\n" not in words
        assert len(words) < 300


def storm(path: Path, url: str, sent: Iterable[bytes]) -> set[int]:
    """All of these, to a server's application of this artifact -> the statuses of its answers."""
    statuses: set[int] = set()

    async def ask_all(service: Service) -> None:
        for body in sent:
            status, said = await ask(service, url, body)
            statuses.add(status)
            check(status, said)

    with llmc.load(path, threads=1) as model:
        loop = asyncio.new_event_loop()

        def post(news: list[Said]) -> None:
            loop.call_soon_threadsafe(deliver, news)

        engine = Engine(model, post, max_batch=2, queue=2)
        service = Service(model, engine, "toy")
        service.most_connections = 1
        engine.start()
        try:
            loop.run_until_complete(ask_all(service))
        finally:
            engine.close()
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()
        assert engine.meters.counts["failed"] == 0
        assert engine.batch.pages.n_free == engine.batch.pages.total
        assert not engine.batch.running
    return statuses


def test_nothing_is_left_of_bodies_that_are_wrong(toy_so: Path) -> None:
    """Some of them are right: they are texts."""
    fields = (*FIELDS, *requests.REFUSED_IN_COMPLETIONS, "prompt", "echo", "logprobs")
    # With any of both replaced the tokens are the same in each run: there is one that makes the toy's kernels fail.
    good = {"prompt": [1, 2], "max_tokens": 2, "temperature": 0, "seed": 7}
    assert storm(toy_so, "/v1/completions", bodies(good, fields)) == {200, 400, 404}


TALK: Any = [{"role": "user", "content": "x"}]
APIS: Any = {
    "chat": (
        {"messages": TALK},
        (*FIELDS, *requests.REFUSED_IN_CHATS, *requests.CHAT_FIELDS),
        lambda body: requests.read_chat(body, "toy", 2),
    ),
    "responses": (
        {"input": TALK, "max_output_tokens": 2},
        (*TEXT_FIELDS, *responses_requests.REFUSED_IN_RESPONSES, *responses_requests.RESPONSE_FIELDS),
        lambda body: responses_requests.read_response(body, "toy", Stored().messages),
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


@pytest.mark.parametrize(
    ("api", "kind", "choice", "fields"),
    [
        ("responses", "function", "none", responses_requests.RESPONSE_FIELDS),
        ("messages", "custom", {"type": "none"}, anthropic_requests.MESSAGE_FIELDS),
    ],
)
def test_nothing_is_left_of_answers_of_other_forms(
    talking_so: Path, api: str, kind: str, choice: object, fields: tuple[str, ...]
) -> None:
    tools = {"tools": [{"type": kind, "name": "f"}], "tool_choice": choice}
    good = {**APIS[api][0], **tools, "stream": True, "temperature": 0}
    assert storm(talking_so, f"/v1/{api}", bodies(good, (*fields, "stream", "metadata", "model"))) == {200, 400, 404}


def test_a_choice_is_named_once() -> None:
    assert Grammar.of_choice(["x"] * 5000) == Grammar.of_choice(["x"])
