"""Pages of the KV cache as bytes, written out by the words that describe them."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.compiler.kernel import PAGE_TOKENS, numpy_dtype

Array = np.ndarray[Any, Any]
STEP = np.float32(1 / 127)
STRAY_CODE = -77
"""Of tokens that nobody has written: codes are numbers whatever they are, their scale is none."""


def in_page_order(kv: Array, dtype: str) -> Array:
    """Keys and values [n_pages, KH, 2, 64, D] -> the bytes of each page's part for a layer, [n_pages, n]."""
    if dtype == "int8":
        return coded(kv)
    kv = kv.astype(numpy_dtype(dtype))
    if dtype != "f32":
        kv = kv.reshape(*kv.shape[:4], kv.shape[4] // 8, 8).swapaxes(3, 4)
    return np.ascontiguousarray(kv).reshape(len(kv), -1).view(np.uint8).copy()


def coded(kv: Array) -> Array:
    """The same for int8: [D/16 chunks][64 tokens][16] of code + 128, then [64] scales, K and V of each head."""
    codes, scales = to_codes(kv)
    n_chunks = kv.shape[-1] // 16
    chunks = (codes.astype(np.int16) + 128).astype(np.uint8).reshape(*kv.shape[:4], n_chunks, 16)
    placed = np.empty((*kv.shape[:3], n_chunks, PAGE_TOKENS, 16), np.uint8)
    tokens = np.arange(PAGE_TOKENS)
    for chunk in range(n_chunks):
        placed[..., chunk, tokens ^ (2 * (chunk % 4) + chunk % 2), :] = chunks[..., chunk, :]
    parts = [np.ascontiguousarray(part).view(np.uint8).reshape(*kv.shape[:3], -1) for part in (placed, scales)]
    return np.concatenate(parts, axis=-1).reshape(len(kv), -1)


def to_codes(x: Array) -> tuple[Array, Array]:
    """Vectors [..., D] whose largest element is about 127 times a power of 2 -> int8 codes, f32 scales [...]."""
    with np.errstate(invalid="ignore"):
        unit = 2.0 ** np.rint(np.log2(np.maximum(np.abs(x).max(-1), 1e-30) / 127))
        codes = np.where(np.isnan(x), STRAY_CODE, np.rint(x / unit[..., None]))
    return codes.astype(np.int8), np.asarray((127 * unit).astype(np.float32) * STEP)


def taken_apart(pages: Array, kv_heads: int, head_dim: int) -> tuple[Array, Array]:
    """Bytes of int8 pages' parts for a layer -> codes [n_pages, KH, 2, 64, D], scales [n_pages, KH, 2, 64]."""
    heads = pages.reshape(len(pages), kv_heads, 2, -1)
    scales = np.ascontiguousarray(heads[..., PAGE_TOKENS * head_dim :]).view(np.float32)
    chunks = heads[..., : PAGE_TOKENS * head_dim].reshape(*heads.shape[:3], -1, PAGE_TOKENS, 16)
    codes = np.empty((*heads.shape[:3], PAGE_TOKENS, head_dim), np.int8)
    tokens = np.arange(PAGE_TOKENS)
    for chunk in range(head_dim // 16):
        stored = chunks[..., chunk, tokens ^ (2 * (chunk % 4) + chunk % 2), :].astype(np.int16)
        codes[..., 16 * chunk : 16 * chunk + 16] = stored - 128
    return codes, scales
