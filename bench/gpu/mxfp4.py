"""Weights in mxfp4 as a GPU's kernels read them (schedules/cuda/quant_strips.py): drawn, and as numbers again."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.schedules.cuda.quant_strips import STRIPS, Mxfp4Strips
from llmc.schedules.cuda.tile_layout import TILE, ungated_rows
from llmc.schedules.mxfp4_words import TURNS, turned

Array = np.ndarray[Any, Any]
PIECE_BYTES, CODE_BYTES = Mxfp4Strips(32).piece_bytes, 512
EXPONENTS = (118, 122)
"""Of powers, + 127: weights of some hundredths."""


def drawn(seed: int, n_bytes: int) -> Array:
    """uint8 [n_bytes], whole pieces: any codes, and powers of about one size."""
    generator = np.random.default_rng(seed)
    pieces = generator.integers(0, 256, (n_bytes // PIECE_BYTES, PIECE_BYTES), np.uint8)
    pieces[:, CODE_BYTES:] = generator.integers(*EXPONENTS, (len(pieces), PIECE_BYTES - CODE_BYTES), np.uint8)
    return pieces.reshape(-1)


def unpack(packed: Array, shape: tuple[int, int], *, gated: bool) -> Array:
    """f32 of this shape, [rows, K], of the bytes of a weight; gated: of [2N, K], gate and up alternating by 8 rows."""
    rows, k = shape
    columns = -(-k // TILE)
    pieces = packed.reshape(-1, columns, STRIPS, PIECE_BYTES)
    words = np.ascontiguousarray(pieces[..., :CODE_BYTES]).view(np.uint32)
    lanes = numbers(words).reshape(-1, columns, STRIPS, 8, 4, 2, 2, 8)  # g, t, half, row half, element
    stored = lanes.transpose(0, 2, 6, 3, 1, 5, 4, 7).reshape(-1, columns * 2, 4, 4, 2)  # row; half; chunk; pair
    values = stored.swapaxes(2, 3).reshape(len(stored), columns * 2, 32)
    powers = np.ldexp(np.float32(1), pieces[..., CODE_BYTES:].astype(np.int32) - 127)
    of_rows = powers.reshape(-1, columns, STRIPS, 8, 2, 2).transpose(0, 2, 5, 3, 1, 4)  # row half, g; half
    whole = (values * of_rows.reshape(len(stored), -1, 1)).reshape(len(stored), -1)
    if gated:
        return ungated_rows(whole, shape)
    return np.ascontiguousarray(whole[:rows, :k])


def numbers(words: Array) -> Array:
    """f32 [..., 8] of words uint32 [...]."""
    pairs = []
    for parts in TURNS:
        bits = np.zeros_like(words)
        for mask, turn in parts:
            bits |= turned(words, -turn % 32) & np.uint32(mask * 0x10001)
        pairs.append(np.stack([bits << np.uint32(16), bits & np.uint32(0xFFFF0000)], -1).view(np.float32))
    return np.concatenate(pairs, -1) * np.float32(2.0**126)
