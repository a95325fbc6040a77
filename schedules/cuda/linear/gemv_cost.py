"""How long a GEMV takes on paper: what its candidates are ordered by."""

from __future__ import annotations

from math import ceil

from llmc.schedules.cuda.linear.call import LinearOp
from llmc.schedules.cuda.linear.gemm_tiles import Device
from llmc.schedules.cuda.linear.gemv_params import Gemv, bands, leaves_room, steps
from llmc.schedules.cuda.linear.gemv_weight import weight_format

STAGE_NS = 120.0
"""Time from a stage's arrival until its place is asked for again, besides the work on its pieces."""

DIGITS_STAGE_NS, DIGITS_PIECE_NS = 100.0, 25.0
"""The same where x is in digits, and the work on a piece: estimates, since half of the instructions are left."""

ARRIVAL_US, WARP_COPIES = 0.8, 7
"""Time from asking for weights to having them; and how many copies of 16 bytes a lane a warp has on their way.  On an
H200 products in 16, 8 and 4 bits by six and eight warps took as long as these two say, whatever their rings were."""

BULK_ARRIVAL_US = 2.3
"""The same for bulk copies, while memory is about as busy as it can be: products in int8 on an H200, with 54 to 110 KB
on their way to a multiprocessor, took as long as this says."""

DISORDER = {1: 1.6, 2: 1.3, 4: 1.0}
"""By the number of strips in a band: how much longer memory takes for a weight in codes.  A block's band of four strips
is one stretch of memory; narrower bands leave gaps, and open each page of memory again for the rest.  Measured on an
H200."""

PORT = 80e3
"""Bytes a µs that a multiprocessor gets from L2: what may be counted on of 64 a clock."""

ALONE_US = 2.5
"""Time from the last bytes of a kernel that leaves no room for the next one to the first bytes of that one.  An
estimate, which orders candidates; in models of up to 8 tokens such kernels were the faster ones
(gemv_space.fastest_in_models)."""


def cost_us(op: LinearOp, params: Gemv, device: Device) -> float:
    """Time on paper: memory, with what is in flight and how evenly blocks share the rows; the way from L2, which x
    takes too; what a block does before it can multiply, and at each band's end."""
    most_bands = ceil(bands(op, params) / (params.blocks // params.split))
    x_bytes = op.m * op.k * (2 if op.tiled_x else 4)
    reads = 1 / params.split if params.kept else 1 if params.shared_x else most_bands / params.split
    x_reads = params.blocks * reads
    idle = max(1.0, device.n_blocks / params.blocks)
    uneven = most_bands * params.blocks / params.split / bands(op, params)
    l2_us = (weight_format(op).n_bytes + x_reads * x_bytes) / device.l2 * uneven * idle
    stage_us = stage_ns(op, params) * ceil(steps(op, params) / (params.split * params.warps)) * most_bands / 1000
    start_us = 0.5 * (1.0 + params.blocks * x_bytes / device.l2) if params.shared_x else 0.3
    end_us = (0.05 if params.split == 1 else 0.15) * most_bands
    alone_us = 0.0 if leaves_room(op, params, device) else ALONE_US
    working_us = max(memory_us(op, params, device), l2_us, stage_us)
    return working_us + start_us + end_us + alone_us + deferred_us(op, params, device)


def memory_us(op: LinearOp, params: Gemv, device: Device) -> float:
    """What memory takes for the weight.  With bulk copies: rounds of all blocks, and a last one of those that are
    left."""
    n_bytes, n_bands, workers = weight_format(op).n_bytes, bands(op, params), params.blocks // params.split
    if not params.bulk:
        uneven = ceil(n_bands / workers) * workers / n_bands
        return n_bytes / rate(op, params, device, params.blocks) * (0.5 + 0.5 * uneven)
    rest = n_bands % workers
    us = (n_bands - rest) / rate(op, params, device, params.blocks)
    if rest:
        us += rest / rate(op, params, device, rest * params.split)
    return n_bytes / n_bands * us * DISORDER[params.side]


def rate(op: LinearOp, params: Gemv, device: Device, n_blocks: int) -> float:
    """Bytes a µs that so many blocks draw from memory."""
    flight = flight_bytes(op, params, device)
    each = flight / ARRIVAL_US
    if params.bulk:
        weight_bytes = params.side * weight_format(op).piece_bytes
        with_x = 1.0 if params.shared_x or params.kept else 1.0 + 128 * op.m / weight_bytes
        each = min(flight / BULK_ARRIVAL_US, PORT / with_x)
    rates = device.memory, min(n_blocks, device.n_blocks) * each
    sharpness = 12 if params.bulk else 6
    return float(sum(rate**-sharpness for rate in rates) ** (-1 / sharpness))


def deferred_us(op: LinearOp, params: Gemv, device: Device) -> float:
    """What a deferred norm takes of a block's time: behind it, its parts are merged before the first product; in front
    of it, moments of 16 outputs come from six exchanges between lanes, one after the other."""
    merged_us = 0.2 + params.blocks * op.taken_bytes / device.l2 if op.deferred else 0.0
    return merged_us + (0.2 if op.moments else 0.0)


def flight_bytes(op: LinearOp, params: Gemv, device: Device) -> float:
    """Bytes on their way to a multiprocessor, on average: less at a band's end, and while a warp multiplies."""
    form = weight_format(op)
    warps = params.warps * max(1.0, params.blocks / device.n_blocks)
    own_steps, ring = ceil(steps(op, params) / params.split), params.warps * params.stages
    used = own_steps / (ceil(own_steps / ring) * ring)
    stage_bytes = params.side * params.depth * form.piece_bytes
    turn_ns = 1000 * warps * stage_bytes * device.n_blocks / device.memory
    busy = min(1.0, stage_ns(op, params) / turn_ns)
    stages = max(used * params.stages - busy, 0.25)
    if not params.bulk:
        copies = params.side * ceil(form.piece_bytes / 512) + (0 if params.shared_x else op.m / 4)
        stages = min(stages, WARP_COPIES / copies)
    return warps * stage_bytes * stages


def stage_ns(op: LinearOp, params: Gemv) -> float:
    """What a warp takes for a stage, if it need not wait for anything."""
    pieces = params.side * params.depth
    if params.digits:
        return DIGITS_STAGE_NS + DIGITS_PIECE_NS * pieces
    return STAGE_NS + weight_format(op).piece_ns * pieces * ceil(op.m / 8)


def ahead_of(op: LinearOp, params: Gemv, device: Device) -> int:
    """Stages of a warp that memory delivers from the end of the kernel in front until x is there, and normalised."""
    x_us = 2.0 + device.n_blocks * op.m * op.k * (2 if op.tiled_x else 4) / device.l2
    each = params.warps * params.side * params.depth * weight_format(op).piece_bytes * device.n_blocks
    return min(16, ceil(x_us * device.memory / each))
