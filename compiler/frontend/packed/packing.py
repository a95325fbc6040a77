"""How a checkpoint keeps its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmc.compiler.frontend.checkpoint import StoredTensor
from llmc.compiler.frontend.packed.tensor import Checkpoint

WIDE_GROUP = 128
"""The group of int4 that takes fewer bits than the other."""


def in_int4(group: int) -> str:
    """The `--quant` that keeps codes of 4 bits in groups of so many; a row's when less than one."""
    return f"int4 --quant-group {WIDE_GROUP}" if group < 1 or group % WIDE_GROUP == 0 else "int4"


@dataclass(frozen=True)
class Packing:
    """How weights are kept, and how they become tensors like others.

    said: in words.  join: the checkpoint with one tensor for the parts of each weight; reads no tensor.
    small: the `--quant`, and what goes with it, whose codes are as wide; "": they are floats.
    notes: what the user should be told.
    """

    said: str
    join: Callable[[Checkpoint], dict[str, StoredTensor]]
    small: str
    notes: tuple[str, ...] = ()
