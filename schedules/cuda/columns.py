"""Columns of rows, moved, on a GPU (schedules/columns_call.py): a thread for each element of each piece.

Reads and writes each element once: memory is the limit.
"""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from math import ceil

from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, Operand, short_hash
from llmc.compiler.target import Target
from llmc.schedules.columns_call import Columns, columns_of
from llmc.schedules.rule import Rule

THREADS = 256


def match(call: Call, target: Target) -> Columns | None:
    return columns_of(call)


def implement(call: Call, columns: Columns, target: Target) -> Implementation:
    key = f"columns_source({columns!r})"
    name = f"columns_{columns.rows}x{sum(columns.operands)}_{short_hash(key)}"
    kernel = Kernel(name, key, partial(columns_source, name, columns), n_threads=THREADS, dependent=True)
    n = columns.rows * sum(n for *_, n in columns.pieces)
    operands = [Operand("input", i) for i in range(len(columns.operands))]
    results = [Operand("output", o) for o in range(len(columns.results))]
    return Implementation((Launch(kernel, (*operands, *results), ceil(n / THREADS), 8 * n),))


def columns_source(name: str, columns: Columns) -> str:
    """Thread i has column i % N of row i / N, of all N columns of the pieces, one after the other."""
    total = sum(n for *_, n in columns.pieces)
    parameters = [f"const float *x{i}" for i in range(len(columns.operands))]
    parameters += [f"float *y{o}" for o in range(len(columns.results))]
    starts = accumulate((n for *_, n in columns.pieces[:-1]), initial=0)
    moves = [
        f"    if (c >= {start} && c < {start + n}) y{o}[row * {columns.results[o]} + {to} + c - {start}] = "
        f"x{i}[row * {columns.operands[i]} + {first} + c - {start}];\n"
        for start, (i, first, o, to, n) in zip(starts, columns.pieces, strict=True)
    ]
    return (
        '#include "device.cuh"\n\n'
        f'extern "C" __global__ void __launch_bounds__({THREADS}) {name}({", ".join(parameters)}) {{\n'
        "    wait_for_previous();\n"
        "    let_next_start();\n"
        f"    const int i = blockIdx.x * {THREADS} + threadIdx.x, c = i % {total};\n"
        f"    const int64_t row = i / {total};\n"
        f"    if (row >= {columns.rows}) return;\n"
        f"{''.join(moves)}}}\n"
    )


RULES = (Rule("columns", match, implement),)
