"""How a linear layer's weight lies in the artifact: in panels of 16 outputs, so that one vector of 16 lanes holds the
same k (or pair of k) of 16 outputs, and a kernel of any M reads each panel front to back.

    bf16    [panels][ceil(K / 2)][16][2]        one int32 lane is two consecutive k
    f32     [panels][K][16]

Panels come in fours, filled with zeros.  With two parts (gate and up) the parts' panels alternate: gate 0, up 0,
gate 1, up 1, …
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import numpy as np

from llmc.compiler.kernel import DTYPE_BYTES, numpy_dtype

PANEL = 16
"""Outputs of a panel."""

PANELS_MULTIPLE = 4
"""The number of panels is a multiple of this, so that a kernel may take up to so many at once."""

Array = np.ndarray[Any, Any]

_WORKERS = 2
"""Threads that pack; NumPy copies without holding the interpreter."""


def panel_count(n: int, parts: int = 1) -> int:
    """Panels of a weight with n outputs a part."""
    return ceil(ceil(n / PANEL) * parts / PANELS_MULTIPLE) * PANELS_MULTIPLE


@dataclass(frozen=True)
class Panels:
    """A weight [parts * N, K] in panels of 16 outputs."""

    dtype: Literal["bf16", "f32"]
    parts: int = 1

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        return panel_count(shape[0] // self.parts, self.parts) * self._words(shape[1]) * PANEL * 4

    def pack(self, array: Array) -> Array:
        n, words = array.shape[0] // self.parts, self._words(array.shape[1])
        panels = np.zeros((panel_count(n, self.parts), words, PANEL), np.uint32)

        def fill(panel: int) -> None:
            first, part = panel // self.parts * PANEL, panel % self.parts
            rows = self._as_words(array[part * n + first : part * n + min(first + PANEL, n)])
            panels[panel, :, : len(rows)] = rows.T

        with ThreadPoolExecutor(_WORKERS) as pool:
            list(pool.map(fill, range(ceil(n / PANEL) * self.parts)))
        return panels.reshape(-1)

    def unpack(self, packed: Array, shape: tuple[int, ...]) -> Array:
        """The weight again, in the layout's dtype."""
        n, words = shape[0] // self.parts, self._words(shape[1])
        panels = packed.view(np.uint32).reshape(-1, self.parts, words, PANEL)
        rows = panels.transpose(1, 0, 3, 2).reshape(self.parts, -1, words)[:, :n]
        elements = np.ascontiguousarray(rows).view(numpy_dtype(self.dtype))
        return elements[:, :, : shape[1]].reshape(shape)

    def _words(self, k: int) -> int:
        """32-bit words of a row."""
        return ceil(k * DTYPE_BYTES[self.dtype] / 4)

    def _as_words(self, rows: Array) -> Array:
        """Rows cast to the layout's dtype (to nearest even), as 32-bit words."""
        rows = np.ascontiguousarray(rows, numpy_dtype(self.dtype))
        if self.dtype == "bf16" and rows.shape[1] % 2:
            rows = np.pad(rows, ((0, 0), (0, 1)))
        return rows.view(np.uint32)

    def __str__(self) -> str:
        order = {"bf16": "[N/16][K/2][16][2]", "f32": "[N/16][K][16]"}[self.dtype]
        return f"{self.dtype} {order}{', gate and up alternating' if self.parts == 2 else ''}"


@dataclass(frozen=True)
class PanelVector:
    """A bias [parts * N] as f32, in the order of the weight's panels."""

    parts: int = 1

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        return panel_count(shape[0] // self.parts, self.parts) * PANEL * 4

    def pack(self, array: Array) -> Array:
        return Panels("f32", self.parts).pack(array.reshape(-1, 1))

    def __str__(self) -> str:
        return f"f32 [N/16][16]{', gate and up alternating' if self.parts == 2 else ''}"
