"""Linear layers of bf16 and fp8 weights on AMX, for every M: what rule.py computes, in tile registers.

Two launches, as there:
    round x to bf16, into tiles of 32 columns (amx_pack.py)
    multiply, block by block, and finish each block with bias, activation and residual (amx_panel.py)

A block is up to 32 rows of x, one tile or two, by 2 panels of 16 outputs.  The weight lies as for other levels.

fp8 becomes pairs of bf16 in scratch memory: a chunk of a unit's panels once, for all blocks of rows; for a single block
a few tiles before they are used, so that they stay in the first level cache.

Every output is one sum over k in order, 32 at a time, whatever the blocks: the same bits for every M.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from math import ceil, prod
from typing import Any

from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, Operand
from llmc.compiler.target import Target
from llmc.schedules.cpu.amx import ROWS, TILE_BYTES, TileBlock
from llmc.schedules.cpu.linear import rule as vector
from llmc.schedules.cpu.linear.panel_layout import PANEL
from llmc.schedules.cpu.linear.quant_layout import padded
from llmc.schedules.cpu.linear.rule import Linear, Tiles, keyed_kernel
from llmc.schedules.rule import Rule

TILE_K = 32
"""Elements along k of a tile of x: 64 bytes of bf16."""
TILE_WORDS = TILE_K // 2
"""32-bit words of a row of such a tile."""
REST_WORDS = ROWS * PANEL
"""Scratch memory for the last steps of a panel that fill no tile, with zeros behind them."""

CHUNK = 32
"""Tiles along k that a unit's panels are cut into, where several blocks of rows read them."""
WIDENED = 4
"""Tiles along k of a panel that are widened at a time, for a single block of rows."""
GROUP = 2
"""Blocks side by side of a unit, where there are several blocks of rows: of two panels each, of which panels come in
fours."""
NEAR, FAR = 16, 128
"""Prefetching for a single block of rows: how many steps ahead a panel's cache lines are asked for."""


def match(call: Call, target: Target) -> Tiles | None:
    layer = parse(call, target)
    return default_tiles(layer) if layer else None


def parse(call: Call, target: Target) -> Linear | None:
    """The layer that a call asks for, if AMX multiplies its weights, or None."""
    layer = vector.parse(call, target) if target.has("amx_bf16") else None
    return layer if layer and layer.weight != "f32" else None


def default_tiles(layer: Linear) -> Tiles:
    blocks = ceil(layer.m / (2 * ROWS))
    rows = even(ceil(layer.m / blocks))
    if blocks == 1:
        return Tiles(rows, 2, layer.steps, 1, NEAR, FAR)
    return cut(layer, Tiles(rows, 2, CHUNK * tile_steps(layer), GROUP))


def even(rows: int) -> int:
    """Rows of a block: two tiles have the same number of them."""
    return rows if rows <= ROWS else rows + rows % 2


def cut(layer: Linear, tiles: Tiles) -> Tiles:
    """The same with about as many steps at a time, whole tiles of them, in equal parts; a chunk ahead is asked for."""
    chunks = ceil(layer.steps / tiles.steps)
    steps = padded(ceil(layer.steps / chunks), tile_steps(layer))
    return Tiles(tiles.rows, tiles.panels, min(steps, layer.steps), tiles.group, 0, steps)


def space(call: Call, target: Target) -> Iterable[Tiles]:
    """Blocks worth measuring, the most promising first."""
    layer = parse(call, target)
    if layer is None:
        return
    default = default_tiles(layer)
    yield default
    yield from (tiles for tiles in dict.fromkeys(_blocks(layer)) if tiles != default)


def _blocks(layer: Linear) -> Iterator[Tiles]:
    for most_rows, panels in ((2 * ROWS, 2), (ROWS, 4), (ROWS, 2), (2 * ROWS, 1)):
        rows = even(ceil(layer.m / ceil(layer.m / most_rows)))
        if panels < layer.parts or (most_rows > ROWS >= rows):
            continue
        if layer.m <= rows:
            yield from (Tiles(rows, panels, layer.steps, 1, n, f) for n in (0, 8, 16, 32) for f in (0, 64, 128))
            continue
        for group in (1, 2, 4, 8):
            if layer.panels % (panels * group) == 0:
                lengths = [*(n * tile_steps(layer) for n in (16, 32, 64)), layer.steps]
                yield from (cut(layer, Tiles(rows, panels, steps, group)) for steps in lengths)


def tile_block(tiles: Tiles) -> TileBlock:
    across = ceil(tiles.rows / ROWS)
    return TileBlock(tiles.rows // across, across, tiles.panels)


def tiles_of_k(layer: Linear) -> int:
    return ceil(layer.k / TILE_K)


def tile_steps(layer: Linear) -> int:
    """Steps of the weight, which are 32-bit words of a lane, in a tile's 32 elements along k."""
    return TILE_K // layer.step


def wide_tiles(layer: Linear, tiles: Tiles) -> tuple[int, int]:
    """Tiles of an fp8 weight that lie in scratch memory as bf16: of how many panels, and how many of each."""
    if tiles.row_tiles(layer) == 1:
        return tiles.panels, WIDENED
    return tiles.group * tiles.panels, ceil(tiles.steps / tile_steps(layer))


def scratch_words(layer: Linear, tiles: Tiles) -> int:
    if layer.weight == "f8":
        return tiles.scratch_words(layer) + prod(wide_tiles(layer, tiles)) * TILE_BYTES // 4
    return tiles.scratch_words(layer) + (REST_WORDS if layer.steps % ROWS else 0)


def implement(call: Call, tiles: Tiles, target: Target) -> Implementation:
    layer = parse(call, target)
    assert layer is not None, "implement follows match"
    x = Operand("temp", 0)
    grid = vector.packing_grid(layer, tiles)
    packing = Launch(packing_kernel(layer, tiles), (Operand("input", 0), x), grid, 6 * layer.m * layer.k)
    product = vector.product_launch(call, layer, tiles, product_kernel(layer, tiles), (x,), layer.weight_bytes)
    x_bytes = tiles.row_tiles(layer) * tiles.rows * tiles_of_k(layer) * TILE_WORDS * 4
    layouts, family = vector.layouts_of(layer, layer.layout), tiles.family(layer.m)
    return Implementation((packing, product), (x_bytes,), 4 * scratch_words(layer, tiles), layouts, family=family)


def packing_kernel(layer: Linear, tiles: Tiles) -> Kernel:
    """The kernel that brings x into tiles; the same for every n, every weight and every epilogue."""
    name = f"pack_tiles_m{layer.m}_k{layer.k}_by{tiles.rows}"
    return keyed_kernel(name, partial(build_packing, layer.m, layer.k, tiles.rows))


def product_kernel(layer: Linear, tiles: Tiles) -> Kernel:
    return keyed_kernel(f"amx_{vector.product_name(layer)}", partial(build_product, layer, tiles))


def build_packing(m: int, k: int, rows: int) -> Any:
    from llmc.schedules.cpu.linear import amx_pack  # TVM is imported only when something is compiled

    return amx_pack.packing_function(m, k, rows)


def build_product(layer: Linear, tiles: Tiles) -> Any:
    from llmc.schedules.cpu.linear import amx_panel

    return amx_panel.product_function(layer, tiles)


RULES = (Rule("linear_amx", match, implement, space),)
