"""The texts that a server keeps in its cache, over a restart: a file each in a folder, the one used last first."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.runtime import capi
from llmc.runtime.errors import LlmcError
from llmc.runtime.prompt_cache import check_folder
from llmc.runtime.sequence import as_path

if TYPE_CHECKING:
    from llmc.runtime.binding import Model
    from llmc.runtime.sequence import Sequence

NAME = re.compile(r"text-\d\d\.seq")


class StoredTexts:
    """Files of these names are the server's, and nothing else in the folder is."""

    def __init__(self, model: Model, folder: str) -> None:
        """Makes the folder, if there is none.  Raises LlmcError: it cannot be, or no files in it, or the model has
        nothing to keep."""
        self._model, self._folder = model, Path(os.fsdecode(as_path(folder)))
        if model.is_whole:
            fact = "the model reads texts whole, and keeps nothing of them to save"
            raise LlmcError(fact, place=str(model.path), hint="leave --prompt-cache out")
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise LlmcError(f"this folder cannot be made: {error.strerror}", place=folder) from None
        check_folder(self._folder / "text-00.seq")

    def restore(self, most: int) -> list[Sequence]:
        """At most so many texts, and no more than there is room for, the one used last first.  What is no text of this
        program is said on standard error, and stays until other texts take its place."""
        sequences: list[Sequence] = []
        for path in self._paths()[:most]:
            try:
                sequences.append(self._model.restore(path))
            except LlmcError as error:
                if error.status == capi.NO_MEMORY:
                    break
                print(f"not restored: {error.fact}: {path}", file=sys.stderr)
        return sequences

    def save(self, sequences: Iterable[Sequence]) -> None:
        """In place of those that are there, unless there are none; the first are the last to be lost.  Raises
        LlmcError."""
        before, kept = {*self._paths()}, set[Path]()
        for number, sequence in enumerate(sequences):
            path = self._folder / f"text-{number:02}.seq"
            sequence.save(path)
            kept.add(path)
        for path in before - kept if kept else ():
            path.unlink(missing_ok=True)

    def _paths(self) -> list[Path]:
        return sorted(path for path in self._folder.iterdir() if NAME.fullmatch(path.name))
