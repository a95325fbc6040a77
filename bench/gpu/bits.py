"""Numbers as they lie in a GPU's memory, made with NumPy alone, which knows no bfloat16.

bfloat16 is handled as its bits under the name of float16: packing moves elements and never computes with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any

import numpy as np

from llmc.bench.gpu.kit import LAYOUTS, ROW_MAJOR
from llmc.compiler.kernel import TILE_COLUMNS, TILE_ROWS
from llmc.schedules.states_call import ByTap

Array = np.ndarray[Any, Any]
PLAIN = {"f32": np.float32, "i32": np.int32, "i8": np.int8, "u8": np.uint8, "i64": np.int64}
POISON = 0xFF
"""What fresh memory is filled with: NaN in f32 and in both 2-byte formats."""


@dataclass(frozen=True)
class Codes:
    """A quantised weight [rows, K]: int8 codes (fp8: the bits of e4m3fn), and scales [rows, groups] (f32; of int4
    f16)."""

    codes: Array
    scales: Array
    group: int
    fp8: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        rows, k = self.codes.shape
        return rows, k

    def values(self) -> Array:
        scales = self.scales.astype(np.float32)
        spread = np.repeat(scales, self.group or self.shape[1], axis=1)[:, : self.shape[1]]
        numbers = e4m3()[self.codes.view(np.uint8)] if self.fp8 else self.codes.astype(np.float32)
        return np.asarray(numbers * spread)


@lru_cache(maxsize=1)
def e4m3() -> Array:
    """What each of the 256 codes of e4m3fn stands for, f32: 4 bits of exponent, 3 of mantissa, no infinity."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    values: Array = np.where(code & 127 == 127, np.nan, np.where(code < 128, size, -size)).astype(np.float32)
    return values


def e4m3_of(values: Array) -> Array:
    """The codes nearest to values of up to 448, as int8."""
    sizes = e4m3()[:127]
    nearest = np.searchsorted((sizes[1:] + sizes[:-1]) / 2, np.minimum(np.abs(values), sizes[-1]))
    codes: Array = (nearest + 128 * (values < 0)).astype(np.uint8).view(np.int8)
    return codes


@dataclass(frozen=True)
class Stored:
    """A weight as it is stored: bits [rows, K] of bf16 (under the name of float16) or f16."""

    bits: Array
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        rows, k = self.bits.shape
        return rows, k

    def values(self) -> Array:
        return values_of(self.bits, self.dtype)


def bits_of(values: Array, dtype: str) -> Array:
    """f32 values in `dtype`, rounded to the nearest; bf16 as float16 of the same bits."""
    if dtype == "f16":
        return values.astype(np.float16)
    if dtype != "bf16":
        return values.astype(PLAIN[dtype], copy=False)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16).view(np.float16)


def values_of(bits: Array, dtype: str) -> Array:
    """The same back: f32, or integers as they are."""
    if dtype != "bf16":
        return bits.astype(np.float32) if dtype == "f16" else bits
    return (bits.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def exact(values: Array, dtype: str) -> Array:
    """Values that `dtype` holds, in f32."""
    return values_of(bits_of(values, dtype), dtype)


def view_of(data: Array, dtype: str, shape: tuple[int, ...]) -> Array:
    """Bytes as a row-major array of f32 or integers."""
    kind = np.float16 if dtype in ("bf16", "f16") else PLAIN[dtype]
    return values_of(data.view(kind), dtype).reshape(shape)


def packed(constant: Array | Codes | Stored, dtype: str, layout: Mapping[str, Any] | None) -> Array:
    """A constant as it lies: f32 values, bits or codes of `dtype`, in the layout that kit.json describes; bytes."""
    if layout is None or layout["kind"] == ROW_MAJOR:
        assert not isinstance(constant, Codes | Stored)
        return raw(bits_of(constant, dtype if layout is None else layout["dtype"]))
    fields = {name: value for name, value in layout.items() if name != "kind"}
    if layout["kind"] == ByTap.__name__:
        assert isinstance(constant, np.ndarray)
        return raw(ByTap().pack(constant))
    if isinstance(constant, Codes):
        return raw(LAYOUTS[layout["kind"]](**fields).pack(constant))
    bits = constant.bits if isinstance(constant, Stored) else bits_of(constant, fields["dtype"])
    return raw(LAYOUTS[layout["kind"]](**{**fields, "dtype": "f16"}).pack(bits))


def raw(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def tiled(matrix: Array, dtype: str) -> Array:
    """An activation [M, K] in tiles (compiler/kernel.py), bytes; rows past M are NaN."""
    m, k = matrix.shape
    rows, slabs = ceil(m / TILE_ROWS) * TILE_ROWS, ceil(k / TILE_COLUMNS)
    plain = np.zeros((rows, slabs * TILE_COLUMNS), np.float16)
    plain[:m, :k] = bits_of(matrix, dtype)
    plain.view(np.uint16)[m:] = 0xFFFF
    chunks = plain.reshape(rows, slabs, 8, 8).swapaxes(0, 1)
    return raw(chunks[swizzle(slabs, rows)])


def untiled(data: Array, shape: tuple[int, ...], dtype: str) -> Array:
    """The matrix [M, K] of a tiled activation's bytes, in f32.  Raises ValueError: columns past K are not zero."""
    m, k = shape
    rows, slabs = ceil(m / TILE_ROWS) * TILE_ROWS, ceil(k / TILE_COLUMNS)
    tiles = data[: slabs * rows * 128].view(np.float16).reshape(slabs, rows, 8, 8)
    bits = np.ascontiguousarray(tiles[swizzle(slabs, rows)].swapaxes(0, 1).reshape(rows, slabs * TILE_COLUMNS))
    matrix = values_of(bits, dtype)
    if (matrix[:m, k:] != 0).any():
        raise ValueError(f"columns past {k} are not zero")
    return matrix[:m, :k]


def swizzle(slabs: int, rows: int) -> tuple[Array, Array, Array]:
    slab, row, chunk = np.ogrid[:slabs, :rows, :8]
    return slab, row, chunk ^ (row % 8)
