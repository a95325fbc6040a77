"""Kernels that take one row at a time: norms, gathers, and columns that are moved.

A sum over a row is kept in SUMS vectors, element i in vector i / lanes % SUMS, which are added up in order and then
across lanes: the same order for every number of rows.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from llmc.compiler.kernel import DTYPE_BYTES
from llmc.compiler.ops import N_TURNS
from llmc.schedules.columns_call import Columns
from llmc.schedules.cpu.gather import Gather
from llmc.schedules.cpu.given import Given
from llmc.schedules.cpu.lanes import Lanes, share, widest
from llmc.schedules.cpu.linear.panel_layout import PANEL, panel_count
from llmc.schedules.cpu.linear.quant_layout import ZERO
from llmc.schedules.cpu.norm import Norm
from llmc.schedules.cpu.query_key_norm import QueryKeyNorm
from llmc.schedules.cpu.turned import Turned

SUMS = 4


def norm_kernel(norm: Norm) -> Any:
    """(x, [residual,] weight, [bias,] [sum,] y, task, n_tasks).

    for row in parallel:
        s = x + residual, kept as the first result          (where there is an addition)
        y = (s - mean) / sqrt(mean of squares + e) · weight + bias
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("norm")
        whole, v = norm.rows * norm.columns, widest(norm.columns, norm.lanes)

        def argument(name: str, size: int) -> Any:
            return T.arg(name, T.buffer((size,), "float32"))

        x = argument("x", whole)
        residual = argument("residual", whole) if norm.adds else None
        weight = argument("weight", norm.columns)
        bias = argument("bias", norm.columns) if norm.bias else None
        total = argument("sum", whole) if norm.adds else x
        y = argument("y", whole)
        task, n_tasks = T.arg("task", T.int32()), T.arg("n_tasks", T.int32())
        with share(norm.rows, task, n_tasks) as row:
            start = T.bind(row * norm.columns)
            if norm.adds:
                with T.serial(norm.columns // v.n) as i:
                    v.store(total, start + i * v.n, v.load(x, start + i * v.n) + v.load(residual, start + i * v.n))
            mean = None
            if norm.centred:
                mean = row_mean(v, total, start, norm.columns, lambda value, partial: partial + value)
            square = row_mean(v, total, start, norm.columns, lambda value, p: v.fma(value, value, p), mean)
            factor = v.keep(v.all(1.0) / T.sqrt(square + v.all(norm.epsilon)))
            with T.serial(norm.columns // v.n) as i:
                value = v.load(total, start + i * v.n)
                value = (value - mean if norm.centred else value) * factor
                if norm.bias:
                    value = v.fma(value, v.load(weight, i * v.n), v.load(bias, i * v.n))
                else:
                    value = value * v.load(weight, i * v.n)
                v.store(y, start + i * v.n, value)
    return builder.get()


def query_key_norm_kernel(norm: QueryKeyNorm) -> Any:
    """(qkv, query_norm, key_norm, y, task, n_tasks): the first two parts of each row normalised, the rest as it is."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("query_key_norm")
        sizes = (norm.rows * norm.columns, norm.queries, norm.keys, norm.rows * norm.columns)
        names = ("qkv", "query_norm", "key_norm", "y")
        x, *weights, y = (T.arg(name, T.buffer((n,), "float32")) for name, n in zip(names, sizes, strict=True))
        task, n_tasks = T.arg("task", T.int32()), T.arg("n_tasks", T.int32())
        with share(norm.rows, task, n_tasks) as row:
            begin = 0
            for weight, columns in zip(weights, (norm.queries, norm.keys), strict=True):
                start, v = T.bind(row * norm.columns + begin), widest(columns, norm.lanes)
                square = row_mean(v, x, start, columns, lambda value, p, v=v: v.fma(value, value, p))
                factor = v.keep(v.all(1.0) / T.sqrt(square + v.all(norm.epsilon)))
                with T.serial(columns // v.n) as i:
                    value = v.load(x, start + i * v.n) * factor * v.load(weight, i * v.n)
                    v.store(y, start + i * v.n, value)
                begin += columns
            start, v = T.bind(row * norm.columns + begin), widest(norm.columns - begin, norm.lanes)
            with T.serial((norm.columns - begin) // v.n) as i:
                v.store(y, start + i * v.n, v.load(x, start + i * v.n))
    return builder.get()


def row_mean(v: Lanes, source: Any, start: Any, columns: int, add: Any, mean: Any = None) -> Any:
    """The mean of a row's elements (less `mean`), each brought in by `add(value, sum so far)`, in every lane."""
    n_sums = next(n for n in (SUMS, 2, 1) if columns // v.n % n == 0)
    sums = [T.alloc_buffer((v.n,), "float32") for _ in range(n_sums)]
    for partial in sums:
        v.store(partial, 0, v.all(0.0))
    with T.serial(columns // (v.n * n_sums)) as i:
        for j, partial in enumerate(sums):
            value = v.load(source, start + (i * n_sums + j) * v.n)
            if mean is not None:
                value = v.keep(value - mean)
            v.store(partial, 0, add(value, partial[v.at(0)]))
    total = sums[0][v.at(0)]
    for partial in sums[1:]:
        total = v.keep(total + partial[v.at(0)])
    return v.keep(v.sum(total) * v.all(1.0 / columns))


def gather_kernel(gather: Gather) -> Any:
    """(table, index, y, task, n_tasks)."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("gather")
        v = widest(gather.columns, gather.lanes)
        stored = {"f32": "float32", "f16": "float16", "bf16": "uint16"}[gather.table]
        table = T.arg("table", T.buffer((T.int64(gather.entries * gather.columns),), stored))
        index = T.arg("index", T.buffer((gather.rows,), {"i32": "int32", "i64": "int64"}[gather.index]))
        y = T.arg("y", T.buffer((gather.rows * gather.columns,), "float32"))
        task, n_tasks = T.arg("task", T.int32()), T.arg("n_tasks", T.int32())
        with share(gather.rows, task, n_tasks) as row:
            number = T.cast(index[row], "int64")
            nearest = T.max(T.min(number, T.int64(gather.entries - 1)), T.int64(0))
            start = T.bind(nearest * T.int64(gather.columns))
            with T.serial(gather.columns // v.n) as i:
                at = start + T.cast(i * v.n, "int64")
                value = v.load(table, at)
                if gather.table == "bf16":
                    value = v.low_bf16(T.cast(value, v.i32))
                elif gather.table == "f16":
                    value = T.cast(value, v.f32)
                v.store(y, row * gather.columns + i * v.n, value)
    return builder.get()


def gather_panels_kernel(gather: Gather, n_bytes: int) -> Any:
    """(table, index, y, task, n_tasks).  The table is n_bytes in panels of 16 rows (linear/panel_layout.py,
    linear/quant_layout.py): a vector's lane holds the next 4 bytes of a row, and in int8 the panel's last vector the
    rows' scales."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("gather_panels")
        one, elements = Lanes(1), 4 // DTYPE_BYTES[gather.table]
        panel_words = n_bytes // 4 // panel_count(gather.entries)
        stored = "float32" if gather.table == "f32" else "int32"
        table = T.arg("table", T.buffer((T.int64(n_bytes // 4),), stored))
        index = T.arg("index", T.buffer((gather.rows,), {"i32": "int32", "i64": "int64"}[gather.index]))
        y = T.arg("y", T.buffer((gather.rows * gather.columns,), "float32"))
        task, n_tasks = T.arg("task", T.int32()), T.arg("n_tasks", T.int32())
        with share(gather.rows, task, n_tasks) as row:
            number = T.cast(index[row], "int64")
            nearest = T.bind(T.max(T.min(number, T.int64(gather.entries - 1)), T.int64(0)))
            panel = T.truncdiv(nearest, T.int64(PANEL)) * T.int64(panel_words)
            start = T.bind(panel + T.truncmod(nearest, T.int64(PANEL)))
            if gather.table == "i8":
                scale = one.keep(one.float(table[start + T.int64(panel_words - PANEL)]))
            with T.serial(gather.columns // elements) as i:
                word = one.keep(table[start + T.cast(i * PANEL, "int64")], stored)
                for j in range(elements):
                    if gather.table == "bf16":
                        value = one.high_bf16(word) if j else one.low_bf16(word)
                    elif gather.table == "i8":
                        code = T.bitwise_and(T.shift_right(word, T.int32(8 * j)), T.int32(0xFF)) - T.int32(ZERO["i8"])
                        value = T.cast(code, "float32") * scale
                    else:
                        value = word
                    one.store(y, row * gather.columns + i * elements + j, value)
    return builder.get()


def columns_kernel(columns: Columns) -> Any:
    """(x…, y…, task, n_tasks)."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("columns")
        rows = columns.rows
        x = [T.arg(f"x{i}", T.buffer((rows * n,), "float32")) for i, n in enumerate(columns.operands)]
        y = [T.arg(f"y{o}", T.buffer((rows * n,), "float32")) for o, n in enumerate(columns.results)]
        task, n_tasks = T.arg("task", T.int32()), T.arg("n_tasks", T.int32())
        with share(rows, task, n_tasks) as row:
            for i, first, o, to, n in columns.pieces:
                v = widest(n, columns.lanes)
                start, end = T.bind(row * columns.operands[i] + first), T.bind(row * columns.results[o] + to)
                with T.serial(n // v.n) as j:
                    v.store(y[o], end + j * v.n, v.load(x[i], start + j * v.n))
    return builder.get()


def given_kernel(given: Given) -> Any:
    """(is_given, given, x, task, n_tasks); x in place."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("given")
        v, size = widest(given.columns, given.lanes), given.rows * given.columns
        is_given = T.arg("is_given", T.buffer((given.rows,), "int32"))
        numbers = T.arg("given", T.buffer((size * given.parts,), "float32"))
        x = T.arg("x", T.buffer((size,), "float32"))
        task, n_tasks = T.arg("task", T.int32()), T.arg("n_tasks", T.int32())
        with share(given.rows, task, n_tasks) as row, T.If(is_given[row] != 0), T.Then():
            start = T.bind(row * given.columns)
            begin = T.bind((row * given.parts + given.part) * given.columns)
            with T.serial(given.columns // v.n) as i:
                value = v.load(numbers, begin + i * v.n)
                v.store(x, start + i * v.n, v.load(x, start + i * v.n) + value if given.adds else value)
    return builder.get()


def turned_kernel(turned: Turned) -> Any:
    """(table, turns, y, task, n_tasks)."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("gather_turned")
        columns = turned.columns
        table = T.arg("table", T.buffer((T.int64(turned.entries * columns),), "float32"))
        turns = T.arg("turns", T.buffer((turned.rows * N_TURNS,), "int32"))
        y = T.arg("y", T.buffer((turned.rows * columns,), "float32"))
        task, n_tasks = T.arg("task", T.int32()), T.arg("n_tasks", T.int32())
        with share(turned.rows, task, n_tasks) as row:
            starts = []
            for direction in range(N_TURNS):
                number = T.cast(turns[row * N_TURNS + direction], "int64")
                nearest = T.max(T.min(number, T.int64(turned.entries - 1)), T.int64(0))
                starts.append(T.bind(nearest * T.int64(columns)))
            for direction, first, n in turned.pieces:
                v = widest(n, turned.lanes)
                with T.serial(n // v.n) as i:
                    at = starts[direction] + T.cast(first + i * v.n, "int64")
                    v.store(y, row * columns + first + i * v.n, v.load(table, at))
    return builder.get()
