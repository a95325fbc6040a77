"""A product of each head of x with a matrix of its own: y_h = x_h W_hᵀ, for every M.

Two launches:
    pack     each head's rows of x as the tiles read them, those columns that are multiplied     (heads_panel.py)
    multiply, tile by tile, head by head, with the tiles and the code of linear layers           (panel.py)

Each head's matrix lies in panels, as that of a linear layer, one after the other.  Every output is one sum over k in
order: the same bits for every M.  Bytes: the matrices once.  Operations: 2 M H N K.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, Operand, TensorType
from llmc.compiler.target import Target
from llmc.schedules.cpu.linear import rule as plain
from llmc.schedules.cpu.linear.rule import Linear, Tiles, keyed_kernel
from llmc.schedules.experts_layout import OfExperts
from llmc.schedules.rule import Rule


@dataclass(frozen=True)
class Heads:
    """each: the product of one head.  stride: columns of x from one head's first to the next one's."""

    each: Linear
    count: int
    stride: int


def parse(call: Call, target: Target) -> Heads | None:
    """The product that a call asks for, or None."""
    if call.op != "llmc.HeadProduct":
        return None
    x, weight = call.inputs
    if x is None or weight is None or x.dtype != "f32" or not weight.constant or weight.dtype not in ("f32", "bf16"):
        return None
    count, n, k = weight.shape
    rows, columns = x.shape
    one = (TensorType((rows, k), "f32"), replace(weight, shape=(n, k)))
    each = plain.parse(Call("llmc.Linear", one, (TensorType((rows, n), "f32"),)), target)
    if each is None or columns % count or count * each.weight_bytes >= plain.MOST_WEIGHT_BYTES:
        return None
    return Heads(each, count, columns // count)


def match(call: Call, target: Target) -> Tiles | None:
    heads = parse(call, target)
    return plain.default_tiles(heads.each, target) if heads else None


def implement(call: Call, tiles: Tiles, target: Target) -> Implementation:
    heads = parse(call, target)
    assert heads is not None, "implement follows match"
    each, row_tiles = heads.each, tiles.row_tiles(heads.each)
    packed = Operand("temp", 0)
    launches = (
        Launch(
            kernel("pack_heads", heads, partial(build_packing, heads, tiles.rows)),
            (Operand("input", 0), packed),
            heads.count * row_tiles * each.packing_blocks,
            8 * heads.count * each.m * each.k,
        ),
        Launch(
            kernel("heads", heads, partial(build_product, heads, tiles)),
            (packed, Operand("input", 1), Operand("output", 0), Operand("scratch")),
            heads.count * tiles.grid(each),
            heads.count * (each.weight_bytes + 4 * each.m * (each.k + each.n)),
            2 * heads.count * each.m * each.n * each.k,
        ),
    )
    temps = each.packed_bytes(heads.count * row_tiles * tiles.rows)
    layouts = {1: OfExperts(each.layout, heads.count)}
    return Implementation(launches, temps, 4 * tiles.scratch_words(each), layouts, family=tiles.family(each.m))


def kernel(name: str, heads: Heads, build: partial[Any]) -> Kernel:
    each = heads.each
    return keyed_kernel(f"{name}{heads.count}_{each.weight}_m{each.m}_n{each.n}_k{each.k}", build)


def build_packing(heads: Heads, rows: int) -> Any:
    from llmc.schedules.cpu.linear import heads_panel  # TVM is imported only when something is compiled

    return heads_panel.packing_function(heads, rows)


def build_product(heads: Heads, tiles: Tiles) -> Any:
    from llmc.schedules.cpu.linear import heads_panel

    return heads_panel.product_function(heads, tiles)


RULES = (Rule("head_product", match, implement),)
