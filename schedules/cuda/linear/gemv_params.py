"""What a GEMV is cut into (include/gemv.cuh), and what that takes of a multiprocessor."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from llmc.schedules.cuda.linear.call import LinearOp
from llmc.schedules.cuda.linear.gemm_tiles import Device
from llmc.schedules.cuda.linear.gemv_weight import weight_format

STRIP, COLUMN = 16, 64
"""Rows of the weight, and of K, in a piece."""

FOUR_BITS = ("i4", "z4", "m4")

REGISTERS = 512
"""Each of a multiprocessor's four parts has so many for each lane, which its warps share."""


@dataclass(frozen=True)
class Gemv:
    """How a GEMV is cut up.

    warps       of a block
    stages      columns of 64 of K that a warp copies ahead
    side        strips of 16 rows that a warp takes at a time
    blocks      of the grid
    ahead       columns that a warp asks for beyond its stages, before the kernel in front has ended
    shared_x    whether x is kept in shared memory, rather than read again for each band
    early       whether the next kernel is let in at once, rather than when the last weights have been asked for
    apart       whether a norm is a launch of its own in front, rather than the first work of each block
    digits      whether x is multiplied in two digits of 8 bits by int4 codes as they are (include/gemv_digits.cuh);
                x is then shared
    bulk        whether stages come by bulk copies (include/gemv_ring.cuh)
    split       blocks of a cluster that share bands (include/gemv_split.cuh)
    depth       neighbouring columns in a stage of four strips
    kept        whether each warp keeps x of its own columns in its own part of shared memory for all bands, in digits
                or as it came (include/gemv_kept.cuh)
    """

    warps: int
    stages: int
    side: int
    blocks: int
    ahead: int
    shared_x: bool
    early: bool = False
    apart: bool = False
    digits: bool = False
    bulk: bool = False
    split: int = 1
    depth: int = 1
    kept: bool = False

    def __str__(self) -> str:
        x = "in digits" if self.digits else "shared" if self.shared_x else "direct"
        x += " and kept" * self.kept
        rows = f"{STRIP * self.side} rows, {self.stages}+{self.ahead}{' pairs of columns' * (self.depth > 1)} ahead"
        more = ", bulk copies" * self.bulk + ", next let in at once" * self.early + ", behind a norm" * self.apart
        blocks = f"{self.blocks} blocks{' in pairs' * (self.split > 1)} of {self.warps} warps"
        return f"{blocks}, {rows}, x {x}{more}"

    def family(self) -> str:
        return "GEMV"


def registers(op: LinearOp, params: Gemv) -> int:
    """How many registers a thread needs at least; the compiler takes more if there are more."""
    if op.m > 8 or op.weight == op.element:
        return (104 if op.m <= 8 else 120) + (32 if op.weight in FOUR_BITS else 0)
    if op.weight in FOUR_BITS and not params.digits:
        return 120 if params.depth > 1 else 96 if params.side > 2 else 80
    return 64 if params.side <= 2 else 80


def is_resident(op: LinearOp, params: Gemv, device: Device, n_blocks: int) -> bool:
    """Whether a multiprocessor has room for so many blocks at a time."""
    fits = n_blocks * (shared_bytes(op, params) + 1024) <= device.shared_bytes + 1024
    warps = ceil(n_blocks * params.warps / 4)
    return fits and registers(op, params) <= REGISTERS // warps // 8 * 8


def leaves_room(op: LinearOp, params: Gemv, device: Device) -> bool:
    """Whether the next kernel's blocks can come beside those of this one, and ask for their weights early."""
    return is_resident(op, params, device, 2 * ceil(params.blocks / device.n_blocks))


def resident_blocks(op: LinearOp, params: Gemv, device: Device) -> int:
    """Blocks that a multiprocessor shall have room for: its own, and as many of the next kernel's if they fit."""
    own = ceil(params.blocks / device.n_blocks)
    return 2 * own if leaves_room(op, params, device) else own


def bands(op: LinearOp, params: Gemv) -> int:
    return ceil(strips(op) / params.side)


def steps(op: LinearOp, params: Gemv) -> int:
    """Stages of a band, of all warps that share it."""
    return ceil(ceil(op.k / COLUMN) / params.depth)


def strips(op: LinearOp) -> int:
    """Strips of 16 stored rows that are computed: to the end of the last slab of a tiled y."""
    n = ceil(op.n / COLUMN) * COLUMN if op.tiled_y else op.n
    return ceil(n / (8 if op.gated else STRIP))


def x_bytes(op: LinearOp, *, digits: bool = False) -> int:
    """x in shared memory; in digits with a unit for each column of a token."""
    rows = ceil(op.k / COLUMN) * op.m
    return ceil(rows * 132 / 16) * 16 if digits else rows * 128


def kept_bytes(op: LinearOp, params: Gemv) -> int:
    """x in shared memory that each warp keeps of its own columns."""
    columns = ceil(steps(op, params) / (params.split * params.warps)) * params.depth
    if params.digits:
        return params.warps * ceil(columns * op.m * 132 / 16) * 16
    return params.warps * columns * ceil(op.m / 8) * 1152


def ring_bytes(op: LinearOp, params: Gemv) -> int:
    """Weights in the rings of a block."""
    return params.warps * params.stages * params.depth * params.side * weight_format(op).piece_bytes


def shared_bytes(op: LinearOp, params: Gemv) -> int:
    """What include/gemv.cuh takes: x, bands' sums, rings, what another block sends, and moments or deferred norms."""
    fragments = params.side * ceil(op.m / 8)
    sums = (1 if params.bulk else 2) * params.warps * fragments * (256 if params.digits else 512)
    inbox = 512 * fragments + 16 if params.split > 1 else 0
    norm_bytes = 8 * op.m if op.deferred else 12 * max(1, params.warps // op.m) * op.m if op.norm else 0
    x_slot = 0 if params.shared_x or params.kept else ceil(op.m / 8) * 1024 if op.weight == op.element else op.m * 128
    ring = ring_bytes(op, params) + params.warps * params.stages * params.depth * x_slot
    barriers = ceil(8 * params.warps * (params.stages + params.kept) / 16) * 16 if params.bulk else 0
    x = kept_bytes(op, params) if params.kept else x_bytes(op, digits=params.digits) * params.shared_x
    return x + sums + ring + barriers + inbox + ceil(norm_bytes / 16) * 16
