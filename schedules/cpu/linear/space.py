"""Tilings of a linear layer worth measuring, the most promising on paper first.

A tile of rows x panels takes rows * panels multiply-adds a step, one a cycle, and rows + panels loads, two a cycle;
too few sums to cover the latency of a multiply-add wait for each other.  Memory gives a thread a few bytes a cycle:
the weight once, or once for every row tile where a unit's panels do not stay in the second level cache in between.
What this leaves out (prefetchers, caches' ways, the machine's bandwidth) is why candidates are measured at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from math import ceil

from llmc.compiler.target import Target
from llmc.schedules.cpu.linear.panel_layout import PANEL
from llmc.schedules.cpu.linear.rule import Linear, Tiles

LATENCY = 5
"""Cycles until a sum can be added to again."""
FIRST_LEVEL_BYTES, SECOND_LEVEL_BYTES = 24 << 10, 768 << 10
"""How much of the caches rows of x may fill, and a unit's panels."""
MEMORY_BYTES, CACHE_BYTES = 5.0, 24.0
"""Bytes a cycle that a thread gets from memory and from the caches."""
THREADS = 4
"""For how many threads work is assumed to be cut."""

SUMS, SUMS_AVX2 = 28, 6
"""Sums of 16 that the registers hold beside what is being multiplied."""
PANELS_A_TILE = (1, 2, 4, 8)
STEPS = (512, 1024, 2048)
GROUPS = (1, 2, 4, 8)
NEAR_LINES = (0, 8, 16, 32, 96)
FAR_STEPS = (0, 64, 128)
"""Prefetching: of several values only the layers with few rows, which wait for memory, can tell the difference."""
FEW_ROWS = 16


def tile_space(linear: Linear, default: Tiles, target: Target) -> list[Tiles]:
    """Every tiling that is looked at, `default` among them.

    In order: of each shape of tile the best on paper, by its cost; then of each shape the second; and so on.
    """
    costs = {tiles: cost(linear, tiles) for tiles in (default, *_tilings(linear, default, target))}
    ranked: dict[tuple[int, int], list[Tiles]] = {}
    for tiles in sorted(costs, key=lambda tiles: (costs[tiles], tiles.near, tiles.far, tiles.group, tiles.steps)):
        ranked.setdefault((tiles.rows, tiles.panels), []).append(tiles)
    return [tiles for rank in zip_longest(*ranked.values()) for tiles in rank if tiles is not None]


def _tilings(linear: Linear, default: Tiles, target: Target) -> Iterator[Tiles]:
    for rows, panels in _shapes(linear, SUMS if target.has("avx512f") else SUMS_AVX2):
        near = default.near * default.panels // panels
        shape = replace(default, rows=rows, panels=panels, steps=linear.steps, group=1, near=near)
        if shape.row_tiles(linear) > 1:
            yield from _cut(linear, shape)
            continue
        yield shape
        if linear.m <= FEW_ROWS:
            yield from (replace(shape, near=near // panels, far=far) for near in NEAR_LINES for far in FAR_STEPS)


def _shapes(linear: Linear, sums: int) -> Iterator[tuple[int, int]]:
    """(rows, panels) of tiles that the registers hold, nearly as large as they hold."""
    for panels in PANELS_A_TILE:
        if linear.parts <= panels <= sums and linear.panels % panels == 0:
            fewest = ceil(linear.m * panels / sums)
            yield from {(ceil(linear.m / tiles), panels): None for tiles in (fewest, fewest + 1)}


def _cut(linear: Linear, shape: Tiles) -> Iterator[Tiles]:
    """The shape with its panels cut along k, and several tiles a unit."""
    for group in GROUPS:
        if linear.panels % (shape.panels * group) == 0:
            for steps in (*STEPS, linear.steps):
                chunks = ceil(linear.steps / steps)
                yield replace(shape, group=group, steps=ceil(linear.steps / chunks))


def cost(linear: Linear, tiles: Tiles) -> float:
    """Cycles a thread, roughly."""
    terms = linear.words
    row_tiles, grid = tiles.row_tiles(linear), tiles.grid(linear)
    a_step = max(tiles.rows * tiles.panels, LATENCY, (tiles.rows + tiles.panels) / 2) * terms
    arithmetic = row_tiles * linear.panels / tiles.panels * linear.steps * a_step
    chunk_bytes = tiles.group * tiles.panels * tiles.steps * PANEL * 4
    weight = linear.weight_bytes / MEMORY_BYTES
    if row_tiles > 1 and chunk_bytes > SECOND_LEVEL_BYTES:
        weight += (row_tiles - 1) * linear.weight_bytes / CACHE_BYTES
    x_bytes = tiles.rows * tiles.steps * linear.words * 4
    x = 0.0 if x_bytes <= FIRST_LEVEL_BYTES else grid * tiles.group * row_tiles * linear.steps / tiles.steps * x_bytes
    chunks = ceil(linear.steps / tiles.steps)
    sums = (chunks - 1) * 2 * row_tiles * tiles.rows * linear.panels * PANEL * 4
    prefetches = row_tiles * linear.panels * linear.steps * ((tiles.near > 0) + (tiles.far > 0)) / 4
    work = [arithmetic + prefetches, weight + (x + sums) / CACHE_BYTES]
    balance = ceil(grid / THREADS) * THREADS / grid
    return (max(work) + min(work) / 8) * balance
