"""Messages for a template, put together of the smaller parts that newer APIs have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llmc.runtime.serve.contents import Content, content_of, pieces_of

BETWEEN = "\n\n"
"""What stands between texts that become one message."""
TEXTS = ("content", "reasoning_content")
"""The fields of a message that hold text, or pictures."""


class Turns:
    """What the assistant thinks, says and calls, one after the other, is one message; so is what the system says
    first."""

    def __init__(self, *, joins_users: bool = False) -> None:
        """joins_users: what users say one after the other is one message as well."""
        self._messages: list[dict[str, Any]] = []  # their TEXTS in pieces, of which there may be many
        self._names: dict[str, str] = {}  # of calls, by id
        self._joins_users = joins_users

    @property
    def messages(self) -> tuple[dict[str, Any], ...]:
        """As chats have them."""
        return tuple(
            {name: content_of(value) if name in TEXTS else value for name, value in message.items()}
            for message in self._messages
        )

    def go_on_from(self, messages: Iterable[Mapping[str, Any]]) -> None:
        """Go on from an earlier conversation, which stays as it is."""
        for message in messages:
            calls = message.get("tool_calls", [])
            self._names |= {call["id"]: call["function"]["name"] for call in calls}
            texts = {name: pieces_of(message[name]) for name in TEXTS if name in message}
            self._messages.append({**message, **texts, **({"tool_calls": [*calls]} if calls else {})})

    def say(self, role: str, said: Content) -> None:
        if role == "assistant":
            self._assistant()["content"] += pieces_of(said)
        elif self._joins(role):
            self._messages[-1]["content"] += [BETWEEN, *pieces_of(said)]
        else:
            is_first = not self._messages and role == "developer"
            self._messages.append({"role": "system" if is_first else role, "content": pieces_of(said)})

    def _joins(self, role: str) -> bool:
        """Whether what this one says goes on the last message."""
        last = self._messages[-1]["role"] if self._messages else None
        if role in ("system", "developer"):
            return last == "system" and len(self._messages) == 1
        return role == "user" == last and self._joins_users

    def think(self, text: str) -> None:
        message = self._assistant()
        if message["content"] or "tool_calls" in message:
            message = self._begin_assistant()
        message.setdefault("reasoning_content", []).append(text)

    def call(self, call_id: str, name: str, arguments: dict[str, Any]) -> None:
        self._names[call_id] = name
        calls = self._assistant().setdefault("tool_calls", [])
        calls.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})

    def result(self, call_id: str, said: Content) -> None:
        """Add the result of an earlier call."""
        named = {"name": self._names[call_id]} if call_id in self._names else {}
        self._messages.append({"role": "tool", "tool_call_id": call_id, **named, "content": pieces_of(said)})

    def _assistant(self) -> dict[str, Any]:
        """The message that the assistant is at."""
        is_at_it = self._messages and self._messages[-1]["role"] == "assistant"
        return self._messages[-1] if is_at_it else self._begin_assistant()

    def _begin_assistant(self) -> dict[str, Any]:
        self._messages.append({"role": "assistant", "content": []})
        return self._messages[-1]
