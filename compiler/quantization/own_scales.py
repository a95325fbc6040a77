"""Find the scales again of weights that are codes times scales already, because their checkpoint was quantised.

    value[k] = code[k] * scale        exactly, in float32, for all k that share the scale

The largest of the values has some code.  For each code that it may have there is one candidate for the scale, and it is
the scale if all values are multiples of it by codes.  Nothing but the values need be known, so it does not matter
whether passes have moved them since they were read.

Scales of int4 are float16.  Those of 8 bits are float32, and a checkpoint's may be too: then value = code * scale was
rounded, and the scale is found among the neighbours of the quotient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from llmc.compiler.weights import Array

SAMPLE = 16
"""So many values are checked first: most of those that are no codes show it there."""
INT4 = tuple(-float(code) for code in range(8, 0, -1))
INT8 = (127.0, -128.0, *map(float, range(126, 95, -1)))
FP8 = (448.0, 416.0, 384.0, 352.0, 320.0, 288.0, 256.0, 240.0)
"""One of each mantissa: scales are multiplied by powers of two for the others."""
NEIGHBOURS = (0, 1, -1, 2, -2)


def own_scales(values: Array, axis: int, dtype: str, round_to: Callable[[Array], None]) -> Array:
    """The scales that the values [size, n] (axis 0) or [n, size] (axis 1) have along `axis`, float32 [n]; 0 for those
    that have none, and for those that are all 0.

    dtype: "i4", "i8" or "f8".  round_to: rounds quotients, in place, to the nearest code; int8's to -128 too.
    """
    largest, smallest = values.max(axis), values.min(axis)
    sample = values[:SAMPLE] if axis == 0 else values[:, :SAMPLE]
    extremes: Array = np.where(largest > -smallest, largest, smallest)
    found: Array = np.zeros_like(extremes)
    left = np.flatnonzero(extremes)
    for scales in candidates(extremes, dtype):
        if not left.size:
            break
        tried = left[scales[left] != 0]
        for part in (sample, values):
            tried = tried[are_multiples(np.take(part, tried, 1 - axis), scales[tried], axis, round_to)]
        found[tried] = scales[tried]
        left = left[found[left] == 0]
    return found


def candidates(extremes: Array, dtype: str) -> Iterator[Array]:
    """Scales, float32, that extremes may have; the likely ones first.  0 for one that is no number of its dtype."""
    if dtype == "i4":
        for code in INT4:
            yield np.clip(extremes / np.float32(code), -65504, 65504).astype(np.float16).astype(np.float32)
        return
    codes = INT8 if dtype == "i8" else FP8
    quotients = [np.abs(extremes / np.float32(code)) for code in codes]
    for step in NEIGHBOURS:
        for quotient in quotients if step == 0 or dtype == "f8" else quotients[:2]:
            scales = (quotient.view(np.int32) + np.int32(step)).view(np.float32)
            yield np.where(np.isfinite(scales), scales, np.float32(0))


def are_multiples(values: Array, scales: Array, axis: int, round_to: Callable[[Array], None]) -> Array:
    """Whether all values along `axis` are codes times their scale [n], exactly."""
    scales = np.expand_dims(scales, axis)
    with np.errstate(over="ignore", invalid="ignore"):
        codes = values / scales
        round_to(codes)
        result: Array = (codes * scales == values).all(axis)
    return result
