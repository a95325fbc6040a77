"""How a weight and a tiled activation lie in a GPU's memory: in the order of shared memory's swizzled tiles.

    weight        [ceil(N/64)][ceil(K/64)][64 rows][8 chunks]      a chunk is 16 bytes: 8 elements along K
    activation    [ceil(K/64)][M rounded up to 8][8 chunks]

Chunk c of row r lies at c ^ (r % 8).  One plain copy of 8 KiB brings a tile that `wgmma` reads as it is, and a lane of
`mma.sync` reads its fragment from memory with one 16-byte load.  Rows and columns past the edge are zero, but for the
rows of an activation, which hold anything.

    gated weight [2N, K]: gate rows, then up rows. Stored rows 16i … 16i + 7 are gate rows 8i …, the next 8 the up rows
                          8i …: in a matrix fragment gate and up of one output lie in one thread. 2 ceil(N/64) tiles.

include/tiles.cuh says the same to kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import numpy as np

from llmc.compiler.kernel import STRIP, RowMajor, numpy_dtype

Array = np.ndarray[Any, Any]

TILE = 64
"""A weight's tile has so many rows, and as many elements along K."""

TILE_BYTES = 8192
CHUNK = np.dtype(np.complex128)
"""A dtype of 16 bytes, so that NumPy moves a chunk at once."""

_WORKERS = 2


def tile_rows(n: int, *, gated: bool = False) -> int:
    """Rows of tiles of a weight with n outputs."""
    return ceil(n / TILE) * (2 if gated else 1)


@dataclass(frozen=True)
class Tiles:
    """A weight [N, K] of 2-byte elements in tiles."""

    dtype: Literal["bf16", "f16"]

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        return tile_rows(shape[0]) * ceil(shape[1] / TILE) * TILE_BYTES

    def pack(self, array: Array) -> Array:
        def rows(first: int) -> Array:
            return array[first : first + TILE]

        return self._pack(rows, tile_rows(array.shape[0]), array.shape[1])

    def unpack(self, packed: Array, shape: tuple[int, ...]) -> Array:
        """The weight again, in the layout's dtype."""
        return self._unpack(packed, shape[1])[: shape[0], : shape[1]]

    def _pack(self, rows: Callable[[int], Array], n_tile_rows: int, k: int) -> Array:
        """Tiles of the stored rows that `rows(first)` gives, up to 64 at a time."""
        columns = ceil(k / TILE)
        dtype = numpy_dtype(self.dtype)
        packed = np.empty((n_tile_rows, columns * TILE * 8), CHUNK)
        order = tile_order(columns)

        def fill(tile_row: int) -> None:
            block = np.asarray(rows(tile_row * TILE), dtype)
            if block.shape != (TILE, columns * TILE) or not block.flags.c_contiguous:
                whole = np.zeros((TILE, columns * TILE), dtype)
                whole[: block.shape[0], :k] = block
                block = whole
            np.take(block.view(CHUNK).reshape(-1), order, out=packed[tile_row], mode="clip")

        with ThreadPoolExecutor(_WORKERS) as pool:
            list(pool.map(fill, range(n_tile_rows)))
        return packed.view(np.uint16).reshape(-1)

    def _unpack(self, packed: Array, k: int) -> Array:
        """The stored rows, with the padding."""
        columns = ceil(k / TILE)
        chunks = packed.reshape(-1).view(CHUNK).reshape(-1, columns * TILE * 8)
        rows = np.empty_like(chunks)
        rows[:, tile_order(columns)] = chunks
        return rows.view(numpy_dtype(self.dtype)).reshape(-1, columns * TILE)

    def __str__(self) -> str:
        return f"{self.dtype} tiles 64x64, 128-byte swizzle"


@dataclass(frozen=True)
class GatedTiles(Tiles):
    """A gated weight [2N, K] in tiles: 8 gate rows, then their 8 up rows."""

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        return tile_rows(shape[0] // 2, gated=True) * ceil(shape[1] / TILE) * TILE_BYTES

    def pack(self, array: Array) -> Array:
        n, k = array.shape[0] // 2, array.shape[1]

        def rows(first: int) -> Array:
            return gated_rows(array, first)

        return self._pack(rows, tile_rows(n, gated=True), k)

    def unpack(self, packed: Array, shape: tuple[int, ...]) -> Array:
        return ungated_rows(self._unpack(packed, shape[1]), shape)

    def __str__(self) -> str:
        return f"{super().__str__()}, gate and up alternating by 8 rows"


@dataclass(frozen=True)
class InStrips(RowMajor):
    """Vectors [..., 2N] of a gated weight's rows, in the order these lie in: 8 of the gate, then their 8 of up."""

    def pack(self, array: Array) -> Array:
        parts = array.reshape(*array.shape[:-1], 2, -1, STRIP)
        return super().pack(parts.swapaxes(-3, -2).reshape(array.shape))

    def __str__(self) -> str:
        return f"{self.dtype}, gate and up alternating by {STRIP}"


def gated_rows(array: Array, first: int) -> Array:
    """Stored rows first … first + 63 of a gated array [2N, …], zeros where there is no gate row."""
    n = array.shape[0] // 2
    half = TILE // 2
    start = first // 2
    count = max(0, min(half, n - start))
    rows = np.zeros((TILE // 16, 2, 8, *array.shape[1:]), array.dtype)
    for part in range(2):
        whole = count // 8
        part_rows = array[part * n + start : part * n + start + count]
        rows[:whole, part] = part_rows[: whole * 8].reshape(whole, 8, *array.shape[1:])
        if count % 8:
            rows[whole, part, : count % 8] = part_rows[whole * 8 :]
    return rows.reshape(TILE, *array.shape[1:])


def ungated_rows(stored: Array, shape: tuple[int, ...]) -> Array:
    """A gated array [2N, K] again, of all its stored rows with their padding."""
    parts = stored.reshape(-1, 2, 8, stored.shape[1]).swapaxes(0, 1).reshape(2, -1, stored.shape[1])
    return np.ascontiguousarray(parts[:, : shape[0] // 2, : shape[1]]).reshape(shape)


@functools.lru_cache(maxsize=4)
def tile_order(columns: int) -> Array:
    """For each chunk of a row of tiles, which chunk of the 64 plain rows it is."""
    column, row, place = np.ogrid[:columns, :TILE, :8]
    order: Array = row * (columns * 8) + column * 8 + (place ^ (row & 7))
    return order.reshape(-1)
