"""The kernel of pool.py."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from llmc.schedules.cpu.lanes import share, widest
from llmc.schedules.cpu.pool import BLOCK, Pool


def pool_kernel(pool: Pool) -> Any:
    """(x, positions, rows, y, task, n_tasks).  A vector of y is a sum over tokens in order, whoever works it out."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("pool")
        v = widest(pool.columns, pool.lanes)
        x = T.arg("x", T.buffer((pool.tokens * pool.columns,), "float32"))
        positions = T.arg("positions", T.buffer((pool.tokens,), "int32"))
        rows = T.arg("rows", T.buffer((pool.rows,), "int32"))
        y = T.arg("y", T.buffer((pool.rows * pool.columns,), "float32"))
        task, n_tasks = T.arg("task", T.int32()), T.arg("n_tasks", T.int32())
        with share(pool.rows * pool.blocks, task, n_tasks) as unit:
            index, block = T.bind(T.truncdiv(unit, pool.blocks)), T.bind(T.truncmod(unit, pool.blocks))
            last = T.bind(rows[index])
            before = T.bind(T.max(positions[last], 0))
            n = T.bind(T.truncdiv(T.min(pool.columns - block * BLOCK, BLOCK), v.n))
            with T.serial(n) as i:
                column = T.bind(block * BLOCK + i * v.n)
                at = T.bind((last - before) * pool.columns + column)
                if not pool.mean:
                    v.store(y, index * pool.columns + column, v.load(x, at))
                else:
                    total = T.alloc_buffer((v.n,), "float32")
                    v.store(total, 0, v.load(x, at))
                    with T.serial(before) as token:
                        v.store(total, 0, total[v.at(0)] + v.load(x, at + (token + 1) * pool.columns))
                    count = v.all(T.cast(before + 1, "float32"))
                    v.store(y, index * pool.columns + column, total[v.at(0)] / count)
    return builder.get()
