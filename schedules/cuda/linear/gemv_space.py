"""Which GEMVs are worth measuring for a product, the best on paper (gemv_cost.py) first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import ceil

from llmc.compiler.target import Target
from llmc.schedules.cuda.linear.call import LinearOp
from llmc.schedules.cuda.linear.gemm_tiles import DEVICES, Device
from llmc.schedules.cuda.linear.gemv_cost import ahead_of, cost_us, flight_bytes
from llmc.schedules.cuda.linear.gemv_params import (
    COLUMN,
    Gemv,
    bands,
    is_resident,
    leaves_room,
    ring_bytes,
    steps,
    strips,
)
from llmc.schedules.cuda.linear.gemv_weight import weight_format

WARPS, STAGES = range(6, 17), range(2, 11)
MOST_CANDIDATES = 32

INT4 = ("i4", "z4")

MOST_TOKENS_IN_DIGITS = 4
"""The digits of so many tokens fill the eight columns of a tensor product."""

MOST_K_IN_DIGITS = 8192
"""The longest K for which a block makes the digits of all of x.  With K = 11008 an H200 took 10.1 µs and more so, and
9.1 with x in bf16.  Pairs of blocks, whose warps make only the digits of their own columns, have not been timed."""

MOST_MEASURED_IN_MODELS = 8
"""Whole models were measured with up to so many tokens."""

LEAST_KEPT_BYTES = 64 << 10
"""The smallest ring beside an x that is kept: what must be on its way to a multiprocessor to keep memory busy."""

FASTEST_KEPT = (16, 2)
"""Warps, and columns at a time, with which an x that is kept was the fastest choice in models of 1, 2, 4 and 8 tokens:
for each product of Llama-2-7B a layer in int4 took 0.87 to 1.00 of the time that it took with what was the fastest
before, and 1.015 once (queries, keys and values of two tokens)."""

PAIR = 2
"""Blocks of a cluster that keep x, each only its own columns of it."""

STREAM_WARPS = range(8, 17, 2)
MEASURED_WARPS = (8, 12, 16)
"""Numbers of warps that are each measured, with bulk copies."""


def space(op: LinearOp, target: Target) -> list[Gemv]:
    """Parameters worth measuring, the rule's own choice first.

    On an H200, by copies of lanes, blocks that normalise x are 3 – 8 µs faster if they let the next kernel in at once,
    and blocks that take x as it comes 2 – 4 µs if they do not.  A weight in codes, 22016 x 4096 in int8, took 21.6 to
    22.7 µs in bands of four strips by bulk copies, 33 in bands of two, 26 to 48 of one."""
    device = DEVICES[target.arch]
    if target.arch >= 90 and op.weight != op.element:
        return stream_space(op, device)
    best, *rest = by_cost(op, device, lane_candidates(op, device))[:MOST_CANDIDATES]
    if target.arch < 90:
        return [best, *different(rest)]
    normalises = op.norm != "" and not op.deferred
    own, toggled = (replace(best, early=early) for early in (normalises, not normalises))
    return [own, toggled, *different(rest)[:1], *deepest(op, [best, *rest], device), *different(rest)[1:]]


def by_cost(op: LinearOp, device: Device, candidates: Iterator[Gemv]) -> list[Gemv]:
    return sorted(set(candidates), key=lambda params: (cost_us(op, params, device), str(params)))


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


def lane_candidates(op: LinearOp, device: Device) -> Iterator[Gemv]:
    """Stages come by copies of lanes."""
    columns = ceil(op.k / COLUMN)
    places = (True, False) if op.tiled_x else (True,)
    for warps, stages, side, shared_x in product(WARPS, STAGES, weight_format(op).sides, places):
        n_bands = ceil(strips(op) / side)
        fits = warps <= max(columns, WARPS[0]) and (stages - 1) * warps < max(columns, 2 * WARPS[0])
        for per_device in (1, 2):
            blocks = min(per_device * device.n_blocks, n_bands)
            params = Gemv(warps, stages, side, blocks, 0, shared_x)
            if fits and is_resident(op, params, device, per_device):
                yield replace(params, ahead=ahead_of(op, params, device))


# -- weights in codes, by bulk copies --------------------------------------------------------------------------------


def stream_space(op: LinearOp, device: Device) -> list[Gemv]:
    """The rule's own choice; those whose warps keep x; of each number of blocks that share a band, with and without
    room for the next kernel, few and many warps; then what else differs."""
    ordered = streams_by_cost(op, device)
    kept, best = kept_streams(op, device), fastest_in_models(op, device) or ordered[0]
    alike = [each for each in ordered if each.side == best.side]
    first: dict[object, Gemv] = {}
    for each in alike:
        if each.warps in MEASURED_WARPS:
            first.setdefault((each.split, leaves_room(op, each, device), each.warps), each)
    others = [each for each in first.values() if leaves_room(op, each, device) != leaves_room(op, best, device)][:1]
    others += [each for each in alike if each.depth != best.depth][:1]
    others += streams_by_cost(op, device, digits=True)[:1] if takes_digits(op) else []
    sides = {each.side: each for each in reversed(ordered)}
    toggled = replace(best, early=not best.early)
    own = [each for each in kept[:1] if (each.warps, each.depth) == FASTEST_KEPT] or [best]
    found = [*own, *kept, best, *others, *first.values(), toggled, *sides.values()]
    found += different(ordered[:MOST_CANDIDATES])
    return list(dict.fromkeys(found))[:MOST_CANDIDATES]


def fastest_in_models(op: LinearOp, device: Device) -> Gemv | None:
    """What was fastest in whole models on an H200 (Llama-2-7B, 1 and 8 tokens), where a kernel's neighbours are others;
    of more tokens, and of K so short that a warp would have nothing to do, that is not known:

    - pairs of blocks of 16 warps, as many in each round of bands;
    - a ring that leaves no room for the next kernel's blocks, which is let in at once: of a weight of 16 million codes
      it holds all before x is there;
    - int4 two columns at a time, or in digits where that is offered and K is short.

    None where that does not fit."""
    if device.cluster < 2 or op.m > MOST_MEASURED_IN_MODELS:
        return None
    digits = takes_digits(op) and op.k <= MOST_K_IN_DIGITS
    cuts = [(2, 2)] * (2 in depths(op, digits=digits))
    cuts += [(1, stages) for stages in range(4 if op.weight in INT4 else 2, 1, -1)]
    for warps, (depth, stages) in product((16, 12, 8), cuts):
        shared_x = digits or not op.tiled_x
        params = Gemv(warps, stages, 4, 2, 0, shared_x, digits=digits, bulk=True, split=2, depth=depth)
        if steps(op, params) >= params.split * warps and is_resident(op, params, device, 1):
            return placed(op, params, device, min(grids(op, params, device)))
    return None


def streams_by_cost(op: LinearOp, device: Device, *, digits: bool = False) -> list[Gemv]:
    """Streams by their cost on paper; of equally good ones those of many warps first: 12 and 16 were better than 6 and
    8 on an H200."""

    def order(params: Gemv) -> tuple[float, int, str]:
        return round(cost_us(op, params, device), 1), -params.warps, str(params)

    return sorted(streams(op, device, digits=digits), key=order)


def takes_digits(op: LinearOp) -> bool:
    """Whether multiplying x in digits is worth measuring: it is as it will be multiplied, and to widen codes takes half
    of the instructions that memory leaves time for.  (int8 gained nothing by it on an H200.)"""
    return op.m <= MOST_TOKENS_IN_DIGITS and takes_kept(op)


def streams(op: LinearOp, device: Device, *, digits: bool = False) -> Iterator[Gemv]:
    shared_x = digits or not op.tiled_x
    sides, deep = weight_format(op).sides, depths(op, digits=digits)
    cuts = [(side, depth) for side in sides for depth in deep if side == 4 or depth == 1]
    for warps, stages, (side, depth) in product(STREAM_WARPS, STAGES, cuts):
        for split in (1, device.cluster) if side == 4 else (1,):
            params = Gemv(warps, stages, side, split, 0, shared_x, digits=digits, bulk=True, split=split, depth=depth)
            own_steps = ceil(steps(op, params) / split)
            least = STREAM_WARPS[0]
            fits = warps <= max(own_steps, least) and (stages - 1) * warps < max(own_steps, 2 * least)
            if fits and is_resident(op, params, device, 1):
                yield from (placed(op, params, device, blocks) for blocks in grids(op, params, device))


def kept_streams(op: LinearOp, device: Device) -> list[Gemv]:
    """Pairs of blocks whose warps keep x of their own columns, in digits for few tokens, else in f16: with the deepest
    rings, and with such that two kernels' blocks have room side by side.

    Codes cost up to a third of the instructions less than beside an x that comes with them (docs/cuda.md).  Where there
    is room beside the blocks in front, weights come while that kernel waits for its own x."""
    if device.cluster < PAIR or not takes_kept(op):
        return []
    deep, beside = ([*kept_rings(op, device, n_blocks)] for n_blocks in (1, 2))
    return [*deep[:1], *beside[:2], *deep[1:2]] if beside else deep[:3]


def kept_rings(op: LinearOp, device: Device, n_blocks: int) -> Iterator[Gemv]:
    """For a few numbers of warps the deepest ring with which so many blocks fit, but none deeper than is used.

    To bring x to f16 takes as long as it saves in one band; digits of it must be made anyway."""
    digits = takes_digits(op)
    for warps, depth in product(MEASURED_WARPS[::-1], sorted(depths(op, digits=False), reverse=True)):
        params = Gemv(warps, 1, 4, PAIR, 0, digits, digits=digits, bulk=True, split=PAIR, depth=depth, kept=True)
        rounds = ceil(bands(op, params) / (device.n_blocks // PAIR))
        most = min(STAGES[-1], ceil(steps(op, params) / (PAIR * warps)) * rounds)
        rings = (replace(params, stages=stages) for stages in range(most, min(most, 2) - 1, -1))
        ring = next((each for each in rings if is_resident(op, each, device, n_blocks)), None)
        enough = ring is not None and ring_bytes(op, ring) >= LEAST_KEPT_BYTES
        if ring is not None and enough and steps(op, ring) >= PAIR * warps and (digits or rounds > 1):
            yield replace(placed(op, ring, device, min(grids(op, ring, device))), early=True)


def takes_kept(op: LinearOp) -> bool:
    """Whether x is worth keeping: it is as it will be multiplied, of tokens for which a GEMV is the choice."""
    return op.m <= MOST_MEASURED_IN_MODELS and op.tiled_x and op.element == "bf16" and op.weight == "i4"


def depths(op: LinearOp, *, digits: bool) -> tuple[int, ...]:
    """Neighbouring columns that a stage may have."""
    return (1, 2) if op.weight in INT4 and not digits and ceil(op.k / COLUMN) % 2 == 0 else (1,)


def placed(op: LinearOp, params: Gemv, device: Device, blocks: int) -> Gemv:
    """The parameters with a grid, and with what follows from the rest."""
    early, ahead = lets_in_at_once(op, params, device), ahead_of(op, params, device)
    return replace(params, blocks=blocks, early=early, ahead=ahead)


def lets_in_at_once(op: LinearOp, params: Gemv, device: Device) -> bool:
    """The next kernel: where blocks have x to normalise first, or leave no room for its blocks."""
    return (op.norm != "" and not op.deferred) or not leaves_room(op, params, device)


def grids(op: LinearOp, params: Gemv, device: Device) -> set[int]:
    """As many blocks as there are multiprocessors; of pairs also as few as have no more bands each: a last band takes
    few pairs longer than many blocks."""
    workers, n_bands = device.n_blocks // params.split, bands(op, params)
    even = ceil(n_bands / ceil(n_bands / workers))
    most = min(workers, n_bands)
    return {params.split * most} | ({params.split * even} if params.split > 1 else set())
