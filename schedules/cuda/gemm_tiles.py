"""How a product of many tokens is cut up among a GPU's blocks, and what that costs on paper.

A tile is 128 stored rows of the weight by `tokens` tokens; a block sums it in steps of 64 along K, fetched ahead into
a ring of `stages` stages of shared memory.  Blocks take whole tiles in rounds; tiles that do not fill one are shared
out step by step (include/gemm_work.cuh), or left to as many blocks as there are.  A cluster of blocks takes a tile of
as many times 128 rows and brings its tokens once: half as many of their bytes from L2, which is what a step of 256
tokens waits for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import ceil
from typing import Protocol

from llmc.compiler.target import Target

TILE_ROWS, STEP = 128, 64
"""Stored rows of the weight in a tile, and of K in a step."""
TILE_BYTES = 2 * 64 * STEP
"""Of one of the weight's tiles: 64 rows, a warpgroup's."""

WGMMA_TOKENS = (16, 24, 32, 40, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Widths of wgmma."""
MMA_TOKENS = tuple(range(16, 129, 16))
"""Widths of a tile for mma.sync: two fragments of x at a time, and sums that fit the registers."""

FLAT_TOKENS = 64
"""Up to here a product waits for the weight's bytes, not for the units that multiply."""

CLUSTER_TOKENS = 128
"""From here on two blocks may bring their tokens together: narrower tiles are mostly weight."""

MOST_STAGES = 12
"""Beyond this more bytes on their way bring nothing."""


class Shape(Protocol):
    """What the cut depends on: x [m, k] times a weight of n_tile_rows tiles of 64 stored rows; gated: two rows make an
    output; deferred: sums are normalised."""

    @property
    def m(self) -> int: ...
    @property
    def n(self) -> int: ...
    @property
    def k(self) -> int: ...
    @property
    def gated(self) -> bool: ...
    @property
    def deferred(self) -> bool: ...


@dataclass(frozen=True)
class Device:
    """An architecture, by what its data sheets and our measurements say.

    n_blocks: multiprocessors of its usual card.  shared_bytes: of a block.  Rates: bytes a µs from memory and from L2
    (all blocks together), operations a µs; fixed_us: of a launch, and of putting a shared tile together.  cluster:
    blocks that may form one; cluster_us: of starting together and waiting for each other, an estimate.
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
}
"""By Target.arch.  sm_100a runs mma.sync here, at a part of what its own tensor instructions reach."""


@dataclass(frozen=True)
class Tiling:
    """How a product is cut.

    tokens: of a tile.  stages: of the ring.  blocks: of the grid.  shared: whether tiles that do not fill a round are
    shared out.  band: token tiles that lie side by side, before the next rows of the weight.  cluster: blocks that
    bring each other their tokens; a tile is as many times 128 rows then.
    """

    tokens: int
    stages: int
    blocks: int
    shared: bool = True
    band: int = 1
    cluster: int = 1

    def __str__(self) -> str:
        rest = ", rest shared out" if self.shared else ""
        blocks = f"{self.blocks} blocks" + (f" in clusters of {self.cluster}" if self.cluster > 1 else "")
        return f"128x{self.tokens} tiles, {self.stages} stages, {blocks}, {self.band} side by side{rest}"

    @property
    def workers(self) -> int:
        """What takes a tile for itself: blocks, or clusters of them."""
        return self.blocks // self.cluster

    def row_tiles(self, shape: Shape) -> int:
        return ceil(tile_rows(shape) / (2 * self.cluster))

    def token_tiles(self, shape: Shape) -> int:
        return ceil(shape.m / self.tokens)

    def n_tiles(self, shape: Shape) -> int:
        return self.row_tiles(shape) * self.token_tiles(shape)

    def n_shared(self, shape: Shape) -> int:
        """Tiles that are shared out."""
        return self.n_tiles(shape) % self.workers if self.shared else 0

    def n_parts(self, shape: Shape) -> int:
        """Parts of shared tiles that are kept until the tile is complete."""
        shared = self.n_shared(shape)
        return shared + self.workers - 1 if shared else 0

    def parts_bytes(self, shape: Shape) -> int:
        return self.n_parts(shape) * self.cluster * TILE_ROWS * self.tokens * 4

    def counter_bytes(self, shape: Shape) -> int:
        """One for each shared tile and warpgroup."""
        return self.n_shared(shape) * self.cluster * 2 * 4


def tile_rows(shape: Shape) -> int:
    """Tiles of 64 stored rows of the weight."""
    return ceil(shape.n / 64) * (2 if shape.gated else 1)


def steps(shape: Shape) -> int:
    return ceil(shape.k / STEP)


def weight_bytes(shape: Shape) -> int:
    """Of the weight in tiles, with its padding."""
    return tile_rows(shape) * steps(shape) * TILE_BYTES


def stage_bytes(tokens: int) -> int:
    return 2 * TILE_BYTES + tokens * STEP * 2


def shared_bytes(shape: Shape, tokens: int, stages: int) -> int:
    """Shared memory of a block: the ring, 32 tokens of both warpgroups on their way out, barriers, and what a deferred
    norm is for each token."""
    staging = 2 * 32 * ((32 if shape.gated else 64) + 4) * 4
    norms = 8 * (ceil(shape.m / tokens) * tokens if shape.deferred else 1)
    return stages * (stage_bytes(tokens) + 16) + staging + norms + 24


def default_tiling(shape: Shape, target: Target) -> Tiling:
    return space(shape, target)[0]


def space(shape: Shape, target: Target) -> list[Tiling]:
    """Every tiling worth measuring: the best on paper, the best of the other size of clusters, then by cost."""
    device = DEVICES[target.arch]
    tilings = set(_tilings(shape, device))
    ordered = sorted(tilings, key=lambda each: (cost_us(shape, each, device), each.cluster, each.tokens))
    best = {tiling.cluster: tiling for tiling in reversed(ordered)}
    return sorted(ordered, key=lambda each: best[each.cluster] is not each)


def _tilings(shape: Shape, device: Device) -> Iterator[Tiling]:
    for tokens in _widths(shape, device):
        n_stages = max(s for s in range(2, MOST_STAGES + 1) if shared_bytes(shape, tokens, s) <= device.shared_bytes)
        token_tiles = ceil(shape.m / tokens)
        clusters = {1, device.cluster} if tokens >= CLUSTER_TOKENS else {1}
        for band, cluster in product({token_tiles, min(token_tiles, 4)}, clusters):
            whole = Tiling(tokens, n_stages, device.n_blocks, shared=False, band=band, cluster=cluster)
            n_tiles, most = whole.n_tiles(shape), whole.workers
            yield replace(whole, blocks=min(most, n_tiles) * cluster)
            for workers in {most, most // n_tiles * n_tiles}:
                tiling = replace(whole, blocks=workers * cluster, shared=True)
                if workers and workers <= tiling.n_shared(shape) * steps(shape):
                    yield tiling


def _widths(shape: Shape, device: Device) -> Iterator[int]:
    """Widths of a tile: for each number of token tiles the narrowest that holds them."""
    widths = WGMMA_TOKENS if device.wgmma else MMA_TOKENS
    for token_tiles in range(1, ceil(shape.m / 64) + 1):
        fitting = [width for width in widths if width * token_tiles >= shape.m]
        if fitting and shared_bytes(shape, fitting[0], 2) <= device.shared_bytes:
            yield fitting[0]


def cost_us(shape: Shape, tiling: Tiling, device: Device) -> float:
    """Time on paper: what the busiest block multiplies and fetches, and not less than what memory gives all of them."""
    tokens, n_steps = tiling.tokens, steps(shape)
    rounds, rest = divmod(tiling.n_tiles(shape), tiling.workers)
    busiest = rounds * n_steps + (ceil(rest * n_steps / tiling.workers) if tiling.shared else n_steps * (rest > 0))
    columns = max(tokens, 32)  # a narrower product waits for the weight's rows as long as one of 32
    multiply = 2 * TILE_ROWS * columns * STEP / (device.operations / device.n_blocks)
    fetch = (2 * TILE_BYTES + tokens * STEP * 2 / tiling.cluster) / (device.l2 / device.n_blocks)
    memory = (weight_bytes(shape) + shape.m * (2 * shape.k + 4 * shape.n)) / device.memory
    parts = 2 * tiling.parts_bytes(shape) / device.l2 + (device.fixed_us if tiling.n_parts(shape) else 0)
    finish = 2 * TILE_ROWS * tokens * 4 / (device.l2 / device.n_blocks)  # of the last tile, which nothing hides
    fixed = device.fixed_us + (device.cluster_us if tiling.cluster > 1 else 0)
    return fixed + max(busiest * max(multiply, fetch), memory) + parts + finish
