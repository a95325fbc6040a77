"""The kernel of an elementwise operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from llmc.schedules.cpu import activations
from llmc.schedules.cpu.elementwise import Elementwise
from llmc.schedules.cpu.lanes import Lanes, share, widest

OPERATIONS: dict[str, Callable[..., Any]] = {
    "Add": lambda v, a, b: a + b,
    "Sub": lambda v, a, b: a - b,
    "Mul": lambda v, a, b: a * b,
    "Div": lambda v, a, b: a / b,
    "Neg": lambda v, a: v.all(0.0) - a,
    "Abs": lambda v, a: T.max(a, v.all(0.0) - a),
    "Sqrt": lambda v, a: T.sqrt(a),
    "Reciprocal": lambda v, a: v.all(1.0) / a,
    "Relu": activations.relu,
    "Sigmoid": lambda v, a: v.all(1.0) / (v.all(1.0) + v.exp(v.all(0.0) - a)),
    "Tanh": lambda v, a: v.tanh(a),
    "Erf": activations.erf,
    "Gelu": activations.gelu,
    "GeluTanh": activations.gelu_tanh,
    "Silu": activations.silu,
}


def elementwise_kernel(element: Elementwise) -> Any:
    """(operand…, y, task, n_tasks)."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("elementwise")
        columns, v = element.shape[-1], widest(element.shape[-1], element.lanes)
        operands = [T.arg(f"x{i}", T.buffer((size(shape),), "float32")) for i, shape in enumerate(element.inputs)]
        y = T.arg("y", T.buffer((element.rows * columns,), "float32"))
        task, n_tasks = T.arg("task", T.int32()), T.arg("n_tasks", T.int32())
        with share(element.rows, task, n_tasks) as row:
            starts = [T.bind(row_start(row, element.shape, shape)) for shape in element.inputs]
            with T.serial(columns // v.n) as i:
                values = [
                    read(v, operand, start, i, spread=not shape or shape[-1] < columns)
                    for operand, start, shape in zip(operands, starts, element.inputs, strict=True)
                ]
                v.store(y, row * columns + i * v.n, OPERATIONS[element.operation](v, *values))
    return builder.get()


def size(shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count


def row_start(row: Any, shape: tuple[int, ...], operand: tuple[int, ...]) -> Any:
    """Where the operand's part of the result's `row`-th row starts: axes of extent 1 stand still."""
    start, stride, below = T.int32(0), operand[-1] if operand else 1, 1
    for axis in range(2, len(shape) + 1):
        extent = operand[-axis] if axis <= len(operand) else 1
        if extent > 1:
            start = start + T.truncmod(T.truncdiv(row, below), extent) * stride
        stride, below = stride * extent, below * shape[-axis]
    return start


def read(v: Lanes, operand: Any, start: Any, i: Any, spread: bool) -> Any:
    """The operand's elements of a vector of columns; one element for all where it is spread."""
    return v.keep(v.all(operand[start])) if spread else v.load(operand, start + i * v.n)
