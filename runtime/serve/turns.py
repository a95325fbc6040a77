"""Messages for a template, put together of the smaller parts that newer APIs have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

BETWEEN = "\n\n"
"""What stands between texts that become one message."""


class Turns:
    """What the assistant thinks, says and calls, one after the other, is one message; so is what the system says first.

    messages: as chats have them.
    """

    def __init__(self, *, joins_users: bool = False) -> None:
        """joins_users: what users say one after the other is one message as well."""
        self.messages: list[dict[str, Any]] = []
        self._names: dict[str, str] = {}  # of calls, by id
        self._joins_users = joins_users

    def go_on_from(self, messages: Iterable[Mapping[str, Any]]) -> None:
        """From an earlier conversation, which stays as it is."""
        for message in messages:
            calls = message.get("tool_calls", [])
            self._names |= {call["id"]: call["function"]["name"] for call in calls}
            self.messages.append({**message, **({"tool_calls": [*calls]} if calls else {})})

    def say(self, role: str, text: str) -> None:
        if role == "assistant":
            self._assistant()["content"] += text
        elif self._joins(role):
            self.messages[-1]["content"] += BETWEEN + text
        else:
            is_first = not self.messages and role == "developer"
            self.messages.append({"role": "system" if is_first else role, "content": text})

    def _joins(self, role: str) -> bool:
        """Whether what this one says goes on the last message."""
        last = self.messages[-1]["role"] if self.messages else None
        if role in ("system", "developer"):
            return last == "system" and len(self.messages) == 1
        return role == "user" == last and self._joins_users

    def think(self, text: str) -> None:
        message = self._assistant()
        if message["content"] or "tool_calls" in message:
            message = self._begin_assistant()
        message["reasoning_content"] = message.get("reasoning_content", "") + text

    def call(self, call_id: str, name: str, arguments: dict[str, Any]) -> None:
        self._names[call_id] = name
        calls = self._assistant().setdefault("tool_calls", [])
        calls.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})

    def result(self, call_id: str, text: str) -> None:
        """Of an earlier call."""
        named = {"name": self._names[call_id]} if call_id in self._names else {}
        self.messages.append({"role": "tool", "tool_call_id": call_id, **named, "content": text})

    def _assistant(self) -> dict[str, Any]:
        """The message that the assistant is at."""
        is_at_it = self.messages and self.messages[-1]["role"] == "assistant"
        return self.messages[-1] if is_at_it else self._begin_assistant()

    def _begin_assistant(self) -> dict[str, Any]:
        self.messages.append({"role": "assistant", "content": ""})
        return self.messages[-1]
