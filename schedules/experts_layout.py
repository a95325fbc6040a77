"""How the weights of experts lie in the artifact: one after the other, each like the weight of a linear layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.compiler.kernel import Layout

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class OfExperts:
    """A weight [E, rows, K].  each: the layout of one expert's."""

    each: Layout
    n_experts: int

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        return self.n_experts * self.each.n_bytes(shape[1:])

    def pack(self, array: Any) -> Array:
        """`array`: [E, rows, K], or a Quantized of the rows of all experts."""
        packed = [self.each.pack(expert) for expert in self._experts(array)]
        return np.concatenate([expert.reshape(-1).view(np.uint32) for expert in packed])

    def _experts(self, array: Any) -> list[Any]:
        if isinstance(array, np.ndarray):
            return list(array)
        n = len(array.codes) // self.n_experts
        rows = [slice(n * expert, n * (expert + 1)) for expert in range(self.n_experts)]
        return [array.rows(part) for part in rows]

    def __str__(self) -> str:
        return f"{self.n_experts} times {self.each}"
