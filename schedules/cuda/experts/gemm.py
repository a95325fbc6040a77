"""Mixtures of experts on a GPU, for every M: pairs of a token and an expert, sorted, and two grouped products.

    sort     pairs by expert into tiles of up to `rows` pairs of one expert, in one block     include/experts_table.cuh
    pack     the tiles' rows of x, rounded, as a product wants them                           include/experts_rows.cuh
    gate_up  the gated product of each tile with its expert's weight                          include/experts_gemm.cuh
    down     the second product, each pair's result to a row of its own
    combine  y[m] = Σ_j share[m, j] · result[m k + j], j in order                             include/experts_rows.cuh

The products are those of linear/gemm.py: by `wgmma` on Hopper, by `mma.sync` elsewhere, tiles and rings as they are.
Grids are as large as any choice of experts may need; blocks for which there is no tile leave.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, exp, lgamma, log

from llmc.compiler.kernel import Implementation, Kernel, Launch, Operand, TensorType
from llmc.compiler.target import Target
from llmc.schedules.cuda.experts import call as of
from llmc.schedules.cuda.experts.call import ExpertsOp
from llmc.schedules.cuda.linear.call import LinearOp
from llmc.schedules.cuda.linear.gemm import kernel_of, layer_source
from llmc.schedules.cuda.linear.gemm_tiles import DEVICES, MMA_TOKENS, Device, Tiling, step_bytes, steps, x_bytes
from llmc.schedules.cuda.source import C_TYPES

ROWS = (16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Rows of a tile of pairs, where `wgmma` multiplies; `mma.sync` takes MMA_TOKENS."""
PACK_THREADS, PACK_COLUMNS = 256, 8
"""The same as in include/experts_rows.cuh."""
MOST_SORT_WARPS, SORTED_TOGETHER, MOST_COUNTS = 16, 128, 10_000
"""Warps that sort, pairs for which one more is worth it, and counters that fit shared memory: of each an expert's."""
END_US = 2.0
"""What the end of a tile of 128 x 128 takes, on which its sums go out.  A 128 x 256 one took an H200 4.4 µs."""


@dataclass(frozen=True)
class Grouped:
    """rows: pairs of a tile.  stages: of the rings of both products."""

    rows: int
    stages: tuple[int, int]

    def __str__(self) -> str:
        return f"tiles of up to {self.rows} rows, {self.stages[0]} and {self.stages[1]} stages"


@dataclass(frozen=True)
class Table:
    """Sizes of include/experts_table.cuh's."""

    op: ExpertsOp
    rows: int

    @property
    def tiles(self) -> int:
        """The most there can be, whatever the router says: all but one of each expert's are full."""
        return min(self.op.pairs, self.op.pairs // self.rows + self.op.active)

    @property
    def all_rows(self) -> int:
        return self.tiles * self.rows

    @property
    def n_bytes(self) -> int:
        return 4 * (1 + self.tiles + self.all_rows + self.op.pairs)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the table in the shared memory of a product's block, in front of what begins where a swizzle
        does."""
        return ceil(4 * (1 + self.tiles) / 1024) * 1024

    @property
    def c_type(self) -> str:
        return f"PairTable<{self.op.tokens}, {self.op.chosen}, {self.op.n_experts}, {self.rows}>"


def space(op: ExpertsOp, target: Target) -> list[Grouped]:
    """Cuts worth measuring, the best on paper first."""
    device = DEVICES[target.arch]
    widths = ROWS if device.wgmma else MMA_TOKENS
    found = [cut for rows in widths if (cut := cut_of(op, rows, device))]
    return sorted(found, key=lambda cut: (cost_us(op, cut, device), cut.rows))


def cut_of(op: ExpertsOp, rows: int, device: Device) -> Grouped | None:
    """The cut with as many stages as there is room for; None if rings do not fit."""
    table = Table(op, rows)
    up, down = (stages_of(product, table, device) for product in products(op, rows))
    return Grouped(rows, (up, down)) if min(up, down) >= 2 else None


def products(op: ExpertsOp, rows: int) -> tuple[LinearOp, LinearOp]:
    all_rows = Table(op, rows).all_rows
    return op.gate_up(all_rows), op.down(all_rows)


def stages_of(product: LinearOp, table: Table, device: Device) -> int:
    room = device.shared_bytes - table.kept_bytes
    rings = (stages for stages in range(8, 1, -1) if Tiling(table.rows, stages, 1).shared_bytes(product) <= room)
    return next(rings, 0)


def cost_us(op: ExpertsOp, cut: Grouped, device: Device) -> float:
    """What both products take on paper: tiles in rounds, each the slower of its products and its bytes from L2; not
    less than what memory takes for the experts that are expected to have pairs."""
    n_tiles = expected_tiles(op, cut.rows)
    total = 0.0
    for product in products(op, cut.rows):
        tiles = n_tiles * Tiling(cut.rows, 2, 1).row_tiles(product)
        multiply = 2 * 128 * max(cut.rows, 32) * 64 / (device.operations / device.n_blocks)
        fetch = (step_bytes(product) + x_bytes(cut.rows)) / (device.l2 / device.n_blocks)
        each = steps(product) * max(multiply, fetch) + END_US * cut.rows / 128
        memory = op.expected * of.expert_bytes(product) / device.memory
        total += max(ceil(tiles / device.n_blocks) * each, memory)
    return round(total, 1)


@functools.lru_cache(maxsize=1024)
def expected_tiles(op: ExpertsOp, rows: int) -> float:
    """How many tiles there are, if each token chooses by chance: binomial numbers of pairs, rounded up."""
    n, p = op.tokens, op.chosen / op.n_experts
    if p >= 1:
        return op.n_experts * ceil(n / rows)

    def chance(count: int) -> float:
        ways = lgamma(n + 1) - lgamma(count + 1) - lgamma(n - count + 1)
        return exp(ways + count * log(p) + (n - count) * log(1 - p))

    return op.n_experts * sum(chance(count) * ceil(count / rows) for count in range(1, n + 1))


# -- launches ------------------------------------------------------------------------------------------------------


def implement(op: ExpertsOp, cut: Grouped, target: Target) -> Implementation:
    table, (up, down) = Table(op, cut.rows), products(op, cut.rows)
    packed, inner = (TensorType((table.all_rows, k), op.element, tiled=True).n_bytes for k in (op.k, op.n))
    temps = (table.n_bytes, packed, inner, 4 * table.all_rows * op.k)
    sorted_, x, between, results = (Operand("temp", i) for i in range(4))
    index, share, y = Operand("input", of.INDEX), Operand("input", of.SHARE), Operand("output", 0)
    chunks = ceil(op.k / 64) * 8
    launches = (
        Launch(sort_kernel(table), (index, sorted_)),
        Launch(
            pack_kernel(table),
            (Operand("input", of.X), sorted_, x),
            ceil(table.all_rows * chunks / PACK_THREADS),
            6 * op.pairs * op.k,
        ),
        product_launch(op, up, table, cut.stages[0], (x, *weights(op, of.GATE_UP), between, sorted_), target),
        product_launch(op, down, table, cut.stages[1], (between, *weights(op, of.DOWN), results, sorted_), target),
        Launch(
            combine_kernel(table),
            (share, results, sorted_, *[Operand("input", op.residual_input)] * op.residual, y),
            ceil(op.tokens * ceil(op.k / PACK_COLUMNS) / PACK_THREADS),
            4 * op.k * (op.pairs + op.tokens),
            2 * op.k * op.pairs,
        ),
    )
    return Implementation(launches, temps, layouts=of.layouts(op), family="grouped GEMM")


def weights(op: ExpertsOp, at: int) -> list[Operand]:
    """A product's weight, input `at` of the call, and its bias."""
    return [Operand("input", index) for index in (at, *op.bias_inputs[at - of.GATE_UP :][:1])]


def sort_kernel(table: Table) -> Kernel:
    most = min(MOST_SORT_WARPS, max(1, MOST_COUNTS // table.op.n_experts))
    warps = min(most, ceil(table.op.pairs / SORTED_TOGETHER))
    return kernel_of(
        f"sort_pairs_{table.op.words}",
        "experts_table.cuh",
        "",
        "const long long *index, int *table",
        f"sort_pairs<{table.c_type}, {warps}>(index, table);",
        32 * warps,
        0,
    )


def pack_kernel(table: Table) -> Kernel:
    parameters = f"const float *x, const int *table, {C_TYPES[table.op.element]} *packed"
    return rows_kernel("pack_pairs", table, parameters, "x, table, packed")


def combine_kernel(table: Table) -> Kernel:
    parameter, residual = ("const float *residual, ", "residual") if table.op.residual else ("", "nullptr")
    parameters = f"const float *share, const float *results, const int *table, {parameter}float *y"
    return rows_kernel("combine_pairs", table, parameters, f"share, results, table, {residual}, y")


def rows_kernel(function: str, table: Table, parameters: str, arguments: str) -> Kernel:
    body = f"{function}<{table.c_type}, {table.op.k}>({arguments});"
    name = f"{function}_{table.op.words}_k{table.op.k}"
    return kernel_of(name, "experts_rows.cuh", "", parameters, body, PACK_THREADS, 0)


def product_launch(
    op: ExpertsOp, product: LinearOp, table: Table, stages: int, operands: Iterable[Operand], target: Target
) -> Launch:
    """operands: x, the weight and its bias, y, the table."""
    tiling = Tiling(table.rows, stages, DEVICES[target.arch].n_blocks)
    n_blocks = min(tiling.blocks, table.tiles * tiling.row_tiles(product))
    n_bytes = round(op.expected * of.expert_bytes(product))
    n_bytes += op.pairs * (2 * product.k + product.n * (2 if product.tiled_y else 4))
    n_operations = 2 * op.pairs * product.rows * product.k
    kernel = product_kernel(op, product, table, stages, n_blocks, target)
    return Launch(kernel, tuple(operands), n_blocks, n_bytes, n_operations)


def product_kernel(
    op: ExpertsOp, product: LinearOp, table: Table, stages: int, n_blocks: int, target: Target
) -> Kernel:
    by_wgmma = DEVICES[target.arch].wgmma
    kind, n_threads = ("Wgmma", 384) if by_wgmma else ("Mma", 256)
    function = f"gemm_{kind.lower()}{'_codes' if by_wgmma and product.weight != op.element else ''}"
    shared_bytes = Tiling(table.rows, stages, 1).shared_bytes(product)
    element, y = C_TYPES[op.element], C_TYPES[op.element] if product.tiled_y else "float"
    cut = f"ExpertsTiling<Layer, {table.c_type}, {stages}, {n_blocks}, {of.expert_bytes(product)}>"
    bias = "bias" if op.biased else "nullptr"
    declarations = (
        f'#include "experts_gemm.cuh"\n\n{layer_source(product, op.members * product.gated)}using Cut = {cut};\n'
        f'static_assert(sizeof({kind}Shared<Cut>) <= {shared_bytes}, "the launch asks for enough");\n\n'
    )
    return kernel_of(
        f"experts_{product.weight}_{product.words}_{op.words}",
        f"{function}.cuh",
        declarations,
        f"const {element} *x, const void *weight, {'const float *bias, ' * op.biased}{y} *y, const int *table",
        f"Cut::read(table);\n    {function}<Cut>(x, weight, Epilogue<Layer>{{{bias}, nullptr, y}}, nullptr, nullptr);",
        n_threads,
        shared_bytes,
    )
