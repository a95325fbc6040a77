"""How a product of many tokens is cut up among a GPU's blocks, and what that costs on paper.

A tile is 128 stored rows of the weight by `tokens` tokens; a block sums it in steps of 64 along K, fetched ahead into
a ring of `stages` stages of shared memory.  Blocks take whole tiles in rounds; tiles that do not fill one are shared
out step by step (include/gemm_work.cuh), or left to as many blocks as there are.  Few tiles can be cut in two: tiles of
64 rows, whose K the two warpgroups of a block share (`along`).  A cluster of blocks takes a tile of as many times 128
rows and brings its tokens once: half as many of their bytes from L2, which is what a step of 256 tokens waits for.

In a prompt the two warpgroups of a block may own tiles alone and take turns (`turns`): one ends its tile while the
other multiplies.  gemm_prompts.py says what that is worth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import ceil

from llmc.compiler.target import Target
from llmc.schedules.cuda.linear.call import LinearOp
from llmc.schedules.cuda.linear.gemv_weight import weight_format
from llmc.schedules.cuda.tile_layout import tile_rows

TILE_ROWS, STEP = 128, 64
"""Stored rows of the weight in a tile, and of K in a step."""
GROUPS, PIECES = 2, 4
"""Warpgroups of a block, and pieces of 16 rows that each takes in a step."""
STAGED_TOKENS = 32
"""A warpgroup brings the results of so many tokens to shared memory together, on their way out."""

WGMMA_TOKENS = (16, 24, 32, 40, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Widths of a tile for wgmma."""
MMA_TOKENS = tuple(range(16, 129, 16))
"""Widths of a tile for mma.sync: two fragments of x at a time, and sums that fit the registers."""

FLAT_TOKENS = 64
"""Up to so many tokens a product waits for the weight's bytes, not for the units that multiply."""

NOT_HIDDEN = 0.2
"""A step's products and the making of their operands from codes run side by side, but for this part of the shorter one.
An estimate."""

PORT = 100e3
"""Bytes a µs that a block gets from L2 at few tokens: 121 were measured on an H200, of weights and x together."""

DRAWN = 1.75
"""How many times its share of memory's rate a block can draw, where others draw nothing: 64 blocks took 25.5 µs on an
H200 for what memory gives in 21.2."""

MOST_STAGES = 12
FLIGHT_BYTES = 64 << 10
"""So many bytes must be on their way to a multiprocessor to keep memory as busy as can be.  On paper half of them lose
about 8 %, and more than these, or more stages, bring nothing."""


@dataclass(frozen=True)
class Device:
    """An architecture, as its data sheets describe it, and by estimates on paper.

    n_blocks: multiprocessors of its usual card.  shared_bytes: of a block.  Rates: bytes a µs from memory and from L2,
    of all blocks together, and operations a µs.  fixed_us: what a launch takes, and what putting a shared tile together
    takes.  cluster: the most blocks of one; cluster_us: what it takes them to start together and wait for each other,
    an estimate.
    """

    n_blocks: int
    shared_bytes: int
    memory: float
    l2: float
    operations: float
    wgmma: bool = False
    fixed_us: float = 2.0
    cluster: int = 1
    cluster_us: float = 1.0


DEVICES = {
    80: Device(108, 166_912, 1.4e6, 3.5e6, 250e6),
    89: Device(142, 101_376, 0.8e6, 3.0e6, 300e6),
    90: Device(132, 232_448, 4.3e6, 7.5e6, 790e6, wgmma=True, cluster=2),
    100: Device(148, 232_448, 6.5e6, 9.0e6, 600e6),
    120: Device(170, 101_376, 1.6e6, 4.0e6, 200e6),
}
"""By Target.arch.  sm_100a and sm_120 run mma.sync here, which reaches a part of what sm_100a's own tensor instructions
do."""


@dataclass(frozen=True)
class Tiling:
    """How a product is cut up.

    tokens      of a tile
    stages      of the ring
    blocks      of the grid
    shared      whether tiles that do not fill a round are shared out
    band        token tiles that are taken side by side, before the next rows of the weight
    cluster     blocks that bring each other their tokens; a tile then has as many times 128 rows
    along       whether the warpgroups of a block share K: a tile has 64 rows, and a step is 128 of K
    turns       tiles of as many times 64 rows that warpgroups take in turns (ping-pong); 0: they share each tile
    quick       whether a tile ends without branches, its residual read two rounds ahead (include/gemm_quick_end.cuh)
    """

    tokens: int
    stages: int
    blocks: int
    shared: bool = True
    band: int = 1
    cluster: int = 1
    along: bool = False
    turns: int = 0
    quick: bool = False

    def __str__(self) -> str:
        rest = ", rest shared out" if self.shared else ""
        blocks = f"{self.blocks} blocks" + (f" in clusters of {self.cluster}" if self.cluster > 1 else "")
        ways = ", in turns" * bool(self.turns) + ", quick ends" * self.quick
        return f"{self.rows}x{self.tokens} tiles, {self.stages} stages, {blocks}, {self.band} side by side{rest}{ways}"

    @property
    def rows(self) -> int:
        """Stored rows of the weight in a block's tile."""
        return TILE_ROWS // 2 * (self.turns or (1 if self.along else 2))

    @property
    def workers(self) -> int:
        """What takes a tile for itself: blocks, or clusters of them."""
        return self.blocks // self.cluster

    def row_tiles(self, op: LinearOp) -> int:
        return ceil(64 * tile_rows(op.n, gated=op.gated) / (self.rows * self.cluster))

    def token_tiles(self, op: LinearOp) -> int:
        return ceil(op.m / self.tokens)

    def n_tiles(self, op: LinearOp) -> int:
        return self.row_tiles(op) * self.token_tiles(op)

    def n_shared(self, op: LinearOp) -> int:
        """Tiles that are shared out."""
        return self.n_tiles(op) % self.workers if self.shared else 0

    def n_parts(self, op: LinearOp) -> int:
        """Parts of shared tiles that are kept until the tile is complete."""
        shared = self.n_shared(op)
        return shared + self.workers - 1 if shared else 0

    def parts_bytes(self, op: LinearOp) -> int:
        return self.n_parts(op) * self.cluster * self.rows * self.tokens * 4

    def counter_bytes(self, op: LinearOp) -> int:
        """One for each shared tile and warpgroup."""
        return self.n_shared(op) * self.cluster * 2 * 4

    def shared_bytes(self, op: LinearOp) -> int:
        """Shared memory of a block: the ring, in whose stages x begins where a swizzle does, 32 tokens of both
        warpgroups on their way out, barriers, and what a deferred norm is for each token: of few all, else those of
        two tiles."""
        x_step = x_bytes(self.tokens) * (2 if self.along else 1)
        stage_bytes = ceil(step_bytes(op, self.turns) / 1024) * 1024 + x_step
        staging = GROUPS * STAGED_TOKENS * (staged_outputs(op) + 4) * 4
        norms = 1
        if op.deferred:
            norms = self.token_tiles(op) * self.tokens if op.m <= FLAT_TOKENS else 2 * self.tokens + 3  # and barriers
        return self.stages * (stage_bytes + 16) + staging + 8 * norms + 24


def steps(op: LinearOp, *, along: bool = False) -> int:
    return ceil(op.k / (2 * STEP if along else STEP))


def busiest_steps(op: LinearOp, tiling: Tiling) -> int:
    """Steps of the block, or cluster, that has most to do."""
    n_steps = steps(op, along=tiling.along)
    rounds, rest = divmod(tiling.n_tiles(op), tiling.workers)
    return rounds * n_steps + (ceil(rest * n_steps / tiling.workers) if tiling.shared else n_steps * (rest > 0))


def weight_bytes(op: LinearOp) -> int:
    """Bytes of the weight with its padding, and of the scales of its rows."""
    return weight_format(op).layout.n_bytes((op.rows, op.k))


def step_bytes(op: LinearOp, turns: int = 0) -> int:
    """Bytes of the weight for a block's step."""
    return (turns or GROUPS) * PIECES * weight_format(op).piece_bytes


def x_bytes(tokens: int) -> int:
    """Bytes of x for 64 of K."""
    return tokens * STEP * 2


def staged_outputs(op: LinearOp) -> int:
    """How many of a warpgroup's 64 rows are outputs."""
    return 32 if op.gated else 64


def drawn(tiling: Tiling, device: Device) -> float:
    """Bytes a µs that the blocks draw from memory."""
    return min(device.memory, DRAWN * device.memory / device.n_blocks * tiling.blocks)


def space(op: LinearOp, target: Target) -> list[Tiling]:
    """Every tiling worth measuring: the best on paper, the best of other kinds (clusters of two, K shared by the
    warpgroups), then by cost."""
    device = DEVICES[target.arch]
    tilings = set(_tilings(op, device))

    def order(each: Tiling) -> tuple[float | int, ...]:
        rest = (each.cluster, each.tokens, each.n_parts(op), each.band, -each.blocks, each.stages)
        return round(cost_us(op, each, device), 1), not each.along, *rest

    ordered = sorted(tilings, key=order)
    best = {(tiling.cluster, tiling.along): tiling for tiling in reversed(ordered)}
    return sorted(ordered, key=lambda each: best[each.cluster, each.along] is not each)


def _tilings(op: LinearOp, device: Device) -> Iterator[Tiling]:
    for tokens in _widths(op, device):
        n_stages = stages_of(op, tokens, device)
        token_tiles = ceil(op.m / tokens)
        clusters = {1, device.cluster} if x_bytes(tokens) >= step_bytes(op) else {1}  # others are mostly weight
        for band, cluster in product({token_tiles, min(token_tiles, 4)}, clusters):
            whole = Tiling(tokens, n_stages, device.n_blocks, shared=False, band=band, cluster=cluster)
            n_tiles, most = whole.n_tiles(op), whole.workers
            yield replace(whole, blocks=min(most, n_tiles) * cluster)
            for workers in {most, most // n_tiles * n_tiles}:
                tiling = replace(whole, blocks=workers * cluster, shared=True)
                if workers and workers <= tiling.n_shared(op) * steps(op):
                    yield tiling
        n_stages = stages_of(op, tokens, device, along=True)
        if takes_along(op, tokens, device) and n_stages * step_bytes(op) >= FLIGHT_BYTES:
            along = Tiling(tokens, n_stages, device.n_blocks, shared=False, along=True)
            yield replace(along, blocks=min(device.n_blocks, along.n_tiles(op)))


def stages_of(op: LinearOp, tokens: int, device: Device, *, along: bool = False, turns: int = 0) -> int:
    """As many stages as there is room for, and use."""
    most = max(MOST_STAGES, ceil(FLIGHT_BYTES / step_bytes(op)))
    rings = (Tiling(tokens, stages, 1, along=along, turns=turns) for stages in range(2, most + 1))
    return max((ring.stages for ring in rings if ring.shared_bytes(op) <= device.shared_bytes), default=0)


def takes_along(op: LinearOp, tokens: int, device: Device) -> bool:
    """Whether warpgroups can share K: it is whole steps, and sums of all tokens pass where results are staged."""
    fits = 128 * (tokens // 2) <= GROUPS * STAGED_TOKENS * (staged_outputs(op) + 4)
    return device.wgmma and op.m <= tokens <= FLAT_TOKENS and ceil(op.k / STEP) % 2 == 0 and fits


def _widths(op: LinearOp, device: Device) -> Iterator[int]:
    """Widths of a tile: for each number of token tiles the narrowest that holds them."""
    widths = WGMMA_TOKENS if device.wgmma else MMA_TOKENS
    for token_tiles in range(1, ceil(op.m / 64) + 1):
        fitting = [width for width in widths if width * token_tiles >= op.m]
        if fitting and Tiling(fitting[0], 2, 1).shared_bytes(op) <= device.shared_bytes:
            yield fitting[0]


def cost_us(op: LinearOp, tiling: Tiling, device: Device) -> float:
    """Time on paper: what the busiest block multiplies, fetches, and turns from codes into operands, and not less than
    what memory gives all of them."""
    tokens, busiest = tiling.tokens, busiest_steps(op, tiling)
    columns = max(tokens, 32)  # a narrower product waits for the weight's rows as long as one of 32
    multiply = 2 * TILE_ROWS * columns * STEP / (device.operations / device.n_blocks)
    port = PORT if device.wgmma and op.m <= FLAT_TOKENS else device.l2 / device.n_blocks
    fetch = (step_bytes(op) + x_bytes(tokens) * (2 if tiling.along else 1) / tiling.cluster) / port
    operands = GROUPS * PIECES * weight_format(op).operands_ns / 1000
    compute = max(multiply, operands) + NOT_HIDDEN * min(multiply, operands)
    memory = (weight_bytes(op) + op.m * (2 * op.k + 4 * op.n)) / drawn(tiling, device)
    parts = 2 * tiling.parts_bytes(op) / device.l2 + (device.fixed_us if tiling.n_parts(op) else 0)
    finish = 2 * TILE_ROWS * tokens * 4 / (device.l2 / device.n_blocks)  # of the last tile, which nothing hides
    fixed = device.fixed_us + (device.cluster_us if tiling.cluster > 1 else 0)
    return fixed + max(busiest * max(compute, fetch), memory) + parts + finish
