"""A file that keeps what a model knows of a prompt: the next one that begins alike is read from where it differs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from llmc.runtime.adapters import restored
from llmc.runtime.errors import LlmcError
from llmc.runtime.sequence import StrPath, as_ids, as_path, common

if TYPE_CHECKING:
    from llmc.runtime.binding import Model
    from llmc.runtime.sequence import Sequence

MOST_KNOWN = 3 / 4
"""A file that has so much of a prompt is left as it is: writing it again would take longer than reading the rest."""


class PromptCache:
    """path: of the file; it is made where there is none.  n_found: tokens of the last prompt that were in it."""

    def __init__(self, path: StrPath, *, read_only: bool = False) -> None:
        self.path, self.read_only = path, read_only
        self.n_found = 0
        self._failure: LlmcError | None = None

    @classmethod
    def of(cls, path: StrPath | None) -> PromptCache | None:
        return None if path is None else cls(path)

    def read(self, model: Model, prompt: list[int], adapter: str | None = None) -> Sequence:
        """A sequence that has read the prompt, through an adapter if one is named, and its logits; the caller closes
        it.

        Raises LlmcError for a file of something else, which stays as it is.  What goes wrong in writing it, after the
        prompt has been read, `check` tells later.
        """
        self._failure = None
        sequence = self._found(model, adapter)
        try:
            known = sequence.tokens
            n_same = common(as_ids(prompt), as_ids(known))
            if n_same == len(prompt) and not (n_same == len(known) and sequence.has_logits):
                n_same -= 1  # one is fed in any case, to have logits
            self.n_found = sequence.cut(n_same)
            self._go_on(sequence, prompt, n_same)
        except BaseException:
            sequence.close()
            raise
        return sequence

    def check(self) -> None:
        """Raise the LlmcError of a file that could not be written."""
        if self._failure is not None:
            raise self._failure

    def _found(self, model: Model, adapter: str | None) -> Sequence:
        if not os.path.lexists(self.path):
            if not self.read_only:
                check_folder(self.path)
            return model.sequence(adapter)
        sequence = restored(model, self.path, adapter)
        if sequence.note and not self.read_only:
            sequence.close()
            fact = "this file keeps a conversation, and a prompt would take its place"
            raise LlmcError(fact, place=str(self.path), hint="llmc chat --session goes on with it; name another file")
        return sequence

    def _go_on(self, sequence: Sequence, prompt: list[int], n_same: int) -> None:
        """Read the rest.  A state that would have had to go back begins anew, and is kept where the two prompts part:
        the next one may part there too."""
        is_known = n_same >= MOST_KNOWN * len(prompt)
        n_kept = n_same if is_known and self.n_found < n_same else len(prompt)
        if n_kept > self.n_found:
            sequence.feed(prompt[self.n_found : n_kept])
        if self.n_found < MOST_KNOWN * len(prompt):
            self._save(sequence)
        if n_kept < len(prompt):
            sequence.feed(prompt[n_kept:])

    def _save(self, sequence: Sequence) -> None:
        if self.read_only:
            return
        try:
            sequence.save(self.path)
        except LlmcError as error:
            self._failure = error


def check_folder(path: StrPath) -> None:
    """Raise LlmcError where no file can be made at the path: at once, and not when it has something to keep."""
    folder = os.path.dirname(os.path.abspath(os.fsdecode(as_path(path))))
    if not os.access(folder, os.W_OK):
        raise LlmcError("no file can be made in this folder", place=folder)
