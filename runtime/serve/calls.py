"""Tells calls of functions in an answer from what is said to people."""

from __future__ import annotations

from llmc.runtime.serve.forms import Call, Form
from llmc.runtime.serve.stops import overlap
from llmc.runtime.serve.tools import Tools


class CallScanner:
    """Tells the calls in a text, which comes in pieces, from what is said to people."""

    def __init__(self, tools: Tools, form: Form) -> None:
        self._functions, self._form, self._is_forced = tools.functions, form, tools.must_call
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
                found = self._form.calls_in(text.removesuffix(self._closing), self._functions)
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
            self._is_in_call = self._is_at_start and held.lstrip().startswith(self._form.begin)
            self._is_at_start = False
            n_safe = 0 if self._is_in_call else len(held)
        self._held = held[n_safe:]
        return held[:n_safe]

    def _whole_call(self, is_last: bool) -> str | None:
        """The text of a call, with its closing where that has come; None: it has not come to its end."""
        held = self._held
        end = (
            -1 if self._is_forced else self._form.end_of(self._held)
        )  # a call that has to come is all there is, to its end
        if end < 0:
            if not is_last:
                return None
            end = len(held)
        self._is_in_call = self._is_at_start = False
        text, self._held = held[:end], held[end:]
        return text

    def _as_it_was(self, text: str) -> str:
        """The text of what looked like a call and is none."""
        return text if self._is_forced else f"{self._opening}{text}"
