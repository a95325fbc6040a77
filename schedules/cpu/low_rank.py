"""What tokens' adapters add to a product, in place or on the way through its gate: llmc.LowRank….

    1  thin[c][m] = A_e[:, chunk c of k] x[m, chunk c]           grid: rows by blocks of the rank by chunks of k
    2  y[m] += B_e (thin[0][m] + thin[1][m] + …)                 grid: rows by groups of columns
       or  out[m] = act(gate) · up of that sum's halves

e = adapters[m]; a row without one (-1) costs a look at that number, and in the gate what a product's own epilogue
costs (low_rank_kernels.py).  Rows come in fours, which read A and B once where all four have the same adapter; whether
they do or not, each output is one sum in one order.

Bytes: A and B of each adapter that a row has, 2 (P·r K + N r) in bf16, and the rows of x and y, which caches hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import ceil, gcd, prod
from typing import Any

import numpy as np

from llmc.compiler.kernel import (
    DTYPE_BYTES,
    Call,
    DType,
    Implementation,
    Kernel,
    Launch,
    Operand,
    numpy_dtype,
    short_hash,
)
from llmc.compiler.ops import DOMAIN, LOW_RANKS
from llmc.compiler.target import Target
from llmc.schedules.rule import Rule

OPERATORS = {
    f"{DOMAIN}.{name}": parts.activation for name, parts in LOW_RANKS.items() if not parts.norm and not parts.strips
}
BLOCK = 16
"""Outputs that lie side by side, at most: one vector."""
ROWS = 4
CHUNK = 512
"""Elements of k that are added up before the next ones are begun."""
GROUP = 16
"""Blocks of columns in a unit of work."""

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Blocks:
    """A matrix [E, rows, columns] with `block` rows side by side: [E][rows / block][columns][block]."""

    dtype: DType
    block: int

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        return prod(shape) * DTYPE_BYTES[self.dtype]

    def pack(self, array: Array) -> Array:
        n_adapters, n_rows, n_columns = array.shape
        blocks = array.reshape(n_adapters, n_rows // self.block, self.block, n_columns).swapaxes(2, 3)
        return np.ascontiguousarray(blocks, numpy_dtype(self.dtype))

    def __str__(self) -> str:
        return f"{self.dtype} [E][N/{self.block}][K][{self.block}]"


@dataclass(frozen=True)
class LowRank:
    """x [m, k], a [adapters, parts · rank, k], b [adapters, n, rank]; sizes: columns of each part; activation: of the
    gate, "" for none; dtype: of a and b."""

    m: int
    n: int
    k: int
    adapters: int
    rank: int
    sizes: tuple[int, ...]
    activation: str
    dtype: DType

    def __str__(self) -> str:
        return f"rows by {self.rows}"

    @property
    def rows(self) -> int:
        """That are computed together."""
        return min(ROWS, self.m)

    @property
    def row_blocks(self) -> int:
        return ceil(self.m / self.rows)

    @property
    def ranks(self) -> int:
        """Of all parts."""
        return len(self.sizes) * self.rank

    @property
    def rank_block(self) -> int:
        return gcd(BLOCK, self.ranks)

    @property
    def chunks(self) -> int:
        return ceil(self.k / CHUNK)

    @property
    def results(self) -> int:
        """Columns of the result."""
        return self.n // 2 if self.activation else self.n

    @property
    def column_block(self) -> int:
        return gcd(BLOCK, self.results, *self.sizes)

    @property
    def column_groups(self) -> int:
        return ceil(self.results / self.column_block / GROUP)


def match(call: Call, target: Target) -> LowRank | None:
    if call.op not in OPERATORS:
        return None
    y, x, _, a, b, _ = call.inputs
    sizes = call.attribute("input.5")
    if y is None or x is None or a is None or b is None or sizes is None or a.dtype not in ("f32", "bf16"):
        return None
    (m, n), (n_adapters, _, k), rank = y.shape, a.shape, b.shape[2]
    return LowRank(m, n, k, n_adapters, rank, tuple(sizes), OPERATORS[call.op], a.dtype)


def implement(call: Call, low: LowRank, target: Target) -> Implementation:
    y, x, adapters, a, b = (Operand("input", index) for index in range(5))
    thin, result = Operand("temp", 0), Operand("output", 0)
    ups = (thin, adapters, b, *((y, result) if low.activation else (result,)), Operand("scratch"))
    blocks = low.ranks // low.rank_block
    launches = (
        launch(low, "down", (x, adapters, a, thin), low.row_blocks * blocks * low.chunks, low.k * low.ranks),
        launch(low, "up", ups, low.row_blocks * low.column_groups, low.n * low.rank),
    )
    layouts = {3: Blocks(low.dtype, low.rank_block), 4: Blocks(low.dtype, low.column_block)}
    temps = (4 * low.chunks * low.m * low.ranks,)
    return Implementation(launches, temps, 4 * low.rows * low.ranks, layouts)


def launch(low: LowRank, which: str, operands: tuple[Operand, ...], grid: int, n_elements: int) -> Launch:
    """One of the two kernels.  n_elements: of one adapter's matrix; each is multiplied once a row."""
    key = f"build_low_rank({low!r}, {which!r})"
    size = low.k if which == "down" else low.n
    name = f"low_rank_{which}_{low.m}x{size}x{low.ranks}_{short_hash(key)}"
    kernel = Kernel(name, key, partial(build_low_rank, low, which))
    return Launch(kernel, operands, grid, DTYPE_BYTES[low.dtype] * n_elements, 2 * low.m * n_elements)


def build_low_rank(low: LowRank, which: str) -> Any:
    from llmc.schedules.cpu import low_rank_kernels  # TVM is imported only when something is compiled

    return low_rank_kernels.down_kernel(low) if which == "down" else low_rank_kernels.up_kernel(low)


RULES = (Rule("low_rank", match, implement),)
