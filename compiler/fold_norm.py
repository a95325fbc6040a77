"""What is left of LayerNorm's weight and bias when a product applies the norm to its sums (ops/deferred_norm.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

ROWS_AT_ONCE = 256


def fold_norm(
    weight: Array,
    norm_weight: Array,
    norm_bias: Array,
    bias: Array | None = None,
    *,
    widen: Callable[[Array], Array] = lambda rows: rows.astype(np.float32),
) -> Array:
    """[W g; W b + bias], f32 [2, rows] of W [rows, K], norm weight g and norm bias b [K], bias [rows], all as stored.

    widen: the f32 values of numbers as they are stored.  Summed in float64, so that in no order of K it comes out
    otherwise but for the rounding at the end.
    """
    vectors = np.stack([widen(norm_weight), widen(norm_bias)], axis=1).astype(np.float64)
    sums = np.empty((len(weight), 2))
    for first in range(0, len(weight), ROWS_AT_ONCE):
        rows = widen(weight[first : first + ROWS_AT_ONCE]).astype(np.float64)
        sums[first : first + ROWS_AT_ONCE] = rows @ vectors
    if bias is not None:
        sums[:, 1] += widen(bias)
    return np.ascontiguousarray(sums.T, np.float32)
