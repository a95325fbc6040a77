"""Where the bits of four fp8 codes (e4m3fn) lie in a 32-bit word of a packed weight.

Each half of the word has two codes.  Sign, exponent and mantissa of one lie where a number of type bf16, or f16, has
its own, so that a mask makes it such a number; the bits of the other (in capitals) lie around them:

    bf16    s EEE S eeee mmm E MMM      the number is 2**-120 times the code's value: the exponent's bias is 127, not 7
    f16     s S eeee mmm EEEE MMM       2**-8 times the code's value: the bias is 15

Subnormal codes become subnormal numbers.  Codes 0 and 1 are those that a mask takes, code 0 in the lower half.
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
    """The bits under the mask in both halves of each word, moved so many places to the left."""
    bits: Array = (pair & np.uint32(mask * 0x10001)) << np.uint32(shift)
    return bits
