"""Mixtures of experts: y = Σ_j share_j · down(act(x Wgᵀ) · (x Wuᵀ)) over the k experts of a token, for every M; with
biases and a clamped gate too.

A pair is a token and one of its experts: token m and its j-th expert are pair m k + j.  Six launches:

    sort     pairs by expert into tiles of up to `rows` pairs of one expert          (sort.py: the table)
    pack     the tiles' rows of x, as for linear layers                              (pack.py)
    gate_up  the gated product of each tile with its expert's weight                 (panel.py)
    pack     its results
    down     the second product, each pair's result to a row of its own
    combine  y[m] = Σ_j share[m, j] · result[m k + j], j in order                    (sort.py)

Only weights of experts that have pairs are read: at M = 1 those of k experts.  An expert's weight lies as that of a
linear layer, in panels, one expert after the other, and is multiplied by the same code (linear/panel.py,
linear/quant_panel.py): each output is one sum over K in order, so that a token has the same bits alone, in a batch and
in any chunk of its prompt.  What M decides is in how many tiles an expert's rows lie, and of how many rows a tile is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Any

from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, Layout, Operand, TensorType
from llmc.compiler.ops import CLAMPED_EXPERTS, DOMAIN, EXPERTS
from llmc.compiler.target import Target
from llmc.runtime.errors import LlmcError
from llmc.schedules.cpu.linear import quant_rule as quant_linear
from llmc.schedules.cpu.linear import rule as plain
from llmc.schedules.cpu.linear.panel_layout import PANEL, PANELS_MULTIPLE, PanelVector
from llmc.schedules.cpu.linear.quant_rule import QuantLinear
from llmc.schedules.cpu.linear.rule import Linear, Tiles, keyed_kernel
from llmc.schedules.experts_call import Clamp, clamp_of
from llmc.schedules.experts_layout import OfExperts
from llmc.schedules.rule import Rule

Layer = Linear | QuantLinear

SIZES = (1, 2, 4, 8)
"""Rows that tiles of fewer than the most may have: a tile's code is that of the first that has room."""

CHUNK_BYTES = 256 << 10
"""Bytes of a unit's panels that are read before sums go to scratch memory to wait: they stay in the second level cache
while several tiles of one expert pass."""

COMBINE_COLUMNS = 512
"""Columns of y that a unit of the last launch takes."""


@dataclass(frozen=True)
class Table:
    """How the sorted pairs lie, as int32:

    number of experts that have pairs, A; number of tiles; the A experts; the first tile of each, and the end of the
    last; each tile's number of pairs; each tile's pairs, `rows` places a tile; a counter for each expert.
    """

    tokens: int
    chosen: int
    experts: int
    rows: int

    @property
    def pairs(self) -> int:
        return self.tokens * self.chosen

    @property
    def active(self) -> int:
        """The most experts that can have pairs."""
        return min(self.experts, self.pairs)

    @property
    def tiles(self) -> int:
        """The most tiles there can be, whatever the router says: all but one of each expert's are full."""
        return min(self.pairs, self.pairs // self.rows + self.active)

    @property
    def tiles_of_one(self) -> int:
        """The most tiles of one expert: where a router says the same expert k times, of all pairs."""
        return ceil(self.pairs / self.rows)

    @property
    def experts_at(self) -> int:
        return 2

    @property
    def first_at(self) -> int:
        return self.experts_at + self.active

    @property
    def counts_at(self) -> int:
        return self.first_at + self.active + 1

    @property
    def pairs_at(self) -> int:
        return self.counts_at + self.tiles

    @property
    def counters_at(self) -> int:
        return self.pairs_at + self.tiles * self.rows

    @property
    def words(self) -> int:
        return self.counters_at + self.experts


@dataclass(frozen=True)
class Stage:
    """One of the two products.

    layer: of one expert, with m the number of all pairs.  divisor: what a pair's number is divided by for its row of x.
    accumulators: sums of 16 outputs that a tile may have.
    """

    layer: Layer
    table: Table
    divisor: int
    accumulators: int

    @property
    def clamp(self) -> Clamp | None:
        """How the gate is clamped; None: it is as the layer's activation says."""
        return None

    @property
    def linear(self) -> Linear:
        return self.layer if isinstance(self.layer, Linear) else self.layer.linear

    @property
    def tiles(self) -> tuple[Tiles, ...]:
        """The kinds of tiles, from few rows to most."""
        rows = self.table.rows
        return tuple(self.kind(size) for size in (*(size for size in SIZES if size < rows), rows))

    def kind(self, rows: int) -> Tiles:
        panels = plain.panels_of(rows, self.linear.parts, self.accumulators)
        if not isinstance(self.layer, Linear):
            return Tiles(rows, panels, self.steps, near=quant_linear.NEAR_LINES // panels)
        row_tiles = ceil(self.table.tokens / rows) if rows == self.table.rows else 1
        near, far = plain.ahead(rows * self.layer.words, panels, row_tiles)
        return Tiles(rows, panels, self.steps, near=near, far=far)

    @property
    def steps(self) -> int:
        """Steps of k, between which a tile's sums wait in scratch memory."""
        if not isinstance(self.layer, Linear) or self.table.tokens <= self.table.rows:
            return self.layer.steps
        chunks = ceil(PANELS_MULTIPLE * self.layer.steps * PANEL * 4 / CHUNK_BYTES)
        return ceil(self.layer.steps / chunks)

    @property
    def scratch_words(self) -> int:
        waiting = self.table.tiles_of_one if self.steps < self.layer.steps else 1
        return waiting * self.table.rows * PANELS_MULTIPLE * PANEL

    @property
    def blocks(self) -> int:
        """Units of work that an expert's weight is cut into."""
        return self.linear.panels // PANELS_MULTIPLE

    @property
    def packed_bytes(self) -> tuple[int, ...]:
        """Bytes of x as the tiles read it."""
        return self.layer.packed_bytes(self.table.tiles * self.table.rows)

    @property
    def name(self) -> str:
        layer = self.layer
        product = plain.product_name(layer) if isinstance(layer, Linear) else quant_linear.product_name(layer)
        return f"experts{self.table.experts}_{product}"


@dataclass(frozen=True)
class ClampedStage(Stage):
    """The first product, where its gate is clamped."""

    gate: Clamp

    @property
    def clamp(self) -> Clamp:
        return self.gate


@dataclass(frozen=True)
class Cut:
    """rows: the most of a tile."""

    rows: int

    def __str__(self) -> str:
        return f"tiles of up to {self.rows} rows"


def match(call: Call, target: Target) -> Cut | None:
    layers = parse(call, target)
    return Cut(min(call.outputs[0].shape[0], most_rows(layers[0], target))) if layers else None


def parse(call: Call, target: Target) -> tuple[Layer, Layer] | None:
    """The two products of all pairs, as if they were of one expert; None for what is no mixture of experts."""
    domain, _, name = call.op.rpartition(".")
    if domain != DOMAIN or name not in (*EXPERTS, *CLAMPED_EXPERTS):
        return None
    x, index, share, gate_up, down, *biases = call.inputs
    if not (x and index and share and gate_up and down and all(w and w.constant for w in (gate_up, down, *biases))):
        return None
    pairs = index.shape[0] * index.shape[1]
    gated = f"GatedLinear{EXPERTS.get(name, 'Silu')}"  # of clamped gates it is only the name
    both = (
        layer(f"{gated}{'Bias' * bool(biases)}", pairs, gate_up, target),
        layer(f"Linear{'Bias' * bool(biases)}", pairs, down, target),
    )
    return (both[0], both[1]) if both[0] and both[1] else None


def layer(op: str, pairs: int, weight: TensorType, target: Target) -> Layer | None:
    """A product of one expert's weight, of shape [E, rows, K]."""
    n_experts, rows, k = weight.shape
    one = replace(weight, shape=(rows, k))
    bias = (TensorType((rows,), "f32", constant=True),) * op.endswith("Bias")
    n = rows // 2 if op.startswith("Gated") else rows
    call = Call(f"{DOMAIN}.{op}", (TensorType((pairs, k), "f32"), one, *bias), (TensorType((pairs, n), "f32"),))
    found: Layer | None
    if weight.dtype in ("i8", "i4", "z4", "m4"):
        found = quant_linear.parse(call, target, weight.dtype)
    else:
        found = plain.parse(call, target)
    if found and n_experts * found.weight_bytes >= plain.MOST_WEIGHT_BYTES:
        size, most = n_experts * found.weight_bytes / 2**30, plain.MOST_WEIGHT_BYTES >> 30
        fact = f"a layer has experts whose weights of one kind take {size:.1f} GiB; less than {most} are compiled"
        raise LlmcError(fact, place=f"{op} {list(weight.shape)}", hint="--quant int8 and int4 make them smaller")
    return found


def accumulators(layer: Layer, target: Target) -> int:
    return plain.accumulators(target) if isinstance(layer, Linear) else quant_linear.accumulators(target)


def most_rows(gate_up: Layer, target: Target) -> int:
    """The most rows of a tile of two panels, a gate's and an up's."""
    return accumulators(gate_up, target) // 2


def implement(call: Call, cut: Cut, target: Target) -> Implementation:
    layers, (_, index, _, gate_up, *_) = parse(call, target), call.inputs
    assert layers is not None
    assert index is not None
    assert gate_up is not None
    tokens, chosen = index.shape
    table = Table(tokens, chosen, gate_up.shape[0], cut.rows)
    up = first_stage(call, layers[0], table, accumulators(layers[0], target))
    down = Stage(layers[1], table, 1, accumulators(layers[1], target))
    of_pairs = [4 * table.pairs * stage.linear.n for stage in (up, down)]
    temps = (4 * table.words, *up.packed_bytes, of_pairs[0], *down.packed_bytes, of_pairs[1])
    sorted_, *places = (Operand("temp", i) for i in range(len(temps)))
    n_packed = len(up.packed_bytes)
    x_up, inner, x_down, results = places[:n_packed], places[n_packed], places[n_packed + 1 : -1], places[-1]
    launches = (
        Launch(sort_kernel(table), (Operand("input", 1), sorted_)),
        pack_launch(up, Operand("input", 0), sorted_, x_up),
        product_launch(up, x_up, sorted_, weights(up, 3), inner),
        pack_launch(down, inner, sorted_, x_down),
        product_launch(down, x_down, sorted_, weights(down, 4), results),
        combine_launch(table, down.linear.n, results),
    )
    each: dict[int, Layout] = {3: layers[0].layout, 4: layers[1].layout}
    each |= {5: PanelVector(2), 6: PanelVector()} if up.linear.bias else {}
    layouts = {index: OfExperts(layout, table.experts) for index, layout in each.items()}
    family = "GEMV" if table.tokens == 1 else "grouped GEMM"
    return Implementation(launches, temps, 4 * max(up.scratch_words, down.scratch_words), layouts, family=family)


def first_stage(call: Call, gate_up: Layer, table: Table, accumulators: int) -> Stage:
    clamp = clamp_of(call)
    if clamp is None:
        return Stage(gate_up, table, table.chosen, accumulators)
    return ClampedStage(gate_up, table, table.chosen, accumulators, clamp)


def weights(stage: Stage, at: int) -> list[Operand]:
    """A product's weight, input `at` of the call, and its bias, which is two inputs behind."""
    return [Operand("input", at), *[Operand("input", at + 2)] * stage.linear.bias]


def expected_experts(table: Table) -> float:
    """How many experts have pairs, if each token chooses by chance."""
    return table.experts * (1 - (1 - table.chosen / table.experts) ** table.tokens)


def sort_kernel(table: Table) -> Kernel:
    return keyed_kernel(f"sort_pairs_{table.pairs}", partial(build_sort, table))


def pack_launch(stage: Stage, x: Operand, sorted_: Operand, packed: list[Operand]) -> Launch:
    kernel = keyed_kernel(f"pack_pairs_{stage.name}", partial(build_pack, stage))
    grid = stage.table.tiles * stage.layer.packing_blocks
    return Launch(kernel, (x, sorted_, *packed), grid, 8 * stage.table.pairs * stage.linear.k)


def product_launch(stage: Stage, x: list[Operand], sorted_: Operand, weights: list[Operand], y: Operand) -> Launch:
    layer, pairs = stage.linear, stage.table.pairs
    return Launch(
        keyed_kernel(stage.name, partial(build_product, stage)),
        (*x, sorted_, *weights, y, Operand("scratch")),
        stage.blocks * stage.table.active,
        round(expected_experts(stage.table) * stage.layer.weight_bytes) + 4 * pairs * (layer.k + layer.n),
        2 * pairs * layer.n * layer.parts * layer.k,
    )


def combine_launch(table: Table, n: int, results: Operand) -> Launch:
    return Launch(
        keyed_kernel(f"combine_pairs_m{table.tokens}_k{table.chosen}_n{n}", partial(build_combine, table, n)),
        (Operand("input", 2), results, Operand("output", 0)),
        table.tokens * ceil(n / COMBINE_COLUMNS),
        4 * n * (table.pairs + table.tokens),
        2 * n * table.pairs,
    )


def build_sort(table: Table) -> Any:
    from llmc.schedules.cpu.experts import sort  # TVM is imported only when something is compiled

    return sort.sort_function(table)


def build_pack(stage: Stage) -> Any:
    from llmc.schedules.cpu.experts import pack

    return pack.packing_function(stage)


def build_product(stage: Stage) -> Any:
    from llmc.schedules.cpu.experts import panel

    return panel.product_function(stage)


def build_combine(table: Table, n: int) -> Any:
    from llmc.schedules.cpu.experts import sort

    return sort.combine_function(table, n)


RULES = (Rule("experts", match, implement),)
