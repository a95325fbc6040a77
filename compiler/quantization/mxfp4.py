"""Weights in mxfp4: codes that are twice a float of 4 bits, e2m1, and a power of two for each group along K."""

from __future__ import annotations

from math import ceil

import numpy as np

from llmc.compiler.weights import Array

POWERS = (-127, 125)
"""The smallest and the largest exponent of a scale that is tried first: bf16 has these powers of two, and the next."""


def fit_powers(block: Array, group: int) -> tuple[Array, Array, int]:
    """Codes and scales float32 [rows, groups] of rows [rows, K] in mxfp4, and the number of groups that they keep
    exactly.

    Two scales are tried for each group: the least power of two that does not clip the largest weight by more than its
    last bit, and the next one.  The one with the smaller squared error is taken."""
    rows, k = block.shape
    groups = ceil(k / group)
    if k % group:
        block = np.pad(block, ((0, 0), (0, groups * group - k)))
    block = block.reshape(rows, groups, group)
    _, exponent = np.frexp(np.abs(block).max(-1, keepdims=True))
    least = np.ldexp(np.float32(1), np.clip(exponent - 4, *POWERS)).astype(np.float32)  # codes of 8 up to 16
    wanted = block / least
    fine, coarse = round_to_e2m1(wanted), 2 * round_to_e2m1(wanted / 2)
    of_fine, of_coarse = (np.square(codes - wanted).sum(-1, keepdims=True) for codes in (fine, coarse))
    codes = np.where(of_coarse < of_fine, coarse / 2, fine).astype(np.int8)
    scales = np.where(of_coarse < of_fine, 2 * least, least)
    n_kept = int((np.minimum(of_fine, of_coarse) == 0).sum())
    return codes.reshape(rows, -1)[:, :k], scales[..., 0], n_kept


def round_to_e2m1(values: Array) -> Array:
    """The nearest of 0, 1, 2, 3, 4, 6, 8, 12 and their negatives, ties to the even mantissa; 12 for all beyond."""
    sizes = np.abs(values)
    steps = np.where(sizes < 4, np.float32(1), np.where(sizes < 8, np.float32(2), np.float32(4)))
    codes: Array = np.clip(np.rint(values / steps) * steps, -12, 12)
    return codes
