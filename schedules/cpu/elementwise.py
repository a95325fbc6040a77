"""One operation an element, with NumPy's broadcasting: what fusion into a matrix product or a norm left over.

    for row in parallel:  y[row, :] = f(a[row, :], b[row, :])        rows: all axes of the result but the last

Reads each operand and writes the result once: memory is the limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, Operand, RowMajor, TensorType, short_hash
from llmc.compiler.target import Target
from llmc.schedules.rule import Rule

OPERATORS = {"Add": 2, "Sub": 2, "Mul": 2, "Div": 2} | dict.fromkeys(
    ("Neg", "Abs", "Sqrt", "Reciprocal", "Relu", "Sigmoid", "Tanh", "Erf", "Gelu", "llmc.Silu"), 1
)
"""Standard operators, and how many operands they take."""


@dataclass(frozen=True)
class Elementwise:
    """operation: a name of `element_kernels.OPERATIONS`; shape: the result's; inputs: the operands' shapes."""

    operation: str
    shape: tuple[int, ...]
    inputs: tuple[tuple[int, ...], ...]
    lanes: int

    def __str__(self) -> str:
        return f"{self.lanes} lanes"

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])


def match(call: Call, target: Target) -> Elementwise | None:
    inputs = tuple(value for value in call.inputs if value is not None)
    if OPERATORS.get(call.op) != len(inputs) or len(call.inputs) != len(inputs):
        return None
    result = call.outputs[0]
    if result.dtype != "f32" or not result.shape or not all(is_real(value) for value in inputs):
        return None
    operation = call.op.removeprefix("llmc.")
    if operation == "Gelu" and call.attribute("approximate", "none") == "tanh":
        operation = "GeluTanh"
    return Elementwise(operation, result.shape, tuple(value.shape for value in inputs), target.lanes)


def is_real(value: TensorType) -> bool:
    return value.dtype == "f32" or (value.constant and value.dtype in ("bf16", "f16"))


def implement(call: Call, element: Elementwise, target: Target) -> Implementation:
    inputs = [Operand("input", index) for index in range(len(element.inputs))]
    key = f"build_elementwise({element!r})"
    shape = "x".join(map(str, element.shape))
    name = f"{element.operation.lower()}_{shape}_{short_hash(key)}"
    words = prod(element.shape) + sum(prod(shape) for shape in element.inputs)
    launch = Launch(
        Kernel(name, key, partial(build_elementwise, element)),
        (*inputs, Operand("output", 0)),
        element.rows,
        4 * words,
        prod(element.shape),
    )
    constants = [index for index, value in enumerate(call.inputs) if value and value.constant]
    return Implementation((launch,), layouts={index: RowMajor("f32") for index in constants})


def build_elementwise(element: Elementwise) -> Any:
    from llmc.schedules.cpu import element_kernels  # TVM is imported only when something is compiled

    return element_kernels.elementwise_kernel(element)


RULES = (Rule("elementwise", match, implement),)
