"""Rows of a table, by number, on a GPU: include/gather.cuh.

A table stays as it is stored; the result is float32 row-major, or tiles of the dtype that a product wants.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from math import ceil, prod

from llmc.compiler.kernel import DTYPE_BYTES, TILE_COLUMNS, Call, Implementation, Kernel, Launch, Operand, short_hash
from llmc.compiler.target import Target
from llmc.schedules.cuda.source import C_TYPES
from llmc.schedules.rule import Rule

THREADS, CHUNK = 256, 8
INDICES = {"i32": "int", "i64": "int64_t"}


@dataclass(frozen=True)
class Gather:
    """`rows` rows of `columns` elements out of `entries`.  table, result, index: element types."""

    rows: int
    columns: int
    entries: int
    table: str
    result: str
    tiled: bool
    index: str = field(default="i32", repr=False)

    def __str__(self) -> str:
        return f"{THREADS} threads"

    @property
    def grid(self) -> int:
        columns = ceil(self.columns / TILE_COLUMNS) * TILE_COLUMNS if self.tiled else self.columns
        return ceil(self.rows * ceil(columns / CHUNK) / THREADS)


def match(call: Call, target: Target) -> Gather | None:
    if call.op != "Gather" or call.attribute("axis", 0) != 0:
        return None
    table, index = call.inputs
    result = call.outputs[0]
    if table is None or index is None or index.dtype not in INDICES or table.tiled or result.dtype not in C_TYPES:
        return None
    if table.dtype not in ("f32", "bf16", "f16") or (table.dtype != "f32" and not table.constant) or not table.shape:
        return None
    columns = prod(table.shape[1:])
    return Gather(prod(index.shape), columns, table.shape[0], table.dtype, result.dtype, result.tiled, index.dtype)


def implement(call: Call, gather: Gather, target: Target) -> Implementation:
    key = f"gather_source({gather!r}{', i64' if gather.index == 'i64' else ''})"
    name = f"gather_{gather.table}_{gather.rows}x{gather.columns}_{short_hash(key)}"
    kernel = Kernel(name, key, partial(gather_source, name, gather), n_threads=THREADS, dependent=True)
    n_bytes = gather.rows * gather.columns * (DTYPE_BYTES[gather.table] + DTYPE_BYTES[gather.result])
    operands = (Operand("input", 0), Operand("input", 1), Operand("output", 0))
    return Implementation((Launch(kernel, operands, gather.grid, n_bytes),))


def gather_source(name: str, gather: Gather) -> str:
    table, result = C_TYPES[gather.table], C_TYPES[gather.result]
    shape = f"GatherShape<{gather.rows}, {gather.columns}, {gather.entries}, {str(gather.tiled).lower()}>"
    return (
        '#include "gather.cuh"\n\n'
        f'extern "C" __global__ void __launch_bounds__({THREADS})\n'
        f"{name}(const {table} *table, const {INDICES[gather.index]} *index, {result} *y) {{\n"
        f"    gather<{shape}>(table, index, y);\n}}\n"
    )


RULES = (Rule("gather", match, implement),)
