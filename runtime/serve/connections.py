"""How many clients may be connected, and for how long one may keep the server waiting."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from llmc.runtime.serve.anthropic_replies import error_body
from llmc.runtime.serve.fields import ApiError
from llmc.runtime.serve.replies import encoded

SPARE_CONNECTIONS = 32
"""So many connections beyond the limit are told that there are too many, or read the metrics.  More are closed."""
LOOKS = 8
"""How many times a connection is looked at within the timeout."""
TOO_SLOW = ApiError(408, "the request did not arrive in time", code="request_timeout")


@dataclass(frozen=True)
class Limits:
    """connections: that are served.  timeout_s: for a request's head, for its body, and between two readings of an
    answer."""

    connections: int
    timeout_s: float


class Connection(H11Protocol):
    """uvicorn's, which ends when its client is too slow.

    Nothing is done where data comes and goes: now and then it is looked whether what is waited for is still the same.
    """

    def __init__(self, limits: Limits, **others: Any) -> None:
        super().__init__(**others)
        self._limits = limits
        self._waiting: tuple[object, ...] = ()
        self._since = 0.0
        self._next_look: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections + SPARE_CONNECTIONS:
            transport.abort()
        else:
            self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._next_look is not None:
            self._next_look.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        waiting, now = self._waits_for(), self.loop.time()
        if not waiting or waiting != self._waiting:
            self._waiting, self._since = waiting, now
        elif now - self._since >= self._limits.timeout_s:
            self._give_up()
            return
        self._next_look = self.loop.call_later(self._limits.timeout_s / LOOKS, self._look)

    def _waits_for(self) -> tuple[object, ...]:
        """What the client has to do next, and how far it is with that; empty: nothing."""
        n_unread = self.transport.get_write_buffer_size()
        if n_unread:
            return "read", n_unread
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            return "send", self.cycle
        return ()

    def _give_up(self) -> None:
        """End the connection, with an answer where a request has begun and can still have one."""
        has_head = self.conn.their_state is h11.SEND_BODY
        has_begun = has_head or self.conn.trailing_data[0]
        if self._waiting[0] == "send" and has_begun and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = encoded(error_body(TOO_SLOW, self.scope["path"] if has_head else ""))
            head = f"HTTP/1.1 408 {HTTPStatus(408).phrase}", "content-type: application/json", "connection: close"
            self.transport.write("\r\n".join((*head, f"content-length: {len(body)}", "", "")).encode() + body)
            self.transport.close()
        else:
            self.transport.abort()
