"""The kernels of top_k.py: elements in falling order, each found by one pass behind the one before it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from llmc.schedules.cpu.lanes import share
from llmc.schedules.cpu.top_k import Groups, TopK


class Order:
    """The elements read(0) … read(n - 1), largest first, of equals the first: `value` and `index` of the latest."""

    def __init__(self, n: int, read: Callable[[Any], Any]) -> None:
        self.n, self.read = n, read
        self.values, self.indices = T.alloc_buffer((2,), "float32"), T.alloc_buffer((2,), "int32")
        T.buffer_store(self.values, T.float32(math.inf), [0])
        T.buffer_store(self.indices, T.int32(-1), [0])

    @property
    def value(self) -> Any:
        return self.values[0]

    @property
    def index(self) -> Any:
        """Within the elements, even if they cannot be compared (NaN)."""
        return T.max(self.indices[0], 0)

    def advance(self) -> None:
        """Go on to the next one: the largest of those that come behind the latest."""
        T.buffer_store(self.values, T.float32(-math.inf), [1])
        T.buffer_store(self.indices, T.int32(-1), [1])
        with T.serial(self.n) as i:
            x = T.bind(self.read(i))
            behind = T.Or(x < self.values[0], T.And(x == self.values[0], i > self.indices[0]))
            better = T.Or(self.indices[1] < 0, x > self.values[1])
            with T.If(T.And(behind, better)), T.Then():
                T.buffer_store(self.values, x, [1])
                T.buffer_store(self.indices, i, [1])
        T.buffer_store(self.values, self.values[1], [0])
        T.buffer_store(self.indices, self.indices[1], [0])


def top_k_kernel(top: TopK) -> Any:
    """(x, values, indices, task, n_tasks)."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("top_k")
        x = T.arg("x", T.buffer((top.rows * top.columns,), "float32"))
        values = T.arg("values", T.buffer((top.rows * top.k,), "float32"))
        indices = T.arg("indices", T.buffer((top.rows * top.k,), "int64"))
        task, n_tasks = T.arg("task", T.int32()), T.arg("n_tasks", T.int32())
        with share(top.rows, task, n_tasks) as row:
            order = Order(top.columns, lambda i: x[row * top.columns + i])
            with T.serial(top.k) as j:
                order.advance()
                T.buffer_store(values, x[row * top.columns + order.index], [row * top.k + j])
                T.buffer_store(indices, T.cast(order.index, "int64"), [row * top.k + j])
    return builder.get()


def groups_kernel(groups: Groups) -> Any:
    """(scores, y, task, n_tasks)."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("keep_groups")
        scores, y = (T.arg(name, T.buffer((groups.rows * groups.columns,), "float32")) for name in ("scores", "y"))
        task, n_tasks = T.arg("task", T.int32()), T.arg("n_tasks", T.int32())
        with share(groups.rows, task, n_tasks) as row:
            sums = T.alloc_buffer((groups.count,), "float32")
            with T.serial(groups.count) as group:
                start = T.bind(row * groups.columns + group * groups.size)
                order = Order(groups.size, lambda i: scores[start + i])
                T.buffer_store(sums, T.float32(0.0), [group])
                with T.serial(groups.best):
                    order.advance()
                    T.buffer_store(sums, sums[group] + order.value, [group])
            with T.serial(groups.columns) as i:
                T.buffer_store(y, T.float32(groups.fill), [row * groups.columns + i])
            order = Order(groups.count, lambda i: sums[i])
            with T.serial(groups.kept):
                order.advance()
                start = T.bind(row * groups.columns + order.index * groups.size)
                with T.serial(groups.size) as i:
                    T.buffer_store(y, scores[start + i], [start + i])
    return builder.get()
