"""Running an artifact from Python: ctypes, NumPy and the tokenizer; nothing of the compiler."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from llmc.runtime.artifact import ArtifactFile
from llmc.runtime.errors import LlmcError

if TYPE_CHECKING:
    from llmc.runtime.binding import Model

__all__ = ["ArtifactFile", "LlmcError", "load"]


def load(
    path: str | os.PathLike[str],
    *,
    threads: int = 0,
    kv_tokens: int = 0,
    device: int | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Open an artifact for running; see `llmc.runtime.binding.load`."""
    from llmc.runtime import binding  # brings NumPy in, which reading an artifact does not need

    return binding.load(path, threads=threads, kv_tokens=kv_tokens, device=device, progress=progress)
