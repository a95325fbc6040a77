"""Weights in float8 (e4m3fn) with scales: one for each block, each row, or the whole tensor.

    number[n, k] = code[n, k] * scale[n / R, k / C]

Blocks: NAME.weight [N, K] has beside it NAME.weight_scale_inv, float32 [ceil(N/R), ceil(K/C)]; config.json says R and
C.  DeepSeek-AI 2024, arXiv:2412.19437.  They are read as bfloat16.  A tensor: NAME.weight_scale, one number.  Rows
("fbgemm_fp8"): NAME.weight_scale, float32 [N, 1].
"""

from __future__ import annotations

from functools import partial

import ml_dtypes

from llmc.compiler.frontend.checkpoint import StoredTensor
from llmc.compiler.frontend.packed.packing import Packing
from llmc.compiler.frontend.packed.settings import Settings
from llmc.compiler.frontend.packed.tensor import (
    Checkpoint,
    Names,
    PackedTensor,
    Parts,
    float32,
    grid_of,
    in_blocks,
    is_matrix,
    is_tensor,
    join,
    made_for,
    misfit,
    packed_tensor,
    scaled,
)
from llmc.compiler.weights import Array

DTYPE = "F8_E4M3"
BLOCKS = Names("", {"codes": "", "scales": "_scale_inv"}, unused=("_input_scale",))
ROWS = Names(".weight", {"codes": ".weight", "scales": ".weight_scale"}, unused=(".input_scale", ".input_scale_ub"))


def fp8(settings: Settings) -> Packing:
    """How a checkpoint is read whose weights are in float8 with scales for blocks, or for tensors."""
    if settings.fields.get("weight_block_size") is None:
        return Packing("float8 with a scale a tensor", lambda found: join(found, ROWS, by_rows), "fp8", activations())
    block = settings.block("weight_block_size")
    said = f"float8 with a scale for each {block[0]} by {block[1]}"
    return Packing(said, partial(join_blocks, block=block), "fp8", activations())


def fbgemm(settings: Settings) -> Packing:
    """How a checkpoint is read whose weights are in float8 with a scale for each row."""
    return Packing("float8 with a scale a row", lambda found: join(found, ROWS, by_rows), "fp8", activations())


def activations(of: str = "float8") -> tuple[str, ...]:
    return (f"the checkpoint was made for activations in {of}; they are computed as those of other models are",)


def join_blocks(checkpoint: Checkpoint, block: tuple[int, int]) -> dict[str, StoredTensor]:
    """The checkpoint with one tensor in place of each pair of codes and scales.  Reads no tensor."""
    return join(checkpoint, BLOCKS, partial(by_blocks, block=block))


def by_blocks(name: str, parts: Parts, *, block: tuple[int, int]) -> PackedTensor:
    codes, scales = parts["codes"], parts["scales"]
    what = f"float8 with scales for blocks of {block[0]} by {block[1]}"
    if not is_matrix(codes, (DTYPE,)):
        raise misfit(name, what, parts)
    grid = in_blocks(codes.dims[0], codes.dims[1], *block)
    if not is_tensor(scales, ("F32", "BF16"), *grid.shape):
        raise misfit(name, what, parts)

    def read() -> Array:
        return scaled(codes.read_raw(), float32(scales), grid, dtype=ml_dtypes.bfloat16)

    return packed_tensor("fp8", name, codes.dims, parts, read, "bf16")


def by_rows(name: str, parts: Parts) -> PackedTensor:
    """Codes [N, K] with scales [N, 1] or [N], or one for all."""
    codes, scales = parts["codes"], parts["scales"]
    grid = grid_of(scales, codes.dims[0], codes.dims[1]) if is_matrix(codes, (DTYPE,)) else None
    if grid is None:
        raise misfit(name, "float8 with scales for rows", parts)

    def read() -> Array:
        return scaled(codes.read_raw(), float32(scales), grid)

    return packed_tensor("fp8", name, codes.dims, parts, read, made_for(scales))
