"""One vector for a text, on a GPU: that of its first token, or the mean over all of them (include/pool.cuh)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import ceil

from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, Operand, short_hash
from llmc.compiler.target import Target
from llmc.schedules.rule import Rule

KINDS = {"llmc.PoolMeanRows": "mean", "llmc.PoolFirstRows": "first"}
THREADS, COLUMNS = 512, 32
"""Threads of a block; columns of a block that makes a mean."""


@dataclass(frozen=True)
class Pool:
    """`rows` texts of a step of up to `tokens` rows of `columns` elements.  kind: "mean", or "first"."""

    rows: int
    tokens: int
    columns: int
    kind: str

    def __str__(self) -> str:
        return f"{THREADS} threads"

    @property
    def grid(self) -> int:
        if self.kind == "mean":
            return self.rows * ceil(self.columns / COLUMNS)
        return ceil(self.rows * self.columns / THREADS)

    @property
    def n_bytes(self) -> int:
        return 4 * self.columns * (self.rows + (self.tokens if self.kind == "mean" else self.rows))


def match(call: Call, target: Target) -> Pool | None:
    if call.op not in KINDS:
        return None
    x, _, rows = call.inputs
    assert x is not None, "its definition asks for it"
    assert rows is not None, "likewise"
    tokens, columns = x.shape
    return Pool(rows.shape[0], tokens, columns, KINDS[call.op])


def implement(call: Call, pool: Pool, target: Target) -> Implementation:
    key = f"pool_source({pool!r})"
    name = f"pool_{pool.kind}_{pool.rows}x{pool.columns}_{short_hash(key)}"
    kernel = Kernel(name, key, partial(pool_source, name, pool), n_threads=THREADS, dependent=True)
    operands = (*(Operand("input", index) for index in range(3)), Operand("output"))
    return Implementation((Launch(kernel, operands, pool.grid, pool.n_bytes),))


def pool_source(name: str, pool: Pool) -> str:
    """The kernel's CUDA C++."""
    return (
        '#include "pool.cuh"\n\n'
        "struct Pool {\n"
        f"    static constexpr int kRows = {pool.rows}, kColumns = {pool.columns};\n"
        "};\n\n"
        f'extern "C" __global__ void __launch_bounds__({THREADS})\n'
        f"{name}(const float *x, const int *positions, const int *rows, float *y) {{\n"
        f"    pool_{pool.kind}<Pool>(x, positions, rows, y);\n}}\n"
    )


RULES = (Rule("pool", match, implement),)
