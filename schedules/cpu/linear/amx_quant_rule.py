"""Linear layers of int8 and int4 weights on AMX: what quant_rule.py computes, in tile registers, for many rows.

Products of bytes are exact in any order, so these are the bits of quant_rule.py, which stays where there are few
rows: there its vectors are as fast as memory, or faster than tiles that are stored after every block.

Two launches, as there:
    quantise x, each row and block of K with its own scale, into tiles (quant_pack.py)
    multiply bytes, block by block, exactly; add the blocks up in float32 (amx_quant_panel.py)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from math import ceil
from typing import Any

from llmc.compiler.kernel import Call, Implementation, Kernel
from llmc.compiler.target import Target
from llmc.schedules.cpu.amx import ROWS, TileBlock
from llmc.schedules.cpu.linear import quant_rule as quant_linear
from llmc.schedules.cpu.linear.amx_rule import GROUP, even
from llmc.schedules.cpu.linear.panel_layout import PANEL
from llmc.schedules.cpu.linear.quant_rule import Bytes, QuantLinear
from llmc.schedules.cpu.linear.rule import Linear, Tiles, keyed_kernel
from llmc.schedules.rule import Rule

BYTES: tuple[Bytes, ...] = ("i8", "i4", "z4")
FEW_ROWS = {"i8": 8, "i4": 16, "z4": 16}
"""Up to so many rows of x vectors are as fast as tiles."""
FEW_ROWS_OF_SHORT_BLOCKS, SHORT_BLOCK = 32, 32
"""The same where a block of K fills only half a tile."""
UNIT_BYTES = 768 << 10
"""How much of the second level cache a unit's panels may fill."""
AHEAD = 128
"""Prefetching: how many cache lines of a panel ahead."""


def match(call: Call, target: Target) -> Tiles | None:
    quant = parse(call, target)
    return default_tiles(quant) if quant else None


def parse(call: Call, target: Target) -> QuantLinear | None:
    """The layer that a call asks for, if it is one for AMX, or None."""
    if not target.has("amx_int8"):
        return None
    for dtype in BYTES:
        quant = quant_linear.parse(call, target, dtype)
        if quant and quant.linear.m > few_rows(quant):
            return quant
    return None


def few_rows(quant: QuantLinear) -> int:
    return FEW_ROWS_OF_SHORT_BLOCKS if quant.block <= SHORT_BLOCK else FEW_ROWS[quant.weight]


def default_tiles(quant: QuantLinear) -> Tiles:
    layer = quant.linear
    blocks = ceil(layer.m / (2 * ROWS))
    group = GROUP if blocks > 1 else 1
    while layer.panels % (2 * group) or (group > 1 and 2 * group * PANEL * quant.k > UNIT_BYTES):
        group //= 2
    return Tiles(even(ceil(layer.m / blocks)), 2, quant.steps, group, 0, AHEAD)


def space(call: Call, target: Target) -> Iterable[Tiles]:
    """Blocks worth measuring, the most promising first."""
    quant = parse(call, target)
    if quant is None:
        return
    default = default_tiles(quant)
    yield default
    for group in (1, 2, 4, 8) if quant.linear.m > default.rows else (1,):
        for far in (0, 64, 128):
            tiles = replace(default, group=group, far=far)
            if quant.linear.panels % (tiles.panels * group) == 0 and tiles != default:
                yield tiles


def tile_steps(quant: QuantLinear) -> int:
    """Words of x along k in a tile: of a row of 64 bytes, or of a block that has fewer."""
    return min(ROWS, quant.block // 4)


def tile_block(quant: QuantLinear, tiles: Tiles) -> TileBlock:
    across = ceil(tiles.rows / ROWS)
    return TileBlock(tiles.rows // across, across, tiles.panels, tile_steps(quant), "tdpbsud")


def sums_words(tiles: Tiles) -> int:
    return tiles.rows * tiles.panels * PANEL


def scratch_words(quant: QuantLinear, tiles: Tiles) -> int:
    """Sums in float32, the exact ones of a block, and a unit's panels of int4 as bytes."""
    as_bytes = tiles.group * tiles.panels * quant.steps * PANEL if quant.weight != "i8" else 0
    return 2 * sums_words(tiles) + as_bytes


def implement(call: Call, tiles: Tiles, target: Target) -> Implementation:
    quant = parse(call, target)
    assert quant is not None, "implement follows match"
    kernels = packing_kernel(quant, tiles), product_kernel(quant, tiles)
    return quant_linear.launched(quant, tiles, call, *kernels, scratch_bytes=4 * scratch_words(quant, tiles))


def packing_kernel(quant: QuantLinear, tiles: Tiles) -> Kernel:
    """The kernel that quantises x; the same for every n and every epilogue."""
    layer = quant.linear
    plain = replace(quant, linear=Linear(layer.m, 0, layer.k, "f32", "fma"))
    name = f"quantise_tiles_{quant.weight}_m{layer.m}_k{layer.k}_by{tiles.rows}"
    return keyed_kernel(name, partial(build_packing, plain, tiles.rows))


def product_kernel(quant: QuantLinear, tiles: Tiles) -> Kernel:
    return keyed_kernel(f"amx_{quant_linear.product_name(quant)}", partial(build_product, quant, tiles))


def build_packing(quant: QuantLinear, rows: int) -> Any:
    from llmc.schedules.cpu.linear import quant_pack  # TVM is imported only when something is compiled

    return quant_pack.packing_function(quant, rows, tile_steps(quant))


def build_product(quant: QuantLinear, tiles: Tiles) -> Any:
    from llmc.schedules.cpu.linear import amx_quant_panel

    return amx_quant_panel.product_function(quant, tiles)


RULES = (Rule("linear_bytes_amx", match, implement, space),)
