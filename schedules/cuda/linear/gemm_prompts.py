"""How a product of hundreds of tokens is cut up on Hopper: by the times that an H200 took; and what it has still to
choose between.

A tile of 128 x 256 sums takes all registers of a block, so its two warpgroups end it, and the tensor cores idle: on an
H200 the products of a prompt of 2048 tokens took, within 6 % and mostly 3 (of 128, 512 and 1024 tokens within 18, 14
and 8; gemm_tiles.py's figures are those of few tokens, and of other cards),

    6.7 µs + tiles of the busiest block x (0.657 µs x K / 64 + 4.4 µs, gated 6)

so that ends are a tenth of the time at K = 4096.  Two things are offered against it:

    in turns    each warpgroup owns tiles, and ends one while the other multiplies: one end is left, the last
    quick       an end without branches, which were half of its instructions

In turns a step is half as long, and brings more for what it multiplies: tiles of 128 x 128 32 KiB for 512 clocks of
products, which is what 128 blocks got with such tiles that two warpgroups shared; tiles of 64 x 256 bring 40.  In
clusters a block gets less from L2, but as much into its shared memory, and steps cannot be short.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import ceil

from llmc.compiler.target import Target
from llmc.schedules.cuda.linear import gemm_tiles
from llmc.schedules.cuda.linear.call import LinearOp
from llmc.schedules.cuda.linear.gemm_tiles import DEVICES, WGMMA_TOKENS, Device, Tiling
from llmc.schedules.cuda.linear.gemv_weight import weight_format

FEWEST = 256
"""From so many tokens on a block has several tiles in most products."""

FEWEST_CHOSEN, MOST_SIDE_BY_SIDE = 128, 4
"""The fewest tokens for which the times below choose; the most token tiles of 256 side by side."""

OPERATIONS = 842e6
"""Operations a µs of all blocks while they multiply: what an H200 did, from the slope of its times over K."""

L2, PORT = 13.2e6, 121e3
"""Bytes a µs from L2: for all blocks together (what 128 of them with tiles of 128 x 128 got at least), and for one."""

L2_BYTES = 50e6
"""How much of weight and x L2 keeps for blocks at different places of K.  If x alone is more than half of it, shared
tiles are slow: 256 tiles of 2048 tokens and K = 16384, of which 124 were shared out, took 475 µs on an H200, and 352 in
two rounds."""

CLUSTER_STEP_US, CLUSTER_TOKEN_US = 0.27, 0.0016
"""What a step in a cluster takes at least, and each of its tokens: 0.48 µs for 128 tokens, 0.59 for 192 and 0.67 for
256 were measured, although the first two are multiplied in 0.33 and 0.49.  Why is not known."""

LAUNCH_US = 6.7
"""What the launch, the first stages and the end of the grid take."""

DRAIN_US = 0.5
"""The part of a tile's end that the other warpgroup's products do not hide, on paper: the last products, and the first
of the next tile."""

END_US, GATED_END_US = 3.9, 5.5
"""The rest of a tile's end, in which each warpgroup finishes 64 x 256 sums."""

QUICK_END_US = 1.9
"""The same for a quick end, on paper: 8 rounds, each of 55 instructions of two warps a scheduler, 256 clocks of shared
memory and two barriers: 350 – 400 clocks.  Gated products have 1200 instructions instead of 2300."""

SUMS = 128
"""How many sums a thread can hold."""


def space(op: LinearOp, target: Target) -> list[Tiling]:
    """Every tiling worth measuring: the rule's own choice, in a prompt then what may be faster, the best of each kind
    first, then the others.  Fewer tokens are offered the choice with the other end."""
    known = [tiling for tiling in gemm_tiles.space(op, target) if ends_heads(op, tiling)]
    device = DEVICES[target.arch]
    if not device.wgmma:
        return known
    tiling = choice(op, known, device)
    own, other = (replace(tiling, quick=quick) for quick in (ends_quickly(op), not ends_quickly(op)))
    others = [each for each in known if each not in (own, other)]
    if op.m < FEWEST:
        return [own, other, *others]
    quick = [replace(each, quick=True) for each in known]
    in_turns = [each for each in _in_turns(op, device) if ends_heads(op, each)]
    found = [each for each in (*in_turns, *quick, other, *others) if each != own]
    ordered = sorted(dict.fromkeys(found), key=lambda each: round(time_us(op, each, device), 1))
    best = {_kind(tiling): tiling for tiling in reversed(ordered)}
    return [own, *sorted(ordered, key=lambda each: best[_kind(each)] is not each or _kind(each) == _kind(own))]


def choice(op: LinearOp, known: list[Tiling], device: Device) -> Tiling:
    """The rule's own: of what an H200 has measured, the best on paper that is no kind of which paper knows too little.

    Of the fastest tiling that is known of each of its products that choice took, where it had been timed, 100.0 % at
    128 tokens, 100.5 % at 512 and 100.1 % at 2048.
    """
    if op.m < FEWEST_CHOSEN:
        return next(tiling for tiling in known if tiling.cluster == 1)

    def order(each: Tiling) -> tuple[float, int, int, int]:
        return round(time_us(op, each, device), 1), each.cluster, each.band, each.n_parts(op)

    return min([tiling for tiling in known if _is_known(op, tiling)] or known, key=order)


def ends_quickly(op: LinearOp) -> bool:
    """Where an H200's layers were faster for it: gated products at any number of tokens (0.76 to 0.98 of the time of a
    layer in prompts, codes most), others of 64 by a hundredth; elsewhere it is all the same, 0.99 to 1.006."""
    return op.gated or op.m == gemm_tiles.FLAT_TOKENS


def ends_heads(op: LinearOp, tiling: Tiling) -> bool:
    """Whether what turns each other is in one tile, where queries and keys are turned (include/gemm_append.cuh)."""
    if op.append is None:
        return True
    return not tiling.along and (tiling.rows >= op.append.head_dim or tiling.rows >= op.append.rotary_dim)


def _is_known(op: LinearOp, tiling: Tiling) -> bool:
    """Several rounds were measured of the widest tiles alone, and narrow ones that were shared out were slower than on
    paper; more token tiles side by side than a few throw each other's x out of L2 if K is long (16384: 506 µs instead
    of 352)."""
    narrowest = 256 if tiling.n_tiles(op) > tiling.workers else 128 if tiling.shared else 0
    return tiling.tokens >= min(narrowest, op.m) and tiling.band <= MOST_SIDE_BY_SIDE


def _kind(tiling: Tiling) -> tuple[int, bool, int, int]:
    return tiling.turns, tiling.quick, tiling.cluster, tiling.tokens


def _in_turns(op: LinearOp, device: Device) -> Iterator[Tiling]:
    """Tiles of 128 rows, and of 64, of as many tokens as a thread can hold sums of."""
    for turns in (2, 1):
        most = 2 * SUMS // turns
        token_tiles = ceil(op.m / most)
        tokens = next(width for width in WGMMA_TOKENS if width * token_tiles >= op.m)
        n_stages = gemm_tiles.stages_of(op, tokens, device, turns=turns)
        bands = {token_tiles, min(token_tiles, 1024 // most)}
        for cluster, band in product((1, device.cluster), sorted(bands)):
            whole = Tiling(tokens, n_stages, device.n_blocks, False, band, cluster, turns=turns, quick=True)
            if whole.n_tiles(op) <= whole.workers:
                continue  # each block has one tile, whose end nothing hides
            yield whole
            shared = replace(whole, shared=True)
            if 0 < whole.workers <= shared.n_shared(op) * gemm_tiles.steps(op):
                yield shared


def time_us(op: LinearOp, tiling: Tiling, device: Device) -> float:
    """Time on paper of a product on Hopper whose blocks multiply most of the time."""
    n_steps, step = gemm_tiles.steps(op), step_us(op, tiling, device)
    n_ends, busiest = ends(op, tiling), gemm_tiles.busiest_steps(op, tiling)
    end = end_us(op, tiling)
    if tiling.turns:  # a warpgroup has every other tile, and its own end before the next
        products = max(busiest * step, ceil(n_ends / 2) * (n_steps * step + end)) + end
    else:
        products = busiest * step + n_ends * (DRAIN_US + end)
    shared = ceil(tiling.n_shared(op) * n_steps / tiling.workers) * step
    products += max(0.0, apart_bytes(op, tiling) / device.memory - shared)
    parts = 2 * tiling.parts_bytes(op) / L2 + (device.fixed_us if tiling.n_parts(op) else 0)
    memory = (gemm_tiles.weight_bytes(op) + op.m * (2 * op.k + 4 * op.n)) / device.memory
    return LAUNCH_US + max(products, memory) + parts


def ends(op: LinearOp, tiling: Tiling) -> int:
    """Ends of tiles that the busiest block has: of a rest that is shared out mostly two, the end of one tile and of
    another."""
    n_shared = tiling.n_shared(op)
    return ceil(tiling.n_tiles(op) / tiling.workers) + (1 if n_shared and tiling.workers % n_shared else 0)


def apart_bytes(op: LinearOp, tiling: Tiling) -> float:
    """What shared tiles bring from memory where x does not stay in L2: blocks that are at different places of K have
    nothing in common, so that each brings its own, but for what L2 has of all."""
    weight, x = gemm_tiles.weight_bytes(op), 2 * op.m * op.k
    if 2 * x <= L2_BYTES:
        return 0.0
    share = weight / tiling.row_tiles(op) + x / tiling.token_tiles(op)
    return tiling.n_shared(op) * share * max(0.0, 1 - L2_BYTES / (weight + x))


def step_us(op: LinearOp, tiling: Tiling, device: Device) -> float:
    """A block's 64 of K: products, or what they are made of, whichever takes longer."""
    multiply = 2 * tiling.rows * tiling.tokens * gemm_tiles.STEP * device.n_blocks / OPERATIONS
    operands = tiling.rows / 16 * weight_format(op).operands_ns / 1000
    weight, x = gemm_tiles.step_bytes(op, tiling.turns), gemm_tiles.x_bytes(tiling.tokens)
    fetch = max((weight + x) / PORT, (weight + x / tiling.cluster) * device.n_blocks / L2)
    together = CLUSTER_STEP_US + CLUSTER_TOKEN_US * tiling.tokens if tiling.cluster > 1 else 0
    return max(multiply, operands, fetch, together)


def end_us(op: LinearOp, tiling: Tiling) -> float:
    """What the end of a tile takes the warpgroups that own it."""
    whole = QUICK_END_US if tiling.quick else GATED_END_US if op.gated else END_US
    return whole * tiling.tokens * (tiling.turns or 1) / (2 * SUMS)
