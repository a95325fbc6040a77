"""What of an answer is a call of a function, told from what is said to people."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import NamedTuple

from llmc.runtime.parse_json import json_end, not_deep, parse_json
from llmc.runtime.serve.stops import overlap
from llmc.runtime.serve.tools import Form, Tools


class Call(NamedTuple):
    """arguments: JSON."""

    name: str
    arguments: str


class CallScanner:
    """Tells the calls in a text, which comes in pieces, from what is said to people."""

    def __init__(self, tools: Tools, form: Form) -> None:
        self._names, self._form, self._is_forced = set(tools.functions), form, tools.must_call
        self._most = None if tools.may_repeat else 1
        self._opening, self._closing = form.opening.strip(), form.closing.strip()
        self._held = ""
        self._is_in_call = tools.must_call
        self._is_at_start = True
        self._skips_blanks = False  # behind a call
        self.n_calls = 0

    def push(self, piece: str, is_last: bool) -> list[str | Call]:
        """What is said to people and the calls that have come to their end, in their order.  is_last: hold nothing
        back."""
        self._held += piece
        parts: list[str | Call] = []
        while True:
            if self._is_in_call:
                text = self._whole_call(is_last)
                if text is None:
                    break
                found = self._calls_in(text.removesuffix(self._closing))
                self._skips_blanks = bool(found)
                kept = found if self._most is None else found[: self._most - self.n_calls]
                parts += kept if found else [self._as_it_was(text)]
                self.n_calls += len(kept)
            before = self._before_call(is_last)
            before = before.lstrip() if self._skips_blanks else before
            self._skips_blanks &= not before
            parts.append(before)
            if not self._is_in_call:
                break
        return parts

    def _before_call(self, is_last: bool) -> str:
        """What is surely said before the next call; whether that has begun is in _is_in_call."""
        held, opening = self._held, self._opening
        if opening:
            at = held.find(opening)
            self._is_in_call = at >= 0
            if at >= 0:
                self._held = held[at + len(opening) :]
                return held[:at]
            n_safe = len(held) - (0 if is_last else overlap(held, opening))
        elif self._is_at_start and not held.strip():
            n_safe = len(held) if is_last else 0
        else:
            self._is_in_call = self._is_at_start and held.lstrip().startswith("{")
            self._is_at_start = False
            n_safe = 0 if self._is_in_call else len(held)
        self._held = held[n_safe:]
        return held[:n_safe]

    def _whole_call(self, is_last: bool) -> str | None:
        """The text of a call, with its closing where that has come; None: it has not come to its end."""
        held = self._held
        end = -1 if self._is_forced else self._call_end()  # a call that has to come is all there is, to its end
        if end < 0:
            if not is_last:
                return None
            end = len(held)
        self._is_in_call = self._is_at_start = False
        text, self._held = held[:end], held[end:]
        return text

    def _call_end(self) -> int:
        """Where in what is held a call ends, behind its closing; -1: it does not yet."""
        if self._closing:
            at = self._held.find(self._closing)
            return at + len(self._closing) if at >= 0 else -1
        if not self._form.between:
            return -1
        end = arguments_end(self._held, self._form.between)
        return self._held.find(self._opening) if end < 0 else end

    def _calls_in(self, text: str) -> list[Call]:
        return (call_behind_name if self._form.between else calls_in)(text, self._form, self._names)

    def _as_it_was(self, text: str) -> str:
        """What looked like a call and is none."""
        return text if self._is_forced else f"{self._opening}{text}"


def arguments_end(text: str, mark: str) -> int:
    """Where the object behind a mark ends; -1: it does not yet."""
    _, found, rest = text.partition(mark)
    end = json_end(rest) if found and "}" in rest else 0
    return len(text) - len(rest) + end if end else -1


def call_behind_name(text: str, form: Form, names: Collection[str]) -> list[Call]:
    """The call of a name, a mark and arguments; none if anything is wrong."""
    head, _, arguments = text.partition(form.between)
    name = (head.partition(form.id_mark)[0] if form.id_mark else head).strip()
    try:
        return [Call(name, spelled(parse_json(arguments)))] if name in names else []
    except ValueError:
        return []


def calls_in(text: str, form: Form, names: Collection[str]) -> list[Call]:
    """The calls of a JSON object, or of a list of some; none if anything is wrong."""
    calls = []
    try:
        value = parse_json(text)
        for one in value if isinstance(value, list) else [value]:
            name = one.get("name") if isinstance(one, dict) else None
            if not isinstance(name, str) or name not in names:
                return []
            calls.append(Call(name, spelled(one.get(form.key, {}))))
    except ValueError:
        return []
    return calls


def spelled(arguments: object) -> str:
    """As JSON that every client can read.  Raises ValueError: no object, nested too deep, a number that is none."""
    if not isinstance(arguments, dict):
        raise ValueError("arguments are an object")
    return json.dumps(not_deep(arguments), ensure_ascii=False, allow_nan=False)
