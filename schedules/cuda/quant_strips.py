"""How quantised weights lie in a GPU's memory: piece by piece as a warp's lanes read them (include/gemv_quant.cuh).

    piece       16 stored rows (a strip) by 64 of K (a column); a weight is [row tiles of 64][columns][4 strips] pieces
    int8, fp8   { [half][lane] { row g: 8 bytes; row g + 8: 8 bytes } }, and behind all pieces f32 scales [strips][16]
    int4        { [lane][half] { row g: 8 nibbles; row g + 8: 8 nibbles }, f16 scales }
    with zeros  { the same, f16 scales, f16 zeros }
    mxfp4       { the same of codes of 4 bits (schedules/mxfp4_words.py), scales as bytes: exponents + 127 }

Lane 4 g + t and half h stand for rows g and g + 8 and, of 32 elements along K, for the eight that mma.m16n8k16 wants in
this lane: 2 t, 2 t + 1, 8 + 2 t, 9 + 2 t, 16 + 2 t, … (fragment_order).  Bytes of a word: elements 0, 2, 1, 3 of four
(fp8: with their bits as in fp8_words.py); nibbles: 0, 2, 4, 6, 1, 3, 5, 7 of the eight, as code + 8.  Scales of
a piece: groups of 32 [g][half][2], of 128 [g][2].  Rows are stored as in tile_layout.py, up to whole tiles; what
is padding is zero.

The four strips of a column lie together, so that one copy brings what a warpgroup multiplies in a step of a GEMM.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import numpy as np

from llmc.schedules.cuda.tile_layout import TILE, gated_rows, tile_rows
from llmc.schedules.fp8_words import fp8_words
from llmc.schedules.mxfp4_words import e2m1_of, mxfp4_words

Array = np.ndarray[Any, Any]

STRIPS = TILE // 16
"""Strips of a row of tiles."""

_WORKERS = 2


def stored_rows(array: Array, first: int, gated: bool) -> Array:
    """Stored rows first … first + 63 of an array of rows, with zeros where there are none."""
    if gated:
        return gated_rows(array, first)
    rows = np.zeros((TILE, *array.shape[1:]), array.dtype)
    some = array[first : first + TILE]
    rows[: len(some)] = some
    return rows


@dataclass(frozen=True)
class ByteStrips:
    """A weight [N, K], or [2N, K] when gated, in codes of 8 bits, with a scale for each row."""

    gated: bool = False

    def words(self, codes: Array) -> Array:
        """uint32 words as the kernel takes them apart, of words of four codes in order."""
        raise NotImplementedError

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        return self._tile_rows(shape) * TILE * (ceil(shape[1] / TILE) * TILE + 4)

    def pack(self, array: Any) -> Array:
        """`array` is a compiler.quantization.quantize.Quantized."""
        n_tile_rows, columns = self._tile_rows(array.shape), ceil(array.shape[1] / TILE)
        pieces = np.empty((n_tile_rows, columns, STRIPS, 2, 8, 4, 2), np.uint64)
        scales = np.zeros((n_tile_rows, TILE), np.float32)

        def fill(tile_row: int) -> None:
            first = tile_row * TILE
            scales[tile_row] = stored_rows(array.scales[:, 0], first, self.gated)
            rows = fragment_order(stored_rows(array.codes.view(np.uint8), first, self.gated))
            chunks = self.words(rows.view(np.uint32)).view(np.uint64)
            parts = chunks.reshape(STRIPS, 2, 8, columns, 2, 4)  # row half, g, column, half, t
            pieces[tile_row] = parts.transpose(3, 0, 4, 2, 5, 1)

        in_threads(fill, n_tile_rows)
        return np.concatenate([pieces.reshape(-1).view(np.uint8), scales.reshape(-1).view(np.uint8)])

    def _tile_rows(self, shape: tuple[int, ...]) -> int:
        return tile_rows(shape[0] // (2 if self.gated else 1), gated=self.gated)


@dataclass(frozen=True)
class Int8Strips(ByteStrips):
    """A weight in int8."""

    def words(self, codes: Array) -> Array:
        outer = codes & np.uint32(0xFF0000FF)
        low, high = (codes & np.uint32(0xFF00)) << np.uint32(8), (codes & np.uint32(0xFF0000)) >> np.uint32(8)
        words: Array = outer | low | high
        return words

    def __str__(self) -> str:
        return f"i8 pieces 16x64, f32 scales{', gate and up alternating by 8 rows' if self.gated else ''}"


@dataclass(frozen=True)
class Fp8Strips(ByteStrips):
    """A weight in fp8 that is multiplied in `element`, whose bits say where a code's go."""

    element: Literal["bf16", "f16"] = "bf16"

    def words(self, codes: Array) -> Array:
        return fp8_words(codes, self.element)

    def __str__(self) -> str:
        gated = ", gate and up alternating by 8 rows" if self.gated else ""
        return f"f8 pieces 16x64, bits as in {self.element}, f32 scales{gated}"


@dataclass(frozen=True)
class Int4Strips:
    """A weight [N, K], or [2N, K] when gated, in int4, with a scale for each `group` along K."""

    group: int
    gated: bool = False

    @property
    def scales_a_row(self) -> Literal[1, 2]:
        """Scales of a row in a piece."""
        return 2 if self.group == 32 else 1

    @property
    def piece_bytes(self) -> int:
        return 512 + 32 * self.scales_a_row

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        return self._tile_rows(shape) * STRIPS * ceil(shape[1] / TILE) * self.piece_bytes

    def pack(self, array: Any) -> Array:
        """`array` is a compiler.quantization.quantize.Quantized."""
        n_tile_rows, columns = self._tile_rows(array.shape), ceil(array.shape[1] / TILE)
        pieces = np.empty((n_tile_rows, columns, STRIPS, self.piece_bytes), np.uint8)

        def fill(tile_row: int) -> None:
            codes = fragment_order(stored_rows(array.codes, tile_row * TILE, self.gated))
            words = self._words(codes).reshape(STRIPS, 2, 8, columns, 2, 4)  # row half, g, column, half, t
            lanes = np.ascontiguousarray(words.transpose(3, 0, 2, 5, 4, 1))
            pieces[tile_row, :, :, :512] = lanes.reshape(columns, STRIPS, 128).view(np.uint8)
            end = 512
            for of_groups in self._behind(array):
                parts = self._scales(stored_rows(of_groups, tile_row * TILE, self.gated), columns)
                stored = parts.reshape(columns, STRIPS, -1).view(np.uint8)
                start, end = end, end + stored.shape[2]
                pieces[tile_row, :, :, start:end] = stored

        in_threads(fill, n_tile_rows)
        return pieces.reshape(-1)

    def _behind(self, array: Any) -> list[Array]:
        """What lies behind a piece's codes, of [rows, groups]."""
        return [array.scales]

    def _words(self, codes: Array) -> Array:
        """uint32 of eight codes each."""
        return nibble_words((codes + np.int8(8)).view(np.uint64))

    def _stored(self, scales: Array) -> Array:
        """Scales as they are stored."""
        return scales

    def _scales(self, rows: Array, columns: int) -> Array:
        """[columns][STRIPS][g][scales of a row][2] of scales [64, groups]."""
        n_each, rows = self.scales_a_row, self._stored(rows)
        scales = np.zeros((TILE, columns * n_each), rows.dtype)
        spread = rows if n_each == 2 else np.repeat(rows, self.group // TILE, axis=1)[:, :columns]
        scales[:, : spread.shape[1]] = spread
        parts = scales.reshape(STRIPS, 2, 8, columns, n_each)
        return np.ascontiguousarray(parts.transpose(3, 0, 2, 4, 1))

    def _tile_rows(self, shape: tuple[int, ...]) -> int:
        return tile_rows(shape[0] // (2 if self.gated else 1), gated=self.gated)

    def __str__(self) -> str:
        gated = ", gate and up alternating by 8 rows" if self.gated else ""
        return f"i4 pieces 16x64, f16 scales of {self.group}{gated}"


@dataclass(frozen=True)
class Int4ZerosStrips(Int4Strips):
    """A weight [N, K], or [2N, K] when gated, in int4, with a scale and a zero for each `group` along K."""

    @property
    def piece_bytes(self) -> int:
        return 512 + 64 * self.scales_a_row

    def _behind(self, array: Any) -> list[Array]:
        return [array.scales, np.zeros_like(array.scales) if array.zeros is None else array.zeros]

    def __str__(self) -> str:
        return super().__str__().replace("i4", "z4", 1).replace("f16 scales", "f16 scales and zeros", 1)


@dataclass(frozen=True)
class Mxfp4Strips(Int4Strips):
    """A weight [N, K], or [2N, K] when gated, in mxfp4, with a power of two for each 32 along K."""

    @property
    def piece_bytes(self) -> int:
        return 512 + 32

    def _words(self, codes: Array) -> Array:
        return mxfp4_words(e2m1_of(codes).view(np.uint64))

    def _stored(self, scales: Array) -> Array:
        """Scales as the exponent + 127 of the power of two that numbers are multiplied by, twice the scale; 0 for
        none."""
        _, exponents = np.frexp(scales)
        return np.where(scales > 0, exponents + 127, 0).astype(np.uint8)

    def __str__(self) -> str:
        return super().__str__().replace("i4", "m4", 1).replace("f16", "e8m0", 1)


def fragment_order(codes: Array) -> Array:
    """Codes [64, K], filled up with zeros to whole columns of 64, and in each 32 of these reordered so that those of a
    lane lie side by side: pair p of chunk t is pair t of chunk p."""
    whole = np.pad(codes, ((0, 0), (0, -codes.shape[1] % TILE)))
    pairs = whole.view(np.uint16).reshape(len(whole), -1, 4, 4)
    return np.ascontiguousarray(pairs.swapaxes(2, 3)).reshape(len(whole), -1).view(whole.dtype)


def nibble_words(chunks: Array) -> Array:
    """uint32 of eight nibbles, of uint64 whose bytes are 0 … 15."""
    words = np.zeros(chunks.shape, np.uint32)
    for element in range(8):
        place = 4 * (element // 2) + 16 * (element % 2)
        words |= (chunks >> np.uint64(8 * element)).astype(np.uint32) << np.uint32(28) >> np.uint32(28 - place)
    return words


def in_threads(fill: Any, n: int) -> None:
    """fill(0) … fill(n - 1), a few at a time; NumPy works without holding the interpreter."""
    with ThreadPoolExecutor(_WORKERS) as pool:
        list(pool.map(fill, range(n)))
