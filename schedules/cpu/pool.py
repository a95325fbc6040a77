"""One vector of a text out of those of its tokens: of the first, or the mean of all.

    for (row, block of columns) in parallel:        grid R * ceil(K / 64)
        y = x[row - position]                        PoolFirstRows
        y = sum of x[row - position .. row] / count  PoolMeanRows: a sum over the tokens in order

Reads 4 K bytes a token of the text, and writes 4 K a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, Operand, short_hash
from llmc.compiler.target import Target
from llmc.schedules.rule import Rule

BLOCK = 64
"""Columns of a unit of work."""


@dataclass(frozen=True)
class Pool:
    """`rows` texts of a step of up to `tokens` rows of `columns` elements; their means, or their first tokens."""

    rows: int
    tokens: int
    columns: int
    mean: bool
    lanes: int

    def __str__(self) -> str:
        return f"{self.lanes} lanes"

    @property
    def blocks(self) -> int:
        return -(-self.columns // BLOCK)


def match(call: Call, target: Target) -> Pool | None:
    if call.op not in ("llmc.PoolMeanRows", "llmc.PoolFirstRows"):
        return None
    x, _, rows = call.inputs
    assert x is not None
    assert rows is not None
    tokens, columns = x.shape
    return Pool(rows.shape[0], tokens, columns, call.op == "llmc.PoolMeanRows", target.lanes)


def implement(call: Call, pool: Pool, target: Target) -> Implementation:
    key = f"build_pool({pool!r})"
    name = f"pool_{'mean' if pool.mean else 'first'}_{pool.rows}x{pool.columns}_{short_hash(key)}"
    operands = (*(Operand("input", at) for at in range(3)), Operand("output", 0))
    n_read = pool.tokens if pool.mean else pool.rows
    n_bytes = 4 * pool.columns * (n_read + pool.rows)
    launch = Launch(Kernel(name, key, partial(build_pool, pool)), operands, pool.rows * pool.blocks, n_bytes)
    return Implementation((launch,))


def build_pool(pool: Pool) -> Any:
    from llmc.schedules.cpu import pool_kernels  # TVM is imported only when something is compiled

    return pool_kernels.pool_kernel(pool)


RULES = (Rule("pool", match, implement),)
