"""Linear layers: y = act(x Wᵀ + bias) + residual, and gated ones: y = act(x Wgᵀ) · (x Wuᵀ), for every M.

Two launches:
    round x into the layout that the tiles read (see pack.py); for f32 and M = 1 x is in it already
    multiply, tile by tile, and finish each tile with bias, activation and residual (see panel.py)

GEMV (M = 1), flat GEMM (M <= 16) and GEMM differ in their tiles alone: a tile is `rows` rows of x by `panels` panels
of 16 outputs, whose accumulators fill the vector registers.  The weight has one layout for all of them.

Every output is one sum over k in order, in one accumulator, whatever the tiles: the same bits for every M.
bf16: x is rounded to bf16 and products are summed in f32, two at a time where the CPU has vdpbf16ps.
fp8: codes become pairs of bf16 in registers, exactly, and go on as those do; a row's scale multiplies its finished sum.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Any, Literal

from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, Layout, Operand, short_hash
from llmc.compiler.target import Target
from llmc.schedules.cpu.linear.panel_layout import PANEL, Panels, PanelVector, panel_count
from llmc.schedules.cpu.linear.quant_layout import Fp8Panels
from llmc.schedules.rule import Rule

_LINEAR = re.compile(r"llmc\.Linear(?P<bias>Bias)?(?P<activation>Relu|GeluTanh|Gelu|Silu)?(?P<residual>Residual)?")
_GATED = re.compile(r"llmc\.GatedLinear(?P<activation>Silu|GeluTanh|Gelu)(?P<bias>Bias)?")


@dataclass(frozen=True)
class Linear:
    """What is computed: x [m, k] times a weight [parts * n, k].

    dot: how a step of the sum is done: "dpbf16" takes pairs of bf16 in one instruction, "fma" takes f32, widened from
    bf16 where the weight is, or fp8.  parts: 2 for a gated layer (gate, up), else 1.
    """

    m: int
    n: int
    k: int
    weight: Literal["bf16", "f32", "f8"]
    dot: Literal["dpbf16", "fma"]
    parts: int = 1
    bias: bool = False
    activation: str = ""
    residual: bool = False

    @property
    def step(self) -> int:
        """k in a 32-bit word of the weight."""
        return {"f32": 1, "bf16": 2, "f8": 4}[self.weight]

    @property
    def steps(self) -> int:
        return ceil(self.k / self.step)

    @property
    def words(self) -> int:
        """32-bit words that x takes in a step, for one row."""
        return self.step // 2 if self.dot == "dpbf16" else self.step

    @property
    def rounds_x(self) -> bool:
        """Whether x is rounded to bf16."""
        return self.weight != "f32"

    @property
    def panels(self) -> int:
        return panel_count(self.n, self.parts)

    @property
    def packing_blocks(self) -> int:
        """Units of work that the packing of a tile's rows is cut into."""
        return ceil(self.k / PACKING_COLUMNS)

    def packed_bytes(self, rows: int) -> tuple[int, ...]:
        """Bytes of so many rows of x as the tiles read them."""
        return (4 * rows * self.steps * self.words,)

    @property
    def panel_words(self) -> int:
        """32-bit words of a panel."""
        return (self.steps + (1 if self.weight == "f8" else 0)) * PANEL

    @property
    def layout(self) -> Panels | Fp8Panels:
        return Fp8Panels(self.parts) if self.weight == "f8" else Panels(self.weight, self.parts)

    @property
    def weight_bytes(self) -> int:
        return self.layout.n_bytes((self.parts * self.n, self.k))


@dataclass(frozen=True)
class Tiles:
    """How it is cut up.

    rows, panels: of a tile.  steps: of k at a time, between which a tile's sums wait in scratch memory.
    group: tiles side by side that one unit of work passes over while the same rows of x stay in the cache.
    near, far: how many steps before its use a panel's cache line is asked for, into the first and into the second
    level cache; 0 is not at all.
    """

    rows: int
    panels: int
    steps: int
    group: int = 1
    near: int = 0
    far: int = 0

    def __str__(self) -> str:
        tile = f"{self.rows}x{self.panels * PANEL} tiles, {self.group} a unit, {self.steps} steps at a time"
        return f"{tile}, {self.near}/{self.far} ahead" if self.near or self.far else tile

    def family(self, m: int) -> str:
        """What people call it."""
        return "GEMV" if m == 1 else "flat GEMM" if m <= self.rows else "GEMM"

    def row_tiles(self, linear: Linear) -> int:
        return ceil(linear.m / self.rows)

    def grid(self, linear: Linear) -> int:
        return linear.panels // (self.panels * self.group)

    def scratch_words(self, linear: Linear) -> int:
        """Sums that wait: [row tiles][group][rows][panels][16]."""
        tiles = self.row_tiles(linear) if self.steps < linear.steps else 1
        return tiles * self.group * self.rows * self.panels * PANEL


MOST_WEIGHT_BYTES = 4 << 31
"""Words of the weight are counted in int32."""

LARGE_X_BYTES = 4 << 20
LONG_CHUNK, SHORT_CHUNK = 2048, 512
"""Steps of k that a unit's panels are cut into: for one tile of 32 outputs, and for several."""

NEAR_LINES, FAR_STEPS, BUSY = 16, 128, 8
"""Prefetching: lines in flight to the first level, over all panels of a tile; and steps to the second level, for tiles
that do at least BUSY multiply-adds for a cache line of the weight.  With fewer, the hardware's prefetcher keeps up."""
WAITING, WAITING_LINES = 4, 96
"""A single tile of rows waits for memory beside what it does: from so many multiply-adds for a cache line on it has so
many lines in flight, all to the first level.  On a Zen 5 TinyLlama's step of 8 tokens in bf16 takes 0.93 of the time,
products of 4 tokens 0.94; several tiles of a prompt do not gain."""

IN_TURN, IN_TURN_LINES = 2, 128
"""Up to so many tiles of BUSY rows or more ask for lines in turn, and for so many ahead: on a Zen 5 8 to 16 rows of
bf16 take 0.91 to 0.95 of the time, gated layers of 16 0.85.  Fewer rows wait for memory either way."""

ONE_TILE = 16
"""Rows that AVX-512 multiplies in one tile, of a single panel if need be: while a second one passes over what the first
has brought into the cache, memory rests.  On a Zen 5 16 tokens take 0.76 to 0.8 of the time of two tiles in bf16 and
float32, 0.83 to 0.87 in int8 (with VNNI); nine in int8 0.74."""


def match(call: Call, target: Target) -> Tiles | None:
    linear = parse(call, target)
    return default_tiles(linear, target) if linear else None


def parse(call: Call, target: Target) -> Linear | None:
    """The linear layer that a call asks for, or None."""
    plain, gated = _LINEAR.fullmatch(call.op), _GATED.fullmatch(call.op)
    name = plain or gated
    x, weight, *rest = call.inputs if name else (None, None)
    if not (name and x and weight and weight.constant and len(x.shape) == 2 and x.dtype == "f32"):
        return None
    bias = bool(name["bias"])
    if bias and not (rest[0] and rest[0].constant):
        return None
    parts = 2 if gated else 1
    stored: Literal["bf16", "f8", "f32"] = weight.dtype if weight.dtype in ("bf16", "f8") else "f32"
    linear = Linear(
        m=x.shape[0],
        n=weight.shape[0] // parts,
        k=weight.shape[1],
        weight=stored,
        dot="dpbf16" if stored != "f32" and target.has("avx512_bf16") else "fma",
        parts=parts,
        bias=bias,
        activation=name["activation"] or "",
        residual=bool(plain and plain["residual"]),
    )
    return linear if linear.weight_bytes < MOST_WEIGHT_BYTES else None


def default_tiles(linear: Linear, target: Target) -> Tiles:
    """Tiles whose accumulators fit the vector registers: 28 of 32 with AVX-512, 12 of 16 (two a panel) with AVX2.  Up
    to ONE_TILE rows are one tile where they can be.

    With several row tiles, a unit's panels are read again for each: from the second level cache, if cut along k.  A
    large x is read more seldom when a unit takes several tiles.
    """
    most = accumulators(target)
    most_rows = 14 if target.has("avx512f") else most // linear.parts
    if is_one_tile(linear, target):
        most_rows = ONE_TILE
    row_tiles = ceil(linear.m / most_rows)
    rows = ceil(linear.m / row_tiles)
    panels = panels_of(rows, linear.parts, most)
    steps, group = linear.steps, 1
    if row_tiles > 1:
        x_bytes = 4 * linear.m * linear.steps * linear.words
        steps, group = (LONG_CHUNK, 1) if x_bytes <= LARGE_X_BYTES else (SHORT_CHUNK, 8 // panels)
        while linear.panels % (panels * group):
            group //= 2
    n_chunks = ceil(linear.steps / steps)
    near, far = ahead(rows * linear.words, panels, row_tiles)
    tiles = Tiles(rows, panels, ceil(linear.steps / n_chunks), group, near, far)
    in_turn = replace(tiles, near=IN_TURN_LINES // panels, far=0)
    return in_turn if asks_in_turn(linear, in_turn) else tiles


def is_one_tile(linear: Linear, target: Target) -> bool:
    """Whether the rows are one tile of a single panel, and so wait for memory once."""
    return target.has("avx512f") and linear.parts == 1 and linear.m <= ONE_TILE


def asks_in_turn(linear: Linear, tiles: Tiles) -> bool:
    """Whether lines are asked for one by one between the products, and at a panel's end those of the panels that are
    taken next; into the first level alone."""
    enough = tiles.near * tiles.panels >= IN_TURN_LINES and tiles.rows >= BUSY and tiles.row_tiles(linear) <= IN_TURN
    return enough and linear.dot == "dpbf16" and linear.weight == "bf16"


def ahead(work: int, panels: int, row_tiles: int) -> tuple[int, int]:
    """Steps ahead, near and far, of a tile that does so many multiply-adds for a cache line of the weight."""
    if row_tiles == 1:
        return (WAITING_LINES if work >= WAITING else NEAR_LINES) // panels, 0
    return NEAR_LINES // panels, FAR_STEPS if work >= BUSY else 0


def accumulators(target: Target) -> int:
    """Sums of 16 outputs that the vector registers hold beside what is multiplied."""
    return 28 if target.has("avx512f") else 6


def panels_of(rows: int, parts: int, accumulators: int) -> int:
    """The most panels of a tile of so many rows."""
    return next(p for p in (4, 2, 1) if rows * p <= accumulators and p >= parts)


def space(call: Call, target: Target) -> Iterable[Tiles]:
    """Tiles worth measuring, the most promising first."""
    from llmc.schedules.cpu.linear.space import tile_space

    linear = parse(call, target)
    return tile_space(linear, default_tiles(linear, target), target) if linear else ()


def implement(call: Call, tiles: Tiles, target: Target) -> Implementation:
    linear = parse(call, target)
    assert linear is not None, "implement follows match"
    x = Operand("input", 0)
    launches: list[Launch] = []
    temps: list[int] = []
    if not is_packed(linear):
        packing = packing_kernel(linear, tiles)
        launches.append(Launch(packing, (x, Operand("temp", 0)), packing_grid(linear, tiles), 8 * linear.m * linear.k))
        x = Operand("temp", 0)
        temps += linear.packed_bytes(tiles.row_tiles(linear) * tiles.rows)
    launches.append(product_launch(call, linear, tiles, product_kernel(linear, tiles), (x,), linear.weight_bytes))
    layouts, family = layouts_of(linear, linear.layout), tiles.family(linear.m)
    return Implementation(tuple(launches), tuple(temps), 4 * tiles.scratch_words(linear), layouts, family=family)


def product_launch(
    call: Call, linear: Linear, tiles: Tiles, kernel: Kernel, x: tuple[Operand, ...], weight_bytes: int
) -> Launch:
    """The product's launch, whatever unit multiplies.  x: the call's first input as packing leaves it."""
    others = [Operand("input", index) for index in range(1, len(call.inputs))]
    return Launch(
        kernel,
        (*x, *others, Operand("output", 0), Operand("scratch")),
        tiles.grid(linear),
        weight_bytes + 4 * linear.m * (linear.k + linear.n * (2 if linear.residual else 1)),
        2 * linear.m * linear.n * linear.parts * linear.k,
    )


def layouts_of(linear: Linear, weight: Layout) -> dict[int, Layout]:
    """How the weight and the bias lie."""
    return {1: weight, 2: PanelVector(linear.parts)} if linear.bias else {1: weight}


def is_packed(linear: Linear) -> bool:
    """Whether x already lies as the tiles read it."""
    return linear.m == 1 and linear.weight == "f32"


PACKING_COLUMNS = 512
"""Columns of x that a unit of packing takes."""


def packing_grid(linear: Linear, tiles: Tiles) -> int:
    return tiles.row_tiles(linear) * linear.packing_blocks


def packing_kernel(linear: Linear, tiles: Tiles) -> Kernel:
    """The kernel that brings x into the tiles' layout; the same for every n and every epilogue."""
    plain = Linear(linear.m, 0, linear.k, linear.weight, linear.dot)
    shape = f"{linear.weight}_m{linear.m}_k{linear.k}_by{tiles.rows}"
    return keyed_kernel(f"pack_{shape}", partial(build_packing, plain, tiles.rows))


def product_kernel(linear: Linear, tiles: Tiles) -> Kernel:
    return keyed_kernel(product_name(linear), partial(build_product, linear, tiles))


def product_name(linear: Linear) -> str:
    epilogue = f"{'gated_' * (linear.parts == 2)}{'bias_' * linear.bias}{linear.activation.lower()}"
    shape = f"m{linear.m}_n{linear.n}_k{linear.k}"
    words = ("linear", linear.weight, shape, epilogue.strip("_"), "residual" * linear.residual)
    return "_".join(filter(None, words))


def keyed_kernel(name: str, build: partial[Any]) -> Kernel:
    """A kernel whose key is the call of `build`; the name ends with the key's hash, so that tilings can coexist."""
    key = f"{build.func.__name__}{build.args}"
    return Kernel(f"{name}_{short_hash(key)}", key, build)


def build_packing(linear: Linear, rows: int) -> Any:
    from llmc.schedules.cpu.linear import pack  # TVM is imported only when something is compiled

    return pack.packing_function(linear, rows)


def build_product(linear: Linear, tiles: Tiles) -> Any:
    from llmc.schedules.cpu.linear import panel

    return panel.product_function(linear, tiles)


RULES = (Rule("linear", match, implement, space),)
