"""What a model thinks before it answers, told from the answer: between the marks that its chat template shows."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.runtime.serve.stops import overlap


@dataclass(frozen=True)
class Marks:
    opening: str
    closing: str

    def is_open(self, prompt: str) -> bool:
        """Whether the template has begun the thought already."""
        return prompt.rstrip().endswith(self.opening)

    def is_over(self, prompt: str) -> bool:
        """Whether the template has written an empty thought, so that none comes."""
        return prompt.rstrip().endswith(self.closing)


MARKS = (
    Marks("<think>", "</think>"),  # DeepSeek, Qwen 3, GLM
    Marks("[THINK]", "[/THINK]"),  # Mistral
)


def marks_of(template: str) -> Marks | None:
    """Those that a chat template shows."""
    return next((marks for marks in MARKS if marks.closing in template), None)


class ThoughtScanner:
    """Splits a text, which comes in pieces, into the thought that it begins with, if it does, and the answer.

    Blanks around either, next to a mark, belong to neither.
    """

    def __init__(self, marks: Marks, is_open: bool) -> None:
        """is_open: the thought has begun in the prompt."""
        self._marks = marks
        self._held = ""
        self._is_in_thought, self._may_begin = is_open, not is_open
        self._skips_blanks = is_open

    def push(self, piece: str, is_last: bool) -> tuple[str, str]:
        """-> (more of the thought, more of the answer).  is_last: hold nothing back."""
        self._held += piece
        if self._may_begin and not self._begin(is_last):
            return "", ""
        thought = self._think(is_last) if self._is_in_thought else ""
        if self._is_in_thought:
            return thought, ""
        return thought, self._shown()

    def _begin(self, is_last: bool) -> bool:
        """Whether it is clear what the text begins with."""
        text, opening = self._held.lstrip(), self._marks.opening
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
