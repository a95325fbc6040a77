"""A quantised weight brought back to tiles, for products of many tokens: include/dequantise.cuh."""

from __future__ import annotations

import hashlib
from functools import partial
from math import ceil

from llmc.compiler.kernel import Kernel, Launch, Operand
from llmc.schedules.cuda.gemv_weight import weight_format
from llmc.schedules.cuda.linear_op import LinearOp
from llmc.schedules.cuda.source import C_TYPES
from llmc.schedules.cuda.tile_layout import TILE, TILE_BYTES, tile_rows

WARPS = 8


def tiles_bytes(op: LinearOp) -> int:
    """What the weight takes in tiles."""
    return tile_rows(op.n, gated=op.gated) * ceil(op.k / TILE) * TILE_BYTES


def launch(op: LinearOp, operands: list[Operand]) -> Launch:
    """One launch over the weight and the tiles."""
    form = weight_format(op)
    n_strips, columns = 4 * tile_rows(op.n, gated=op.gated), ceil(op.k / TILE)
    arguments = f"{C_TYPES[op.element]}, {form.c_type}, {n_strips}, {columns}"
    key = f"dequantise_source({arguments})"
    name = f"dequantise_{op.weight}_{op.rows}x{op.k}_{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    kernel = Kernel(name, key, partial(dequantise_source, name, arguments), n_threads=32 * WARPS, dependent=True)
    n_bytes = form.n_bytes + 2 * op.rows * op.k
    return Launch(kernel, tuple(operands), ceil(n_strips * columns / WARPS), n_bytes, op.rows * op.k)


def dequantise_source(name: str, arguments: str) -> str:
    """The kernel's CUDA C++."""
    return (
        '#include "dequantise.cuh"\n\n'
        f'extern "C" __global__ void __launch_bounds__({32 * WARPS})\n'
        f"{name}(const unsigned char *weight, unsigned char *tiles) {{\n"
        f"    dequantise<{arguments}>(weight, tiles);\n"
        "}\n"
    )
