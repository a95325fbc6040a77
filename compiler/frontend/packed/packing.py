"""How a checkpoint keeps its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmc.compiler.frontend.checkpoint import StoredTensor
from llmc.compiler.frontend.packed.tensor import Checkpoint


@dataclass(frozen=True)
class Packing:
    """How weights are kept, and how they become tensors like others.

    said: in words.  join: the checkpoint with one tensor for the parts of each weight; reads no tensor.
    small: the `--quant` whose codes are as wide; "": they are floats.  notes: what the user should be told.
    """

    said: str
    join: Callable[[Checkpoint], dict[str, StoredTensor]]
    small: str
    notes: tuple[str, ...] = ()
