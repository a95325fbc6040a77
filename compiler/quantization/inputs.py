"""How kernels for CPUs round what quantised weights multiply: x, to int8, with a scale for each block of a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llmc.compiler.weights import Array

if TYPE_CHECKING:
    from llmc.compiler.quantization.quantize import Scheme

LARGEST = np.float32(127)
LEAST_INPUTS = 8
"""Of a product whose weight is worth codes."""


def block_of(k: int) -> int:
    """How many elements along K of x share a scale beside int8 weights: 128, or fewer where that divides K."""
    return next((size for size in (128, 64) if k % size == 0), 32)


def round_inputs(x: Array, scheme: Scheme) -> Array:
    """x, float32 [rows, K], as it is multiplied beside weights of the scheme; beside fp8 it is not rounded."""
    if scheme.number == "fp":
        return x
    k = x.shape[1]
    block = scheme.group or block_of(k)
    blocks = np.pad(x, ((0, 0), (0, -k % block))).reshape(len(x), -1, block)
    scale = np.maximum(np.abs(blocks).max(-1, keepdims=True) / LARGEST, np.finfo(np.float32).tiny)
    result: Array = (np.rint(blocks / scale) * scale).reshape(len(x), -1)[:, :k]
    return result
