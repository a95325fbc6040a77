"""Linear layers with quantised weights.

    int8    a scale for each output; x with a scale for each row and block of 128.    Bytes: N K + 4 N.
    int4    an f16 scale for each output and group of 32 or 128 along K; x with one for each row and group. A word of
            the weight is taken apart into two of bytes, which multiply as in int8.    Bytes: N K / 2 + 2 N K / group.
            Where groups have zeros (z4): 2 N K / group more.

With VNNI four products a lane and instruction; without it, widened to 16 bits: right, not fast.

Two launches, as for other weights (rule.py):
    quantise x, each row and block of K with its own scale, into the layout that the tiles read (quant_pack.py)
    multiply bytes, tile by tile, exactly within a block; add the blocks up in float32 (quant_panel.py)

x has a scale for each block, not one a row: where a model has a few columns of large activations, a scale for the
whole row would leave the others no digits.

Every output is, for every M and on every CPU: for each block in order, sum = fma(exact sum of products, scale, sum),
beside zeros with fma(zero, -sum of x, exact sum of products) for the exact sum, which it is where zeros are whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Any, Literal

from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, Operand, TensorType
from llmc.compiler.quantization.inputs import block_of
from llmc.compiler.target import Target
from llmc.runtime.errors import LlmcError
from llmc.schedules.cpu.linear import rule as linear
from llmc.schedules.cpu.linear.panel_layout import PANEL
from llmc.schedules.cpu.linear.quant_layout import (
    Int4Panels,
    Int4ZerosPanels,
    Int8Panels,
    Mxfp4Panels,
    padded,
)
from llmc.schedules.cpu.linear.rule import Linear, Tiles
from llmc.schedules.rule import Rule

Bytes = Literal["i8", "i4", "z4", "m4"]
FOUR_BITS: Mapping[str, type[Int4Panels]] = {"i4": Int4Panels, "z4": Int4ZerosPanels, "m4": Mxfp4Panels}

MOST_WORDS = 1 << 31
"""Words of the weight are counted in int32."""

PACKING_COLUMNS = 512
"""Columns of x that a unit of packing takes, or a block if that is more."""


@dataclass(frozen=True)
class QuantLinear:
    """What is computed.

    linear: the layer as one of float32 weights.  weight: how its weights are stored.  block: how many elements along K
    of x share a scale; in int4 those of the weight do too.  dot: how bytes are multiplied, see quant_dot.py.
    """

    linear: Linear
    weight: Bytes
    block: int
    dot: str

    @property
    def layout(self) -> Int8Panels | Int4Panels:
        parts = self.linear.parts
        if self.weight == "i8":
            return Int8Panels(parts)
        return FOUR_BITS[self.weight](self.block, parts)

    @property
    def k(self) -> int:
        """K, filled up as in the layout."""
        return padded(self.linear.k, self.block if self.weight == "i8" else 2 * self.block)

    @property
    def blocks(self) -> int:
        return self.k // self.block

    @property
    def steps(self) -> int:
        """Words of four elements of x in a row."""
        return self.k // 4

    @property
    def packing_blocks(self) -> int:
        """Units of work that the packing of a tile's rows is cut into."""
        return ceil(self.blocks / blocks_a_unit(self))

    def packed_bytes(self, rows: int) -> tuple[int, ...]:
        """Bytes of so many rows of x as the tiles read them: codes, scales and corrections."""
        return rows * self.k, 4 * rows * self.blocks, 4 * rows * self.blocks

    @property
    def panel_words(self) -> int:
        return self.layout.panel_words(self.linear.k)

    @property
    def weight_bytes(self) -> int:
        return self.layout.n_bytes((self.linear.parts * self.linear.n, self.linear.k))


def dot_of(target: Target) -> str:
    """How the target multiplies bytes: "vnni", "avx512" or "avx2"; on ARM "usdot" or "sdot"."""
    if target.architecture == "aarch64":
        return "usdot" if target.has("i8mm") else "sdot"
    return "vnni" if target.has("avx512_vnni") else "avx512" if target.has("avx512bw") else "avx2"


def parse(call: Call, target: Target, dtype: Bytes) -> QuantLinear | None:
    """The layer of weights of this dtype that a call asks for, or None.  Raises LlmcError: too large."""
    weight = call.inputs[1] if len(call.inputs) > 1 else None
    if weight is None or not weight.constant or weight.dtype != dtype:
        return None
    as_float = TensorType(weight.shape, "f32", constant=True)
    layer = linear.parse(replace(call, inputs=(call.inputs[0], as_float, *call.inputs[2:])), target)
    if layer is None:
        return None
    block = weight.group or block_of(layer.k)
    quant = QuantLinear(layer, dtype, block, dot_of(target))
    if quant.weight_bytes // 4 >= MOST_WORDS:
        raise LlmcError("a weight of more than 8 GiB cannot be quantised", place=str(call))
    return quant


NEAR_LINES = 128
"""Cache lines that are asked for ahead of their use, over all panels of a tile.  On a Zen 5 half as many took 1.1 to
1.2 times as long for int4 and int8 at 8 tokens, twice as many up to 1.1 times at 1 to 4."""


def default_tiles(quant: QuantLinear, target: Target) -> Tiles:
    """Tiles whose exact sums and float sums both fit the vector registers, which AVX2 has half as many of, half as
    wide."""
    layer = quant.linear
    most = accumulators(target)
    most_rows = 8 if target.has("avx512f") else most // layer.parts
    if quant.weight == "i8" and quant.dot == "vnni" and linear.is_one_tile(layer, target):  # others wait for arithmetic
        most_rows = linear.ONE_TILE
    rows = ceil(layer.m / ceil(layer.m / most_rows))
    panels = linear.panels_of(rows, layer.parts, most)
    return Tiles(rows, panels, quant.steps, near=NEAR_LINES // panels)


def accumulators(target: Target) -> int:
    """Sums of 16 outputs that the vector registers hold, exact ones and those in float32."""
    return 16 if target.has("avx512f") else 4


def space(quant: QuantLinear, target: Target) -> Iterable[Tiles]:
    """Other tiles worth measuring."""
    default = default_tiles(quant, target)
    row_counts = {ceil(quant.linear.m / ceil(quant.linear.m / rows)) for rows in (4, 6, 7, 8, 12, 14, 16)}
    for rows in sorted(row_counts):
        for panels in (1, 2, 4):
            for lines in (NEAR_LINES, NEAR_LINES // 2, 2 * NEAR_LINES, 0):
                if panels >= quant.linear.parts and rows * panels <= 28:
                    yield replace(default, rows=rows, panels=panels, near=lines // panels)


def implement(quant: QuantLinear, tiles: Tiles, call: Call) -> Implementation:
    kernels = packing_kernel(quant, tiles), product_kernel(quant, tiles)
    return launched(quant, tiles, call, *kernels, scratch_bytes=4 * tiles.rows * tiles.panels * PANEL)


def launched(
    quant: QuantLinear, tiles: Tiles, call: Call, packing: Kernel, product: Kernel, *, scratch_bytes: int
) -> Implementation:
    """Both launches, whatever unit multiplies."""
    layer = quant.linear
    packed = tuple(Operand("temp", index) for index in range(3))
    grid = packing_grid(quant, tiles)
    launches = (
        Launch(packing, (Operand("input", 0), *packed), grid, 5 * layer.m * layer.k),
        linear.product_launch(call, layer, tiles, product, packed, quant.weight_bytes),
    )
    temps = quant.packed_bytes(tiles.row_tiles(layer) * tiles.rows)
    layouts, family = linear.layouts_of(layer, quant.layout), tiles.family(layer.m)
    return Implementation(launches, temps, scratch_bytes, layouts, family=family)


def packing_grid(quant: QuantLinear, tiles: Tiles) -> int:
    return tiles.row_tiles(quant.linear) * quant.packing_blocks


def blocks_a_unit(quant: QuantLinear) -> int:
    return max(1, PACKING_COLUMNS // quant.block)


def packing_kernel(quant: QuantLinear, tiles: Tiles) -> Kernel:
    """The kernel that quantises x; the same for every n and every epilogue."""
    layer = quant.linear
    plain = replace(quant, linear=Linear(layer.m, 0, layer.k, "f32", "fma"))
    name = f"quantise_{quant.weight}_m{layer.m}_k{layer.k}_by{tiles.rows}"
    return linear.keyed_kernel(name, partial(build_packing, plain, tiles.rows))


def product_kernel(quant: QuantLinear, tiles: Tiles) -> Kernel:
    return linear.keyed_kernel(product_name(quant), partial(build_product, quant, tiles))


def product_name(quant: QuantLinear) -> str:
    layer = quant.linear
    words = (
        f"linear_{quant.weight}g{quant.block}_m{layer.m}_n{layer.n}_k{layer.k}",
        "gated" * (layer.parts == 2),
        "bias" * layer.bias,
        layer.activation.lower(),
        "residual" * layer.residual,
    )
    return "_".join(filter(None, words))


def build_packing(quant: QuantLinear, rows: int) -> Any:
    from llmc.schedules.cpu.linear import quant_pack  # TVM is imported only when something is compiled

    return quant_pack.packing_function(quant, rows)


def build_product(quant: QuantLinear, tiles: Tiles) -> Any:
    from llmc.schedules.cpu.linear import quant_panel

    return quant_panel.product_function(quant, tiles)


def rule(name: str, dtype: Bytes) -> Rule:
    """The schedule of layers whose weights are stored in `dtype`."""

    def match(call: Call, target: Target) -> Tiles | None:
        quant = parse(call, target, dtype)
        return default_tiles(quant, target) if quant else None

    def candidates(call: Call, target: Target) -> Iterable[Tiles]:
        quant = parse(call, target, dtype)
        return space(quant, target) if quant else ()

    def implement_call(call: Call, tiles: Tiles, target: Target) -> Implementation:
        quant = parse(call, target, dtype)
        assert quant is not None, "implement follows match"
        return implement(quant, tiles, call)

    return Rule(name, match, implement_call, candidates)


INT8, INT4 = rule("linear_int8", "i8"), rule("linear_int4", "i4")
INT4_ZEROS = rule("linear_int4_zeros", "z4")
RULES = (INT8, INT4, INT4_ZEROS)
