"""Linear layers of up to 16 tokens on a GPU, bound by the weight's bytes: include/gemv.cuh says how it is done.

    norm    (M <= 8) each block normalises x for itself, while its first weights are on their way; or it is deferred
            to the sums, and prepared by the product in front (include/gemv_norm.cuh)
    multiply on tensor cores, weights copied far ahead, each lane's own, in the order of its registers
    finish  bias, activation, gate and residual in registers

Bytes: the weight once; x once a block, from L2; y.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from math import ceil

from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, Layout, Operand, RowMajor
from llmc.compiler.target import Target
from llmc.schedules.cuda.gemm_tiles import DEVICES, Device
from llmc.schedules.cuda.gemv_weight import weight_format
from llmc.schedules.cuda.linear_op import LinearOp
from llmc.schedules.cuda.linear_operands import epilogue, is_folded, layouts, other_parameters, others
from llmc.schedules.cuda.norm import c_bool
from llmc.schedules.cuda.source import C_TYPES

MOST_TOKENS = 16
MOST_NORMED_TOKENS = 8
"""Beyond this a norm is a launch of its own, rather than each block's first work."""

LEAST_RING_BYTES = 40 << 10
"""Of shared memory beside x: the smallest rings, and sums."""

STRIP, COLUMN = 16, 64
"""Rows of the weight, and of K, in a piece."""

REGISTERS = 512
"""Of a lane of one of a multiprocessor's four parts, which its warps share."""

STAGE_NS = 120.0
"""From a stage's arrival until its place is asked for again, besides the pieces' own work."""

DIGITS_STAGE_NS, DIGITS_PIECE_NS = 100.0, 25.0
"""The same where x is in digits, and a piece: estimates, by half of the instructions."""

ARRIVAL_US, WARP_COPIES = 0.8, 7
"""From asking for weights to having them; copies of 16 bytes a lane that a warp has on their way.  On an H200 products
in 16, 8 and 4 bits by six and eight warps took as long as these say, whatever their rings were."""

MOST_TOKENS_IN_DIGITS = 4
"""Their digits are the eight columns of a product."""


@dataclass(frozen=True)
class Gemv:
    """warps: of a block.  stages: columns of 64 that a warp copies ahead.  side: strips of 16 rows it takes at a time.
    blocks: of the grid.  ahead: columns that a warp asks for beyond its stages, before the kernel in front has ended.
    shared_x: x is kept in shared memory, not read again for each band.
    early: the next kernel is let in at once, not when the last weights have been asked for.
    apart: a norm is a launch of its own in front, not each block's first work.
    digits: x is multiplied in two digits of 8 bits, by codes as they are (include/gemv_digits.cuh); it is shared.
    bulk: stages come by bulk copies (include/gemv_ring.cuh)."""

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

    def __str__(self) -> str:
        x = "in digits" if self.digits else "shared" if self.shared_x else "direct"
        rows = f"{STRIP * self.side} rows, {self.stages}+{self.ahead} ahead"
        more = ", bulk copies" * self.bulk + ", next let in at once" * self.early + ", behind a norm" * self.apart
        return f"{self.blocks} blocks of {self.warps} warps, {rows}, x {x}{more}"

    def family(self) -> str:
        return "GEMV"


def default_params(op: LinearOp, target: Target) -> Gemv:
    """What is best on paper."""
    return space(op, target)[0]


def takes_norm(op: LinearOp, target: Target) -> bool:
    """Whether the kernel can normalise, or round, x itself: it must fit shared memory."""
    tokens = MOST_NORMED_TOKENS if op.norm else MOST_TOKENS
    return op.m <= tokens and x_bytes(op) <= DEVICES[target.arch].shared_bytes - LEAST_RING_BYTES


WARPS, STAGES = range(6, 17), range(2, 11)
MOST_CANDIDATES = 32


def space(op: LinearOp, target: Target) -> list[Gemv]:
    """Parameters worth measuring, the best on paper first of what has run on a GPU: bulk copies and digits have not.

    On an H200 blocks that normalise x are 3 – 8 µs faster if they let the next kernel in at once, and blocks that take
    x as it comes 2 – 4 µs if they do not."""
    device = DEVICES[target.arch]
    best, *rest = by_cost(op, device, digits=False, bulk=False)
    if target.arch < 90:
        return [best, *different(rest)]
    normalises = op.norm != "" and not op.deferred
    own, toggled = (replace(best, early=early) for early in (normalises, not normalises))
    if not takes_bulk(op):
        return [own, toggled, *different(rest)[:1], *deepest(op, [best, *rest], device), *different(rest)[1:]]
    bulk = by_cost(op, device, digits=False, bulk=True)
    digits = by_cost(op, device, digits=True, bulk=True) if takes_digits(op) else []
    by_lanes = by_cost(op, device, digits=True, bulk=False)[:1] if digits else []
    first, *others = different(digits or bulk)
    deep = deepest(op, digits or bulk, device)
    found = [own, first, *(bulk[:1] if digits else others[:1]), *by_lanes, *deep, *others, toggled, *different(rest)]
    return list(dict.fromkeys(found))


def by_cost(op: LinearOp, device: Device, *, digits: bool, bulk: bool) -> list[Gemv]:
    candidates = set(_candidates(op, device, digits=digits, bulk=bulk))
    return sorted(candidates, key=lambda params: (cost_us(op, params, device), str(params)))[:MOST_CANDIDATES]


def deepest(op: LinearOp, candidates: list[Gemv], device: Device) -> list[Gemv]:
    """One of about the best's cost that has most on its way: its blocks leave no room for the next kernel's, which come
    as soon as they end, and ask for as much at once."""
    alone = [each for each in candidates if not leaves_room(op, each, device) and each.blocks <= device.n_blocks]
    return [replace(max(alone, key=lambda each: flight_bytes(op, each, device)), early=True)] if alone else []


def different(candidates: list[Gemv]) -> list[Gemv]:
    """The first of each few numbers of warps and strips, then the rest: what differs by a stage is measured last."""
    first: dict[tuple[int, int], Gemv] = {}
    for each in candidates:
        first.setdefault((each.warps // 3, each.side), each)
    return [*first.values(), *(each for each in candidates if each not in first.values())]


def takes_bulk(op: LinearOp) -> bool:
    """Whether stages may come by bulk copies: as they lie."""
    return op.weight != op.element and (op.tiled_x or op.deferred)


def takes_digits(op: LinearOp) -> bool:
    """Whether x may be multiplied in digits: it is as it will be multiplied, and codes are whole numbers."""
    return op.m <= MOST_TOKENS_IN_DIGITS and op.tiled_x and op.element == "bf16" and op.weight in ("i8", "i4")


def _candidates(op: LinearOp, device: Device, *, digits: bool, bulk: bool) -> Iterator[Gemv]:
    columns = ceil(op.k / COLUMN)
    places = (True, False) if op.tiled_x and not digits else (True,)
    for warps, stages, side, shared_x in product(WARPS, STAGES, weight_format(op).sides, places):
        n_bands = ceil(strips(op) / side)
        fits = warps <= max(columns, WARPS[0]) and (stages - 1) * warps < max(columns, 2 * WARPS[0])
        for per_device in (1, 2):
            blocks = min(per_device * device.n_blocks, n_bands)
            ahead = ahead_of(op, warps, side, device)
            params = Gemv(warps, stages, side, blocks, ahead, shared_x, digits=digits, bulk=bulk)
            if fits and is_resident(op, params, device, per_device):
                yield params


def ahead_of(op: LinearOp, warps: int, side: int, device: Device) -> int:
    """Columns of a warp that memory delivers from the end of the kernel in front until x is there, and normalised."""
    x_us = 2.0 + device.n_blocks * op.m * op.k * (2 if op.tiled_x else 4) / device.l2
    each = warps * side * weight_format(op).piece_bytes * device.n_blocks
    return min(16, ceil(x_us * device.memory / each))


def cost_us(op: LinearOp, params: Gemv, device: Device) -> float:
    """Time on paper: memory, with what is in flight and how evenly blocks share the rows; the way from L2, which x
    takes too; what a block does before it can multiply, and at each band's end."""
    form = weight_format(op)
    bands = ceil(strips(op) / params.side)
    most_bands = ceil(bands / params.blocks)
    weight_bytes, x_bytes = form.n_bytes, op.m * op.k * (2 if op.tiled_x else 4)
    uneven = most_bands * params.blocks / bands
    rates = device.memory, min(params.blocks, device.n_blocks) * flight_bytes(op, params, device) / ARRIVAL_US
    slower = float(sum(rate**-6 for rate in rates) ** (1 / 6))
    memory_us = weight_bytes * slower * (0.5 + 0.5 * uneven)
    x_reads = params.blocks * (1 if params.shared_x else most_bands)
    l2_us = (weight_bytes + x_reads * x_bytes) / device.l2 * uneven * max(1.0, device.n_blocks / params.blocks)
    start_us = 0.5 * (1.0 + params.blocks * x_bytes / device.l2) if params.shared_x else 0.3
    alone_us = 0.0 if leaves_room(op, params, device) else 2.5
    stage_us = stage_ns(op, params) * ceil(ceil(op.k / COLUMN) / params.warps) * most_bands / 1000
    return max(memory_us, l2_us, stage_us) + start_us + 0.05 * most_bands + alone_us + deferred_us(op, params, device)


def deferred_us(op: LinearOp, params: Gemv, device: Device) -> float:
    """What a deferred norm takes of a block's time: behind it, its parts are merged before the first product; in front
    of it, moments of 16 outputs come from six exchanges between lanes, one after the other."""
    merged_us = 0.2 + params.blocks * op.moments_bytes(op.k) / device.l2 if op.deferred else 0.0
    return merged_us + (0.2 if op.moments else 0.0)


def flight_bytes(op: LinearOp, params: Gemv, device: Device) -> float:
    """Bytes on their way to a multiprocessor, on average: less at a band's end, and while a warp multiplies."""
    form = weight_format(op)
    columns, warps = ceil(op.k / COLUMN), params.warps * max(1.0, params.blocks / device.n_blocks)
    used = columns / (ceil(columns / (params.warps * params.stages)) * params.warps * params.stages)
    stage_bytes = params.side * form.piece_bytes
    turn_ns = 1000 * warps * stage_bytes * device.n_blocks / device.memory
    busy = min(1.0, stage_ns(op, params) / turn_ns)
    stages = max(used * params.stages - busy, 0.25)
    if not params.bulk:
        copies = params.side * ceil(form.piece_bytes / 512) + (0 if params.shared_x else op.m / 4)
        stages = min(stages, WARP_COPIES / copies)
    return warps * stage_bytes * stages


def stage_ns(op: LinearOp, params: Gemv) -> float:
    """That a warp takes for a stage, if nothing is to be waited for."""
    if params.digits:
        return DIGITS_STAGE_NS + DIGITS_PIECE_NS * params.side
    return STAGE_NS + weight_format(op).piece_ns * params.side * ceil(op.m / 8)


def registers(op: LinearOp, params: Gemv) -> int:
    """What a thread can do with; the compiler takes more where there are more."""
    if op.m > 8 or op.weight == op.element:
        return (104 if op.m <= 8 else 120) + (32 if op.weight == "i4" else 0)
    if op.weight == "i4" and not params.digits:
        return 80 if params.side <= 2 else 128
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


def strips(op: LinearOp) -> int:
    """Strips of 16 stored rows that are computed: to the end of the last slab of a tiled y."""
    n = ceil(op.n / COLUMN) * COLUMN if op.tiled_y else op.n
    return ceil(n / (8 if op.gated else STRIP))


def x_bytes(op: LinearOp, *, digits: bool = False) -> int:
    """x in shared memory; in digits with a unit for each column of a token."""
    rows = ceil(op.k / COLUMN) * op.m
    return ceil(rows * 132 / 16) * 16 if digits else rows * 128


def shared_bytes(op: LinearOp, params: Gemv) -> int:
    """What include/gemv.cuh takes: x, two bands' sums, rings, and moments or deferred norms of rows."""
    sums = 2 * params.warps * params.side * ceil(op.m / 8) * (256 if params.digits else 512)
    norm_bytes = 8 * op.m if op.deferred else 12 * max(1, params.warps // op.m) * op.m if op.norm else 0
    x_slot = 0 if params.shared_x else ceil(op.m / 8) * 1024 if op.weight == op.element else op.m * 128
    ring = params.warps * params.stages * (params.side * weight_format(op).piece_bytes + x_slot)
    barriers = ceil(8 * params.warps * params.stages / 16) * 16 if params.bulk else 0
    return x_bytes(op, digits=params.digits) * params.shared_x + sums + ring + barriers + ceil(norm_bytes / 16) * 16


def implement(call: Call, op: LinearOp, params: Gemv, target: Target) -> Implementation:
    """One launch."""
    form = weight_format(op)
    inputs = [op.weight_input, op.scaled_input if op.deferred else 0, *norm_inputs(op)]
    operands = (*(Operand("input", index) for index in inputs), *(operand for _, _, operand in others(op)))
    kernel = gemv_kernel(op, params, resident_blocks(op, params, DEVICES[target.arch]))
    launch = Launch(kernel, operands, params.blocks, form.n_bytes + op.vector_bytes, op.n_operations)
    norm_layouts: dict[int, Layout] = {index: RowMajor("f32") for index in norm_inputs(op)}
    return Implementation((launch,), layouts={**layouts(op), **norm_layouts}, family=params.family())


def norm_inputs(op: LinearOp) -> range:
    """Vectors of the norm that each block puts on x."""
    return range(1, 1 if op.deferred else op.weight_input)


def gemv_kernel(op: LinearOp, params: Gemv, resident: int) -> Kernel:
    """resident: blocks that a multiprocessor shall have room for."""
    key = f"gemv_source({op!r}, {params!r}, {resident})"
    name = f"gemv_{op.weight}_{op.words}_{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    build = partial(gemv_source, name, op, params, resident)
    return Kernel(name, key, build, 32 * params.warps, shared_bytes(op, params), dependent=True)


def gemv_source(name: str, op: LinearOp, params: Gemv, resident: int) -> str:
    """The kernel's CUDA C++."""
    form = weight_format(op)
    element = C_TYPES[op.element]
    x, y = (element if tiled else "float" for tiled in (op.tiled_x, op.tiled_y))
    vectors = ["norm_weight", "norm_bias"][: len(norm_inputs(op))]
    parameters = ["const unsigned char *weight", f"const {x} *x", *(f"const float *{vector}" for vector in vectors)]
    norm_weight, norm_bias = [*vectors, "nullptr", "nullptr"][:2]
    flags = {
        "kGated": op.gated,
        "kBias": op.bias or is_folded(op),
        "kResidual": op.residual,
        "kMoments": op.moments,
        "kDeferred": op.deferred,
        "kTiledX": op.tiled_x,
        "kNormBias": op.norm == "layer",
        "kSharedX": params.shared_x,
        "kEarly": params.early,
        "kDigits": params.digits,
        "kBulk": params.bulk,
    }
    sizes = f"kWarps = {params.warps}, kStages = {params.stages}, kSide = {params.side}"
    return (
        '#include "gemv.cuh"\n\n'
        "struct Layer {\n"
        f"    using T = {element};\n"
        f"    using Y = {y};\n"
        f"    using Weight = {form.c_type};\n"
        f"    static constexpr int kM = {op.m}, kN = {op.n}, kK = {op.k};\n"
        f"    static constexpr bool {', '.join(f'{flag} = {c_bool(value)}' for flag, value in flags.items())};\n"
        f"    static constexpr Activation kActivation = Activation::{op.activation};\n"
        f"    static constexpr Norm kNorm = Norm::{op.norm or 'none'};\n"
        f"    static constexpr float kEpsilon = {op.epsilon!r}f;\n"
        f"    static constexpr int {sizes}, kBlocks = {params.blocks}, kAhead = {params.ahead};\n"
        "};\n\n"
        f'extern "C" __global__ void __launch_bounds__({32 * params.warps}, {resident})\n'
        f"{name}({', '.join(parameters)}{other_parameters(op)}) {{\n"
        f"    gemv<Layer>({{weight, x, {norm_weight}, {norm_bias}, {epilogue(op)}}});\n"
        "}\n"
    )
