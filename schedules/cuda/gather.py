"""Rows of a table, by number, on a GPU: include/gather.cuh.

A table stays as it is stored; the result is float32 row-major, or tiles of the dtype that a product wants.  Several
tables (compiler/ops/gather.py) are one launch, of as many blocks as they have together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from math import ceil, prod

from llmc.compiler.kernel import (
    DTYPE_BYTES,
    TILE_COLUMNS,
    Call,
    Implementation,
    Kernel,
    Launch,
    Operand,
    TensorType,
    short_hash,
)
from llmc.compiler.ops import GATHERS
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
    return gather_of(table, index, call.outputs[0])


def gather_of(table: TensorType | None, index: TensorType | None, result: TensorType) -> Gather | None:
    if table is None or index is None or index.dtype not in INDICES or table.tiled or result.dtype not in C_TYPES:
        return None
    if table.dtype not in ("f32", "bf16", "f16") or (table.dtype != "f32" and not table.constant) or not table.shape:
        return None
    columns = prod(table.shape[1:])
    return Gather(prod(index.shape), columns, table.shape[0], table.dtype, result.dtype, result.tiled, index.dtype)


def match_several(call: Call, target: Target) -> tuple[Gather, ...] | None:
    if call.op.removeprefix("llmc.") not in GATHERS:
        return None
    found = tuple(map(gather_of, call.inputs[::2], call.inputs[1::2], call.outputs))
    return tuple(filter(None, found)) if all(found) else None


def implement(call: Call, gather: Gather, target: Target) -> Implementation:
    key = f"gather_source({gather!r}{', i64' if gather.index == 'i64' else ''})"
    name = f"gather_{gather.table}_{gather.rows}x{gather.columns}_{short_hash(key)}"
    kernel = Kernel(name, key, partial(gather_source, name, gather), n_threads=THREADS, dependent=True)
    n_bytes = moved(gather)
    operands = (Operand("input", 0), Operand("input", 1), Operand("output", 0))
    return Implementation((Launch(kernel, operands, gather.grid, n_bytes),))


def implement_several(call: Call, gathers: tuple[Gather, ...], target: Target) -> Implementation:
    key = f"gathers_source({', '.join(f'{gather!r} {gather.index}' for gather in gathers)})"
    name = f"gather_{len(gathers)}x{gathers[0].rows}_{short_hash(key)}"
    kernel = Kernel(name, key, partial(gathers_source, name, gathers), n_threads=THREADS, dependent=True)
    operands = [
        operand
        for i in range(len(gathers))
        for operand in (Operand("input", 2 * i), Operand("input", 2 * i + 1), Operand("output", i))
    ]
    grid, n_bytes = sum(gather.grid for gather in gathers), sum(map(moved, gathers))
    return Implementation((Launch(kernel, tuple(operands), grid, n_bytes),))


def moved(gather: Gather) -> int:
    """Bytes that it reads and writes."""
    return gather.rows * gather.columns * (DTYPE_BYTES[gather.table] + DTYPE_BYTES[gather.result])


def gather_source(name: str, gather: Gather) -> str:
    table, result = C_TYPES[gather.table], C_TYPES[gather.result]
    shape = shape_of(gather)
    return (
        '#include "gather.cuh"\n\n'
        f'extern "C" __global__ void __launch_bounds__({THREADS})\n'
        f"{name}(const {table} *table, const {INDICES[gather.index]} *index, {result} *y) {{\n"
        f"    gather<{shape}>(table, index, y);\n}}\n"
    )


def gathers_source(name: str, gathers: tuple[Gather, ...]) -> str:
    parameters, lines, first = [], [], 0
    for i, gather in enumerate(gathers):
        table, result = C_TYPES[gather.table], C_TYPES[gather.result]
        parameters.append(f"const {table} *table_{i}, const {INDICES[gather.index]} *index_{i}, {result} *y_{i}")
        block = f"int(blockIdx.x) - {first}"
        first += gather.grid
        work = f"gather_block<{shape_of(gather)}>(table_{i}, index_{i}, y_{i}, {block})"
        lines.append(f"    if (blockIdx.x < {first}) return {work};\n")
    return (
        '#include "gather.cuh"\n\n'
        f'extern "C" __global__ void __launch_bounds__({THREADS})\n'
        f"{name}({', '.join(parameters)}) {{\n    wait_for_previous();\n    let_next_start();\n{''.join(lines)}}}\n"
    )


def shape_of(gather: Gather) -> str:
    return f"GatherShape<{gather.rows}, {gather.columns}, {gather.entries}, {str(gather.tiled).lower()}>"


RULES = (Rule("gather", match, implement), Rule("gather_together", match_several, implement_several))
