"""How a product's weight is stored, and read: include/gemv_weight.cuh, and of codes gemv_quant.cuh, gemv_zeros.cuh and
gemv_mxfp4.cuh."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from llmc.compiler.kernel import Layout
from llmc.schedules.cuda.linear.call import LinearOp
from llmc.schedules.cuda.quant_strips import Fp8Strips, Int4Strips, Int4ZerosStrips, Int8Strips, Mxfp4Strips
from llmc.schedules.cuda.source import C_TYPES
from llmc.schedules.cuda.tile_layout import GatedTiles, Tiles


@dataclass(frozen=True)
class WeightFormat:
    """How a weight is stored, and what reading it takes.  A piece is 16 rows by 64 of K.

    layout          of the constant
    c_type          the C++ type that reads it in a kernel
    n_bytes         what must be read of it, without padding
    piece_bytes     of a piece
    piece_ns        time for a warp of a GEMV to multiply a piece
    operands_ns     time for a multiprocessor to turn a piece's codes into what is multiplied (include/gemm_codes.cuh)
    sides           strips that a warp of a GEMV may take at a time"""

    layout: Layout
    c_type: str
    n_bytes: int
    piece_bytes: int
    piece_ns: float
    operands_ns: float
    sides: tuple[int, ...]


def weight_format(op: LinearOp) -> WeightFormat:
    """The format of the op's weight, which is stored in what is multiplied, or quantised."""
    assert op.element != "f32"
    element, size = C_TYPES[op.element], op.rows * op.k
    if op.weight == "i8":
        strips = Int8Strips(op.alternates)
        return WeightFormat(strips, f"Int8Weight<{element}>", size + 4 * op.rows, 1024, 60.0, 15.0, (1, 2, 4))
    if op.weight == "f8":
        floats = Fp8Strips(op.alternates, op.element)
        return WeightFormat(floats, f"Fp8Weight<{element}>", size + 4 * op.rows, 1024, 60.0, 15.0, (1, 2, 4))
    if op.weight == "i4":
        layout = Int4Strips(op.group, op.alternates)
        n_bytes = size // 2 + 2 * op.rows * ceil(op.k / op.group)
        return WeightFormat(
            layout, f"Int4Weight<{element}, {op.group}>", n_bytes, layout.piece_bytes, 50.0, 21.0, (1, 2, 4)
        )
    if op.weight == "z4":
        zeros = Int4ZerosStrips(op.group, op.alternates)
        n_bytes = size // 2 + 4 * op.rows * ceil(op.k / op.group)
        kind = f"Int4ZerosWeight<{element}, {op.group}>"
        return WeightFormat(zeros, kind, n_bytes, zeros.piece_bytes, 60.0, 22.0, (1, 2, 4))
    if op.weight == "m4":
        powers = Mxfp4Strips(op.group, op.alternates)
        n_bytes = size // 2 + op.rows * ceil(op.k / op.group)
        return WeightFormat(powers, f"Mxfp4Weight<{element}>", n_bytes, powers.piece_bytes, 60.0, 24.0, (1, 2, 4))
    tiles = GatedTiles(op.element) if op.alternates else Tiles(op.element)
    return WeightFormat(tiles, f"PlainWeight<{element}>", 2 * size, 2048, 45.0, 0.0, (1, 2))
