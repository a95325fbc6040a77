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
    slots: int = 0,
) -> Model:
    """Open an artifact for running, after checking every section of it but the weights.

    threads: 0 takes as many as this process may use.  kv_tokens: room for the tokens of all sequences together;
    0 takes the artifact's default.  device: "cpu" or "cuda", whose program to run, by default the first that this
    machine can; "cuda:1", or a number alone, says which GPU, by default $LLMC_CUDA_DEVICE, or the first.
    progress: called with (bytes copied, bytes in all) while weights are copied to a GPU.  slots: of a model with
    states, how many sequences may have one at once, those that guesses are made from included; 0 takes the artifact's
    default.
    Raises LlmcError: not an artifact, damaged, or compiled for another machine.
    """
    from llmc.runtime.binding import Model  # brings NumPy in, which reading an artifact does not need
    from llmc.runtime.capi import Device

    if threads < 0 or kv_tokens < 0 or slots < 0:
        hint = "leave them out for the default"
        raise LlmcError("threads, kv_tokens and slots cannot be negative", place=str(path), hint=hint)
    chosen = Device.parse(device)
    file = ArtifactFile.open(path)
    try:
        return Model(file, threads, kv_tokens, chosen, progress, slots)
    except BaseException:
        file.close()
        raise
