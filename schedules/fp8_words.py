"""Where the bits of four fp8 codes (e4m3fn) lie in a word of a packed weight.

Sign, exponent and mantissa of the first two codes lie in the two halves of the word where bf16, or f16, has its own, so
that a mask makes them numbers of that type; those of the second two (in capitals) lie around them:

    bf16    s EEE S eeee mmm E MMM      a number is 2**-120 of what the code says: the exponent's bias is 127, not 7
    f16     s S eeee mmm EEEE MMM       2**-8 of it: the bias is 15

Subnormal codes are subnormal numbers.  Codes 0 and 1 are the first two, the lower half first.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, Any]


def fp8_words(codes: Array, element: Literal["bf16", "f16"]) -> Array:
    """uint32 with the bits where numbers of `element` have theirs, of uint32 whose bytes are the codes in order."""
    first = codes & np.uint32(0xFF) | (codes & np.uint32(0xFF00)) << np.uint32(8)
    second = codes >> np.uint32(16) & np.uint32(0xFF) | (codes & np.uint32(0xFF000000)) >> np.uint32(8)
    if element == "f16":
        return moved(first, 0x80, 8) | moved(first, 0x7F, 7) | moved(second, 0x80, 7) | moved(second, 0x7F, 0)
    words = moved(first, 0x80, 8) | moved(first, 0x7F, 4)
    words |= moved(second, 0x80, 4) | moved(second, 0x70, 8) | moved(second, 0x0F, 0)
    return words


def moved(pair: Array, mask: int, shift: int) -> Array:
    """The bits under the mask of both halves, so many places to the left."""
    bits: Array = (pair & np.uint32(mask * 0x10001)) << np.uint32(shift)
    return bits
