"""How quantised weights lie in the artifact: panels of 16 outputs as in panel_layout.py, each read front to back.

    i8      panel: [K/4][16][4] bytes of code + 128, [16] f32 scales
    i4      panel: [K/2G] of
                group, group: [G/8][16] int32: byte b of a lane holds k = b in its low half, k = 4 + b in its high half,
                              as code + 8
                [2][16] f16 scales

    z4      panel: as i4, and behind the scales of each pair [2][16] f16 zeros, an eighth of each

    m4      panel: as i4 in groups of 32, but four bits are a sign and the number of e2m1, and scales are bf16

    f8      panel: [K/4][16] int32 of four codes as in fp8_words.py, in the places of bf16, then [16] f32 scales * 2**8

Codes of integers are stored without a sign, as the byte products of x86 want one of their operands.  K is filled up to
whole words, or blocks (i8: `block_of`; i4: pairs of groups, so that a pair and its scales are whole cache lines),
with code 0.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np

from llmc.compiler.kernel import numpy_dtype
from llmc.compiler.quantization.inputs import block_of
from llmc.schedules.cpu.linear.panel_layout import PANEL, panel_count
from llmc.schedules.fp8_words import fp8_words
from llmc.schedules.mxfp4_words import e2m1_of

Array = np.ndarray[Any, Any]

ZERO = {"i8": 128, "i4": 8, "z4": 8, "m4": 12}
"""What is added to a code where it is multiplied, in all but m4 where it is stored."""

FP8_IN_PAIRS = np.float32(2**8)
"""What an e4m3 code counts, over the bf16 that fp8_pairs.py makes of it."""

_WORKERS = 2


def padded(size: int, multiple: int) -> int:
    return ceil(size / multiple) * multiple


@dataclass(frozen=True)
class Int8Panels:
    """A weight [parts * N, K] in int8."""

    parts: int = 1

    def panel_words(self, k: int) -> int:
        """int32 words of a panel."""
        return (padded(k, block_of(k)) // 4 + 1) * PANEL

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        return panel_count(shape[0] // self.parts, self.parts) * self.panel_words(shape[1]) * 4

    def pack(self, array: Any) -> Array:
        """`array` is a compiler.quantization.quantize.Quantized."""
        k = array.shape[1]

        def panel(rows: Any) -> Array:
            codes = rows.codes
            stored = np.full((PANEL, padded(k, block_of(k))), ZERO["i8"], np.uint8)
            np.add(codes.view(np.uint8), ZERO["i8"], out=stored[: len(codes), :k], casting="unsafe")
            words = np.ascontiguousarray(stored.view(np.uint32).T)
            lanes = np.zeros(PANEL, np.float32)
            lanes[: len(codes)] = rows.scales[:, 0]
            return np.concatenate([words.reshape(-1), lanes.view(np.uint32)])

        return _in_panels(array, self.parts, self.panel_words(k), panel)

    def __str__(self) -> str:
        return f"i8 [N/16]{{[K/4][16][4], f32 [16]}}{', gate and up alternating' if self.parts == 2 else ''}"


@dataclass(frozen=True)
class Int4Panels:
    """A weight [parts * N, K] in int4, with a scale for each `group` along K."""

    group: int
    parts: int = 1

    def panel_words(self, k: int) -> int:
        """int32 words of a panel."""
        return padded(k, 2 * self.group) // (2 * self.group) * self.pair_words

    @property
    def pair_words(self) -> int:
        """int32 words of two groups of a panel, and of what lies behind them."""
        return self.codes_words + PANEL

    @property
    def codes_words(self) -> int:
        """int32 words of the codes of two groups of a panel."""
        return 2 * (self.group // 8) * PANEL

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        return panel_count(shape[0] // self.parts, self.parts) * self.panel_words(shape[1]) * 4

    def pack(self, array: Any) -> Array:
        """`array` is a compiler.quantization.quantize.Quantized."""
        k = array.shape[1]
        size = padded(k, 2 * self.group)

        def panel(rows: Any) -> Array:
            n_rows = len(rows.codes)
            stored = np.full((PANEL, size), self._nibbles(np.zeros((), np.int8)), np.uint8)
            stored[:n_rows, :k] = self._nibbles(rows.codes)
            words = stored.view(np.uint32).reshape(PANEL, -1, 2)
            halves = words[:, :, 0] | words[:, :, 1] << 4  # [16][K/8]
            n_pairs = size // (2 * self.group)
            pairs = np.empty((n_pairs, self.pair_words), np.uint32)
            pairs[:, : self.codes_words] = halves.T.reshape(n_pairs, -1)
            for i, (of_groups, dtype) in enumerate(self._behind(rows)):
                lanes = np.zeros((PANEL, size // self.group), dtype)
                lanes[:n_rows, : of_groups.shape[1]] = of_groups
                place = self.codes_words + i * PANEL
                halves = np.ascontiguousarray(lanes.T).view(np.uint32)
                pairs[:, place : place + PANEL] = halves.reshape(n_pairs, PANEL)
            return pairs.reshape(-1)

        return _in_panels(array, self.parts, self.panel_words(k), panel)

    def _behind(self, rows: Any) -> list[tuple[Array, np.dtype[Any]]]:
        """What lies behind the codes of each pair, [rows, groups], and in which dtype of 16 bits."""
        return [(rows.scales, self._scale_dtype)]

    @property
    def _scale_dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float16)

    def _nibbles(self, codes: Array) -> Array:
        """Codes, int8, as the four bits that are stored."""
        nibbles: Array = codes.view(np.uint8) + np.uint8(ZERO["i4"])
        return nibbles

    def __str__(self) -> str:
        order = f"[N/16][K/{2 * self.group}]{{[2][{self.group // 8}][16][8], f16 [2][16]}}"
        return f"i4 {order}{', gate and up alternating' if self.parts == 2 else ''}"


@dataclass(frozen=True)
class Int4ZerosPanels(Int4Panels):
    """A weight [parts * N, K] in int4, with a scale and a zero for each `group` along K."""

    @property
    def pair_words(self) -> int:
        return super().pair_words + PANEL

    def _behind(self, rows: Any) -> list[tuple[Array, np.dtype[Any]]]:
        zeros = np.zeros_like(rows.scales) if rows.zeros is None else rows.zeros
        return [*super()._behind(rows), (zeros * np.float16(1 / ZERO["z4"]), np.dtype(np.float16))]

    def __str__(self) -> str:
        return super().__str__().replace("i4", "z4", 1).replace("f16 [2][16]", "f16 [2][16], zeros f16 [2][16]", 1)


@dataclass(frozen=True)
class Mxfp4Panels(Int4Panels):
    """A weight [parts * N, K] in mxfp4."""

    @property
    def _scale_dtype(self) -> np.dtype[Any]:
        return numpy_dtype("bf16")

    def _nibbles(self, codes: Array) -> Array:
        return e2m1_of(codes)

    def __str__(self) -> str:
        return super().__str__().replace("i4", "m4", 1).replace("f16", "bf16", 1)


@dataclass(frozen=True)
class Fp8Panels:
    """A weight [parts * N, K] in fp8."""

    parts: int = 1

    def panel_words(self, k: int) -> int:
        """int32 words of a panel."""
        return (ceil(k / 4) + 1) * PANEL

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        return panel_count(shape[0] // self.parts, self.parts) * self.panel_words(shape[1]) * 4

    def pack(self, array: Any) -> Array:
        """`array` is a compiler.quantization.quantize.Quantized."""
        k = array.shape[1]

        def panel(rows: Any) -> Array:
            codes = rows.codes
            stored = np.zeros((PANEL, padded(k, 4)), np.uint8)
            stored[: len(codes), :k] = codes.view(np.uint8)
            words = fp8_words(stored.view(np.uint32), "bf16")
            lanes = np.zeros(PANEL, np.float32)
            lanes[: len(codes)] = rows.scales[:, 0] * FP8_IN_PAIRS
            return np.concatenate([np.ascontiguousarray(words.T).reshape(-1), lanes.view(np.uint32)])

        return _in_panels(array, self.parts, self.panel_words(k), panel)

    def __str__(self) -> str:
        return f"f8 [N/16]{{[K/4][16][4], f32 [16]}}{', gate and up alternating' if self.parts == 2 else ''}"


def _in_panels(array: Any, parts: int, words: int, panel: Any) -> Array:
    """Every panel of a quantised weight, `panel(rows)` of up to 16 of its rows, one after the other."""
    n = array.shape[0] // parts
    panels = np.zeros((panel_count(n, parts), words), np.uint32)

    def fill(index: int) -> None:
        first, part = index // parts * PANEL, index % parts
        rows = slice(part * n + first, part * n + min(first + PANEL, n))
        panels[index] = panel(array.rows(rows))

    with ThreadPoolExecutor(_WORKERS) as pool:
        list(pool.map(fill, range(ceil(n / PANEL) * parts)))
    return panels.reshape(-1)
