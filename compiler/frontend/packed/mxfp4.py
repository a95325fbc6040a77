"""Weights of experts that a checkpoint keeps in MXFP4: read as bfloat16, of which each is exactly one number.

A tensor NAME [E, K, N] is there as NAME_blocks, bytes [E, N, K/32, 16], and NAME_scales, bytes [E, N, K/32].  A byte of
a block holds two numbers of 4 bits (e2m1: a sign, two bits of exponent, one of mantissa), the first in its low half; a
scale s is the power 2**(s - 127) (e8m0) that all 32 numbers of its block are multiplied by.
Open Compute Project 2023, "OCP Microscaling Formats (MX) Specification", version 1.0.
"""

from __future__ import annotations

from functools import cache

import ml_dtypes
import numpy as np

from llmc.compiler.frontend.checkpoint import StoredTensor
from llmc.compiler.frontend.packed.packing import Packing
from llmc.compiler.frontend.packed.settings import Settings
from llmc.compiler.frontend.packed.tensor import Checkpoint, Names, PackedTensor, Parts, join, misfit, packed_tensor
from llmc.compiler.weights import Array

METHOD = "mxfp4"
NAMES = Names("", {"codes": "_blocks", "scales": "_scales"})
BLOCK = 32
NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = np.array([*NUMBERS, *(-number for number in NUMBERS)], np.float32)
"""What the four bits say: the highest is the sign, the lower three one of NUMBERS."""


def mxfp4(settings: Settings) -> Packing:
    """How a checkpoint is read whose experts are in MXFP4."""
    return Packing("MXFP4 (experts), 4 bits in groups of 32", join_blocks, METHOD)


def join_blocks(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """The checkpoint with one tensor in place of each pair of blocks and scales.  Reads no tensor."""
    return join(checkpoint, NAMES, joined)


def joined(name: str, parts: Parts) -> PackedTensor:
    blocks, scales = parts["codes"], parts["scales"]
    is_pair = len(blocks.dims) == 4 and blocks.dims[3] == BLOCK // 2 and blocks.dims[:3] == scales.dims
    are_bytes = blocks.dtype == scales.dtype == "U8"
    if not (is_pair and are_bytes):
        raise misfit(name, "blocks and scales in MXFP4", parts)
    n_experts, rows, groups, _ = blocks.dims

    def read() -> Array:
        """The values, bfloat16 [E, K, N]: a view of [E, N, K], as they lie in the file."""
        return unpack(blocks.read_raw(), scales.read_raw()).transpose(0, 2, 1)

    return packed_tensor(METHOD, name, (n_experts, groups * BLOCK, rows), parts, read, "bf16")


def unpack(blocks: Array, scales: Array) -> Array:
    """bfloat16 [..., N, K] of blocks uint8 [..., N, K/32, 16] and scales uint8 [..., N, K/32].

    Row by row of the first axis, so that no more than its own result is in memory."""
    table = pairs()
    values = np.empty((*blocks.shape[:-2], blocks.shape[-2] * BLOCK // 2), np.uint32)
    for of_blocks, of_scales, result in zip(blocks, scales, values, strict=True):
        code = of_scales.astype(np.uint16)[..., None] << 8 | of_blocks
        np.take(table, code, out=result.reshape(code.shape), mode="clip")
    return values.view(ml_dtypes.bfloat16)


@cache
def pairs() -> Array:
    """The two numbers in bfloat16, 32 bits together, for each scale and each byte: [256 * 256]."""
    byte = np.arange(256)
    both = np.stack([E2M1[byte & 15], E2M1[byte >> 4]], axis=-1)  # [byte, 2]
    with np.errstate(over="ignore", invalid="ignore"):
        powers = np.exp2(np.arange(256) - 127.0).astype(np.float32)
        values = (powers[:, None, None] * both).astype(ml_dtypes.bfloat16)
    return np.ascontiguousarray(values).view(np.uint32).reshape(-1)
