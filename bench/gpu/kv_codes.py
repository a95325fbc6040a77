"""Keys and values of an int8 cache, with NumPy: schedules/cuda/include/attention_codes.cuh says how they lie."""

from __future__ import annotations

import numpy as np

from llmc.bench.gpu.bits import Array, raw
from llmc.compiler.kernel import PAGE_TOKENS

MOST = np.float32(127)


def to_codes(x: Array) -> tuple[Array, Array]:
    """Vectors [..., D] -> int8 codes, and what one counts: f32 [...].  NaN: a token that nobody may read, NaN again."""
    peak = np.abs(x).max(-1).astype(np.float32)
    with np.errstate(invalid="ignore"):
        codes = np.rint(x * (MOST / peak)[..., None])
    return np.nan_to_num(codes).astype(np.int8), peak * (np.float32(1) / MOST)


def kept(x: Array) -> Array:
    """Vectors as the cache holds them: it holds these very codes for them, too."""
    codes, scales = to_codes(x)
    return np.asarray(codes * scales[..., None], np.float32)


def page_part(both: Array) -> Array:
    """Keys and values of a page, f32 [KH, 2, 64, D], as bytes: [D/16][64][16] of code + 128 each, then [64] scales."""
    codes, scales = to_codes(both)
    heads, _, _, dim = both.shape
    stored = (codes.astype(np.int16) + 128).astype(np.uint8)
    chunks = stored.reshape(heads, 2, PAGE_TOKENS, dim // 16, 16).swapaxes(2, 3)
    chunk, token = np.ogrid[: dim // 16, :PAGE_TOKENS]
    placed = np.empty_like(chunks)
    placed[:, :, chunk, token ^ (chunk % 4 * 2 + chunk % 2)] = chunks
    parts = [raw(part).reshape(heads, 2, -1) for part in (placed, scales)]
    return raw(np.concatenate(parts, axis=-1))
