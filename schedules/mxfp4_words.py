"""Codes in mxfp4: floats of 4 bits, e2m1, and where the bits of eight of them lie in a word of a GPU's packed weight.

A code has a sign s, two bits of exponent e and one of mantissa m.  At the places of a bf16's sign, lowest exponent bits
and highest mantissa bit, s000000eem000000, they are a number that is 2**-126 times the code's value; subnormal codes
become subnormal numbers.  So one mask takes a pair of codes, 16 bits apart, out of a word.  A word has four such pairs,
each rotated so that none covers another; for the last there is no place in one piece, and it lies in two (TURNS).
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

E2M1 = (0, 1, 2, 3, 4, 6, 8, 12)
"""Twice what the lower three bits of e2m1 say; the highest is the sign."""
TURNS = (((0x81C0, 0),), ((0x81C0, 6),), ((0x81C0, 10),), ((0x80C0, 4), (0x0100, 12)))
"""The bits of each pair, and how far they are rotated to the left (cuda/include/gemv_mxfp4.cuh rotates them back)."""


def e2m1_of(codes: Array) -> Array:
    """The four bits of each code, uint8, of int8: twice the numbers."""
    number_of = np.zeros(E2M1[-1] + 1, np.uint8)
    number_of[list(E2M1)] = range(len(E2M1))
    numbers: Array = number_of[np.abs(codes)] | (codes < 0).astype(np.uint8) << 3
    return numbers


def mxfp4_words(chunks: Array) -> Array:
    """uint32 of eight codes, of uint64 whose bytes are the four bits of each in order; the first of a pair is lower."""
    words = np.zeros(chunks.shape, np.uint32)
    for pair, parts in enumerate(TURNS):
        both = (chunks >> np.uint64(16 * pair)).astype(np.uint32)
        four = both & np.uint32(0xF) | (both & np.uint32(0xF00)) << np.uint32(8)
        placed = (four & np.uint32(0x80008)) << np.uint32(12) | (four & np.uint32(0x70007)) << np.uint32(6)
        for mask, turn in parts:
            words |= turned(placed & np.uint32(mask * 0x10001), turn)
    return words


def turned(words: Array, places: int) -> Array:
    """The words with their bits rotated so many places to the left."""
    result: Array = words << np.uint32(places) | words >> np.uint32(32 - places) if places else words
    return result
