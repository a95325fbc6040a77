"""Requests and responses: bodies of a bounded size, streams that end with their client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from llmc.runtime.errors import shortened
from llmc.runtime.parse_json import parse_strict_json, parse_strict_json_patiently
from llmc.runtime.serve.fields import ApiError
from llmc.runtime.serve.replies import encoded

T = TypeVar("T")
MAX_BODY_BYTES, MAX_PICTURED_BYTES = 8 << 20, 32 << 20
"""Of a body; the second one where pictures are taken, which are sent in it."""
MOST_BYTES = 256 << 20
"""Of a body that is too large, read so that its client, which sends before it listens, learns of that."""
LARGE_BODY_BYTES = 256 << 10
"""Larger bodies are read on a thread, and so that others run meanwhile."""
CLIENT_GONE = 499
"""nginx's status for a client that did not wait; nobody receives it."""


async def read_json(request: Request, read: Callable[[object], T], most: int = MAX_BODY_BYTES) -> T:
    """What is read from the body of a request, of at most so many bytes.  Raises ApiError: another type, too large, or
    not JSON."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the content type of the request must be application/json")
    if (encoding := request.headers.get("content-encoding", "identity").strip().lower()) != "identity":
        raise ApiError(415, f"the body of the request is encoded as {shortened(encoding)}; send it as it is")
    body = await read_body(request, most)
    if len(body) <= LARGE_BODY_BYTES:
        return read(parsed(body, parse_strict_json))
    return await run_in_threadpool(lambda: read(parsed(body, parse_strict_json_patiently)))


async def read_body(request: Request, most: int) -> bytearray:
    """Raises ApiError: it is too large, or its client has gone."""
    fact = f"the body of the request is larger than {most >> 20} MiB"
    too_large = ApiError(413, fact, headers={"connection": "close"})
    declared = request.headers.get("content-length", "0")
    if "expect" in request.headers and declared.isdecimal() and int(declared) > most:
        raise too_large  # its client waits for leave to send
    body, n_bytes = bytearray(), 0
    try:
        async for part in request.stream():
            n_bytes += len(part)
            if n_bytes > MOST_BYTES:
                raise too_large
            if n_bytes > most:
                body.clear()
            else:
                body += part
    except ClientDisconnect:
        raise ApiError(CLIENT_GONE, "the client has gone") from None
    if n_bytes > most:
        raise too_large
    return body


def parsed(body: bytearray, parse: Callable[[bytearray], object]) -> object:
    try:
        return parse(body)
    except ValueError as error:
        raise ApiError(400, f"the body of the request is not JSON: {error}") from None


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(encoded(value), status, headers, media_type="application/json")


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of the work; None when the client has gone before, and the work is given up."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()


async def disconnect(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        """close: called at the end, whoever made it."""
        super().__init__(events, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self.stream_response(send))
        finally:
            self._close()
