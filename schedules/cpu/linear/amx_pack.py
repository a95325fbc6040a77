"""Rounding x to bf16 and laying it out in tiles: row-major f32 [M, K] -> [blocks][ceil(K/32)][rows][32] bf16.

    for (block, 512 columns) in parallel:                grid ceil(M / rows) * ceil(K / 512)
        for row in the block, 32 columns:
            32 floats -> 32 bf16, one cache line

so that what a block multiplies at a time is read front to back.  Bytes: 4 M K read, 2 M K written: nothing beside the
product.  Rows past M are left as they are (they end in rows of y that are never stored); columns past K are zero.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from llmc.schedules.cpu.lanes import AVX512_BF16, Lanes, share
from llmc.schedules.cpu.linear.amx_rule import TILE_K, TILE_WORDS
from llmc.schedules.cpu.linear.rule import PACKING_COLUMNS

WIDTH = 16
VECTOR, WORDS = Lanes(WIDTH), Lanes(WIDTH // 2)


def packing_function(m: int, k: int, rows: int) -> Any:
    """(x, packed, task, n_tasks)."""
    blocks, n_tiles = -(-m // rows), -(-k // TILE_K)
    parts = -(-k // PACKING_COLUMNS)
    a_part = PACKING_COLUMNS // TILE_K
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("pack")
        x = T.arg("x", T.buffer((m * k,), "float32"))
        packed = T.arg("packed", T.buffer((blocks * n_tiles * rows * TILE_WORDS,), "int32"))
        task, n_tasks = T.arg("task", T.int32()), T.arg("n_tasks", T.int32())

        def tile(start: Any, to: Any, columns: int) -> None:
            """Columns of one row to one row of a tile, zeros behind them."""
            for first in range(0, TILE_K, WIDTH):
                values = first_of(x, start + first, min(columns - first, WIDTH))
                rounded = T.call_extern("int32x8", "llmc_cvtbf16", values)
                WORDS.store(packed, to + first // 2, rounded)

        with T.attr(0, "pragma_import_llvm", AVX512_BF16), share(blocks * parts, task, n_tasks) as unit:
            block = T.bind(T.truncdiv(unit, parts))
            first_tile = T.bind(T.truncmod(unit, parts) * a_part)
            whole = T.bind(T.min(a_part, k // TILE_K - first_tile))
            with T.serial(T.min(rows, m - block * rows)) as row:
                start = T.bind((block * rows + row) * k)
                to = T.bind((block * n_tiles * rows + row) * TILE_WORDS)
                with T.serial(T.max(whole, 0)) as i:
                    at = T.bind(first_tile + i)
                    tile(start + at * TILE_K, to + at * rows * TILE_WORDS, TILE_K)
                if k % TILE_K:
                    with T.If(first_tile + a_part >= n_tiles), T.Then():
                        tile(start + (n_tiles - 1) * TILE_K, to + (n_tiles - 1) * rows * TILE_WORDS, k % TILE_K)
    return builder.get()


def first_of(x: Any, start: Any, columns: int) -> Any:
    """16 elements of x from `start` on: as many as there are columns, then zeros."""
    if columns == WIDTH:
        return VECTOR.keep(x[VECTOR.at(start)])
    vector = T.alloc_buffer((WIDTH,), "float32")
    VECTOR.store(vector, 0, VECTOR.all(0.0))
    for i in range(columns):
        T.buffer_store(vector, x[start + i], [i])
    return vector[VECTOR.at(0)]
