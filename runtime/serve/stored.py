"""Responses that were given, as long as there is room, for clients that go on from them by their ids."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, NamedTuple

from llmc.runtime.errors import shortened
from llmc.runtime.serve.contents import size_of
from llmc.runtime.serve.fields import ApiError
from llmc.runtime.serve.replies import encoded
from llmc.runtime.serve.turns import TEXTS

MOST_CHARACTERS = 1 << 26
"""All responses and conversations together; those that nobody has gone on from for the longest are forgotten first."""

Messages = tuple[dict[str, Any], ...]


class Kept(NamedTuple):
    """response: as its client has it, in JSON, which takes a quarter of the room.  messages: the conversation with it,
    as chats have them, without instructions."""

    response: bytes
    messages: Messages
    n_characters: int


class Stored:
    """Responses by their ids, for any threads."""

    def __init__(self, most_characters: int = MOST_CHARACTERS) -> None:
        self.most_characters, self.n_characters = most_characters, 0
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, response: dict[str, Any], messages: Messages) -> None:
        said = encoded(response)
        kept = Kept(said, messages, len(said) + n_characters(messages))
        with self._lock:
            self._kept[response["id"]] = kept
            self.n_characters += kept.n_characters
            while self.n_characters > self.most_characters:
                self.n_characters -= self._kept.popitem(last=False)[1].n_characters

    def messages(self, name: str) -> Messages:
        """The conversation so far.  Raises ApiError: it is not there."""
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
                return self._kept[name].messages
        fact = f"'previous_response_id': there is no response {shortened(name)!r}, or no more; send all as 'input'"
        raise ApiError(400, fact, param="previous_response_id", code="previous_response_not_found")

    def response(self, name: str) -> bytes:
        """JSON.  Raises ApiError: it is not there."""
        with self._lock:
            if name in self._kept:
                return self._kept[name].response
        raise no_response(name)

    def drop(self, name: str) -> None:
        """Raises ApiError: it is not there."""
        with self._lock:
            kept = self._kept.pop(name, None)
            self.n_characters -= kept.n_characters if kept else 0
        if kept is None:
            raise no_response(name)


def no_response(name: str) -> ApiError:
    return ApiError(404, f"there is no response {shortened(name)!r}, or no more", code="not_found")


def n_characters(messages: Iterable[dict[str, Any]]) -> int:
    n_said = sum(size_of(one.get(name, "")) for one in messages for name in TEXTS)
    return n_said + len(encoded([one.get("tool_calls") for one in messages]))
