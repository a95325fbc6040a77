"""What a model thinks before it answers, told from the answer: between the marks that its chat template shows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from llmc.runtime.serve.stops import overlap


class Scanner(Protocol):
    def push(self, piece: str, is_last: bool) -> tuple[str, str]:
        """-> (more of the thought, more of the answer).  is_last: hold nothing back."""
        ...


class Frame(NamedTuple):
    """What stands before a thought, what ends it, what stands behind that, and before the answer."""

    before: str
    end: str
    behind: str
    answer: str


class Marks(Protocol):
    """How thoughts are written.  special: what may be special tokens.  opening, closing: around a thought; "" where no
    one token is, and what there is instead is the frame."""

    @property
    def special(self) -> tuple[str, ...]: ...
    @property
    def opening(self) -> str: ...
    @property
    def closing(self) -> str: ...
    @property
    def frame(self) -> Frame | None: ...

    def is_open(self, prompt: str) -> bool:
        """Whether the template has begun the thought already."""

    def is_over(self, prompt: str) -> bool:
        """Whether the template has written an empty thought, so that none comes."""

    def answer_behind(self, prompt: str) -> str:
        """What has to follow the prompt so that the answer does."""

    def call_behind(self, prompt: str) -> str:
        """The same of a call of a function, with its opening."""

    def scanner(self, is_open: bool, has_calls: bool = False) -> Scanner:
        """For a text behind a prompt that is_open.  has_calls: calls of functions are looked for in the answer."""


@dataclass(frozen=True)
class Pair:
    """A thought between two marks.  word: what the first of them is followed by."""

    opening: str
    closing: str
    word: str = ""
    frame = None

    @property
    def special(self) -> tuple[str, ...]:
        return self.opening, self.closing

    def is_open(self, prompt: str) -> bool:
        return prompt.rstrip().endswith(self.opening + self.word)

    def is_over(self, prompt: str) -> bool:
        return prompt.rstrip().endswith(self.closing)

    def answer_behind(self, prompt: str) -> str:
        return f"{self.closing}\n\n" if self.is_open(prompt) else ""

    def call_behind(self, prompt: str) -> str:
        return self.answer_behind(prompt)

    def scanner(self, is_open: bool, has_calls: bool = False) -> Scanner:
        return PairScanner(self, is_open)


class Channels:
    """Messages in channels: <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…"""

    special = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
    opening = closing = ""
    frame = Frame("<|channel|>analysis<|message|>", "<|end|>", "<|start|>assistant", "<|channel|>final<|message|>")

    def is_open(self, prompt: str) -> bool:
        return False

    def is_over(self, prompt: str) -> bool:
        return False

    def answer_behind(self, prompt: str) -> str:
        return self.frame.answer

    def call_behind(self, prompt: str) -> str:
        return ""

    def scanner(self, is_open: bool, has_calls: bool = False) -> Scanner:
        return ChannelScanner(has_calls)


THINK = Pair("<think>", "</think>")  # DeepSeek, Qwen 3, GLM
SEED = Pair("<seed:think>", "</seed:think>")
MISTRAL = Pair("[THINK]", "[/THINK]")
GEMMA = Pair("<|channel>", "<channel|>", "thought")
COMMAND = Pair("<|START_THINKING|>", "<|END_THINKING|>")
HARMONY = Channels()  # gpt-oss


def marks_of(template: str) -> Marks | None:
    """Those that a chat template shows."""
    if HARMONY.answer_behind("") in template:
        return HARMONY
    return next((marks for marks in (THINK, SEED, MISTRAL, GEMMA, COMMAND) if marks.closing in template), None)


HEADS = "<|start|>", "<|channel|>", " to="
TO_FUNCTION = re.compile(r"\bto=(functions\.[\w.-]+)")


class ChannelScanner:
    """Splits messages in channels: what is said in "analysis" is the thought, all else is the answer.

    Where calls are looked for, a message to a function keeps as much of its head as the form HARMONY has.
    """

    def __init__(self, has_calls: bool = False) -> None:
        self._has_calls = has_calls
        self._held = self._kept = ""
        self._channel: str | None = None  # None: in the head of a message

    def push(self, piece: str, is_last: bool) -> tuple[str, str]:
        self._held += piece
        thought = answer = ""
        while self._held:
            if self._channel is None and not self._read_head(is_last):
                break
            answer, self._kept = answer + self._kept, ""
            text, is_whole = self._read_text(is_last)
            if self._channel == "analysis":
                thought += text
            else:
                answer += text
            if not is_whole:
                break
            self._channel = None
        return thought, answer

    def _read_head(self, is_last: bool) -> bool:
        """Whether it is known in what channel the text is that follows."""
        head, found, rest = self._held.partition("<|message|>")
        is_head = head.startswith(HEADS)
        may_be_head = is_head or any(mark.startswith(self._held) for mark in HEADS)
        if is_head and found:
            self._channel, self._held = (head.partition("<|channel|>")[2].split() or [""])[0], rest
            function = TO_FUNCTION.search(head) if self._has_calls else None
            if function:
                self._channel, self._kept = "commentary", f"<|channel|>commentary to={function[1]}<|message|>"
        elif may_be_head and not is_last:
            return False
        else:
            self._channel, self._held = "", "" if is_head else self._held  # one that was cut off says nothing
        return True

    def _read_text(self, is_last: bool) -> tuple[str, bool]:
        """-> (what there is of it, whether the message is over)."""
        text, found, rest = self._held.partition("<|end|>")
        if found:
            self._held = rest
            return text, True
        n_safe = len(text) - (0 if is_last else overlap(text, "<|end|>"))
        self._held = text[n_safe:]
        return text[:n_safe], False


class PairScanner:
    """Splits a text, which comes in pieces, into the thought that it begins with, if it does, and the answer.

    Blanks around either, next to a mark, belong to neither.
    """

    def __init__(self, marks: Pair, is_open: bool) -> None:
        """is_open: the thought has begun in the prompt."""
        self._marks = marks
        self._held = ""
        self._is_in_thought, self._may_begin = is_open, not is_open
        self._skips_blanks = is_open

    def push(self, piece: str, is_last: bool) -> tuple[str, str]:
        self._held += piece
        if self._may_begin and not self._begin(is_last):
            return "", ""
        thought = self._think(is_last) if self._is_in_thought else ""
        if self._is_in_thought:
            return thought, ""
        return thought, self._shown()

    def _begin(self, is_last: bool) -> bool:
        """Whether it is clear what the text begins with."""
        text, opening = self._held.lstrip(), self._marks.opening + self._marks.word
        if not is_last and len(text) < len(opening) and opening.startswith(text):
            return False
        self._may_begin = False
        if text.startswith(opening):
            self._held = text.removeprefix(opening)
            self._is_in_thought = self._skips_blanks = True
        return True

    def _think(self, is_last: bool) -> str:
        held, closing = self._held, self._marks.closing
        before, found, behind = held.partition(closing)
        if found:
            self._held, self._is_in_thought = behind, False
            thought = self._begun(before).rstrip()
            self._skips_blanks = True
            return thought
        n_safe = len(held) if is_last else len(held[: len(held) - overlap(held, closing)].rstrip())
        self._held = held[n_safe:]
        return self._begun(held[:n_safe])

    def _shown(self) -> str:
        held, self._held = self._held, ""
        return self._begun(held)

    def _begun(self, text: str) -> str:
        """Without the blanks that it begins with, behind a mark."""
        text = text.lstrip() if self._skips_blanks else text
        self._skips_blanks &= not text
        return text
