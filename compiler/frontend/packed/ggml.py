"""Weights in the blocks of a GGUF file: 32 or 256 neighbours of a row in a few bits, with their scales beside them.

    Q4_0, Q5_0, Q8_0    d (code - middle)
    Q4_1, Q5_1          d code + m
    Q2_K, Q4_K, Q5_K    d s code - e m      s, m: small integers for each 16 or 32 of the 256; d, e: float16
    Q3_K, Q6_K          d s (code - middle)
    IQ4_NL, IQ4_XS      d [s] LEVELS[code]
    MXFP4               2**e E2M1[code]

How bits lie is said at each function, of bytes [blocks, bytes of one]; numbers are float32, as ggml computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llmc.compiler.frontend.checkpoint import StoredTensor
from llmc.compiler.frontend.packed.mxfp4 import E2M1
from llmc.compiler.weights import Array, Coded

BLOCKS_AT_ONCE = 1 << 12


LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
"""What a code of IQ4_NL and IQ4_XS stands for: closer together where weights are more."""


class Kind(NamedTuple):
    """A type of tensor.  n: numbers of a block.  n_bytes: of one.  read: the numbers of blocks; None: plain floats.
    coded: how numbers are kept in them.  dtype: one that has them all."""

    name: str
    n: int
    n_bytes: int
    read: Callable[[Array], Array] | None = None
    coded: Coded | None = None
    dtype: Any = np.float32


def halves(blocks: Array, at: int) -> Array:
    """A float16 of each block, float32 [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def split(packed: Array, bits: int) -> Array:
    """[n, m] bytes as [n, 8 / bits * m] numbers of so many bits: first the lowest of all, then the next."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return (packed[:, None] >> shifts & np.uint8(2**bits - 1)).reshape(len(packed), -1)


def nibbles(packed: Array) -> Array:
    """[blocks, n] bytes as [blocks, 2n] numbers of 4 bits: as `split`, of two parts the quicker way."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def fifth_bits(packed: Array) -> Array:
    """32 bits, [blocks, 4] bytes, as the fifth of 32 codes."""
    return np.unpackbits(packed, axis=1, bitorder="little") << 4


def q4_0(blocks: Array) -> Array:
    """d, [16] bytes."""
    return halves(blocks, 0) * (nibbles(blocks[:, 2:]).astype(np.float32) - 8)


def q4_1(blocks: Array) -> Array:
    """d, m, [16] bytes."""
    return halves(blocks, 0) * nibbles(blocks[:, 4:]) + halves(blocks, 2)


def q5_0(blocks: Array) -> Array:
    """d, [4] bytes of fifth bits, [16] bytes."""
    codes = nibbles(blocks[:, 6:]) | fifth_bits(blocks[:, 2:6])
    return halves(blocks, 0) * (codes.astype(np.float32) - 16)


def q5_1(blocks: Array) -> Array:
    """d, m, [4] bytes of fifth bits, [16] bytes."""
    return halves(blocks, 0) * (nibbles(blocks[:, 8:]) | fifth_bits(blocks[:, 4:8])) + halves(blocks, 2)


def q8_0(blocks: Array) -> Array:
    """d, [32] int8."""
    return halves(blocks, 0) * blocks[:, 2:].view(np.int8)


def scales_and_minima(packed: Array) -> tuple[Array, Array]:
    """Eight of each, of 6 bits, in 12 bytes: the first four of both whole, and the upper bits of the others beside
    them; float32 [blocks, 8, 1]."""
    low, high, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([low & 63, rest & 15 | low >> 6 << 4], axis=1)
    minima = np.concatenate([high & 63, rest >> 4 | high >> 6 << 4], axis=1)
    return scales.astype(np.float32)[..., None], minima.astype(np.float32)[..., None]


def of_eighths(blocks: Array, codes: Array) -> Array:
    """d, e, 12 bytes of scales and minima: of codes [blocks, 256], 32 have one of each."""
    scales, minima = scales_and_minima(blocks[:, 4:16])
    scales, minima = scales * halves(blocks, 0)[..., None], minima * halves(blocks, 2)[..., None]
    values: Array = (scales * codes.reshape(-1, 8, 32) - minima).reshape(-1, 256)
    return values


def q4_k(blocks: Array) -> Array:
    """Codes behind scales, in [4][32] bytes: the low half of each 32, then the high."""
    return of_eighths(blocks, nibbles(blocks[:, 16:].reshape(-1, 32)))


def q5_k(blocks: Array) -> Array:
    """Codes behind scales: in [32] bytes bit i is the fifth bit of 32 codes of the i-th eighth; then as in Q4_K."""
    codes = nibbles(blocks[:, 48:].reshape(-1, 32)).reshape(-1, 256)
    return of_eighths(blocks, codes | split(blocks[:, 16:48], 1) << 4)


def two_bits(packed: Array) -> Array:
    """[blocks, 64] bytes as [blocks, 256] numbers of 2 bits: of each 32 bytes the lowest two of all, then the next."""
    return split(packed.reshape(-1, 32), 2).reshape(-1, 256)


def q2_k(blocks: Array) -> Array:
    """[16] bytes: a scale low, a minimum high; [64] bytes of codes; d, e."""
    small = blocks[:, :16, None]
    scales, minima = halves(blocks, 80)[..., None] * (small & 15), halves(blocks, 82)[..., None] * (small >> 4)
    values: Array = (scales * two_bits(blocks[:, 16:80]).reshape(-1, 16, 16) - minima).reshape(-1, 256)
    return values


def q3_k(blocks: Array) -> Array:
    """[32] bytes: bit i is the third of 32 codes of the eighth i; [64] bytes of their lower two; 16 scales of 6 bits in
    12 bytes, four bits of each in the first eight, two in the others; d."""
    codes = two_bits(blocks[:, 32:96]) | split(blocks[:, :32], 1) << 2
    scales = (nibbles(blocks[:, 96:104]) | split(blocks[:, 104:108], 2) << 4).astype(np.float32) - 32
    scales = (halves(blocks, 108) * scales)[..., None]
    values: Array = (scales * (codes.reshape(-1, 16, 16).astype(np.float32) - 4)).reshape(-1, 256)
    return values


def q6_k(blocks: Array) -> Array:
    """[2][64] bytes of lower four bits, [2][32] of upper two, [16] int8 scales; d."""
    lower = nibbles(blocks[:, :128].reshape(-1, 64)).reshape(-1, 256)
    codes = lower | two_bits(blocks[:, 128:192]) << 4
    scales = (halves(blocks, 208) * blocks[:, 192:208].view(np.int8))[..., None]
    values: Array = (scales * (codes.reshape(-1, 16, 16).astype(np.float32) - 32)).reshape(-1, 256)
    return values


def iq4_nl(blocks: Array) -> Array:
    """d, [16] bytes."""
    return halves(blocks, 0) * LEVELS[nibbles(blocks[:, 2:])]


def iq4_xs(blocks: Array) -> Array:
    """d, the upper two bits of eight scales of 6 in 2 bytes, their lower four in 4, [8][16] bytes of codes."""
    upper, lower = split_in_order(blocks[:, 2:4], 2), split_in_order(blocks[:, 4:8], 4)
    scales = halves(blocks, 0) * ((lower | upper << 4).astype(np.float32) - 32)
    codes = nibbles(blocks[:, 8:].reshape(-1, 16)).reshape(-1, 8, 32)
    values: Array = (scales[..., None] * LEVELS[codes]).reshape(-1, 256)
    return values


def split_in_order(packed: Array, bits: int) -> Array:
    """[n, m] bytes as [n, 8 / bits * m] numbers of so many bits: all of the first byte, the lowest first, and so on."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return (packed[..., None] >> shifts & np.uint8(2**bits - 1)).reshape(len(packed), -1)


def mxfp4(blocks: Array) -> Array:
    """A power of two e - 127, [16] bytes.  Each number is one that bfloat16 has."""
    with np.errstate(over="ignore"):  # what is not finite is for who reads it
        return np.ldexp(E2M1[nibbles(blocks[:, 1:])], blocks[:, :1].astype(np.int32) - 127)


KINDS: Mapping[int, Kind] = {
    0: Kind("F32", 1, 4),
    1: Kind("F16", 1, 2),
    2: Kind("Q4_0", 32, 18, q4_0, Coded(4, 32)),
    3: Kind("Q4_1", 32, 20, q4_1, Coded(4, 32, zeros=True)),
    6: Kind("Q5_0", 32, 22, q5_0, Coded(5, 32)),
    7: Kind("Q5_1", 32, 24, q5_1, Coded(5, 32, zeros=True)),
    8: Kind("Q8_0", 32, 34, q8_0, Coded(8, 32)),
    10: Kind("Q2_K", 256, 84, q2_k, Coded(2, 16, zeros=True)),
    11: Kind("Q3_K", 256, 110, q3_k, Coded(3, 16)),
    12: Kind("Q4_K", 256, 144, q4_k, Coded(4, 32, zeros=True)),
    13: Kind("Q5_K", 256, 176, q5_k, Coded(5, 32, zeros=True)),
    14: Kind("Q6_K", 256, 210, q6_k, Coded(6, 16)),
    20: Kind("IQ4_NL", 32, 18, iq4_nl, Coded(4, 32)),
    23: Kind("IQ4_XS", 256, 136, iq4_xs, Coded(4, 32)),
    30: Kind("BF16", 1, 2),
    39: Kind("MXFP4", 32, 17, mxfp4, Coded(4, 32), dtype=ml_dtypes.bfloat16),
}
"""By the number that a GGUF file has for it."""
BY_NAME = {kind.name: kind for kind in KINDS.values()}


def numbers(tensor: StoredTensor) -> Array:
    """The values of a tensor, as it lies in the file, of blocks in float32, or in bfloat16 where that has them all."""
    kind = BY_NAME[tensor.dtype]
    if kind.read is None:
        return tensor.read()
    blocks = tensor.read_bytes().reshape(-1, kind.n_bytes)
    values = np.empty((len(blocks), kind.n), kind.dtype)
    for first in range(0, len(blocks), BLOCKS_AT_ONCE):
        values[first : first + BLOCKS_AT_ONCE] = kind.read(blocks[first : first + BLOCKS_AT_ONCE])
    return values.reshape(tensor.dims)
