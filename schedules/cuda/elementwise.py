"""One operation an element, with NumPy's broadcasting, on a GPU: include/elementwise.cuh.  And the quotient or
remainder of a step's tokens by a constant: token i of type t is given as i + t V
(compiler/frontend/export/token_types.py)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import ceil, prod

from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, Operand, RowMajor, TensorType, short_hash
from llmc.compiler.target import Target
from llmc.schedules.rule import Rule

OPERATORS = {"Add": 2, "Sub": 2, "Mul": 2, "Div": 2} | dict.fromkeys(
    ("Neg", "Abs", "Sqrt", "Reciprocal", "Relu", "Sigmoid", "Tanh", "Erf", "Gelu", "llmc.Silu"), 1
)
"""Operators, and how many operands they take."""

OF_NUMBERS = {"Div": "/", "Mod": "%"}
THREADS = 256


@dataclass(frozen=True)
class Elementwise:
    """operation: a function of elementwise.cuh; shape: the result's; inputs: the operands' shapes."""

    operation: str
    shape: tuple[int, ...]
    inputs: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        return f"{THREADS} threads"


@dataclass(frozen=True)
class OfNumbers:
    """`rows` whole numbers, none negative, each divided by a constant: the operator is / or %."""

    operator: str
    rows: int
    divisor: int

    def __str__(self) -> str:
        return f"{THREADS} threads"


def match(call: Call, target: Target) -> Elementwise | None:
    inputs = tuple(value for value in call.inputs if value is not None)
    if OPERATORS.get(call.op) != len(inputs) or len(call.inputs) != len(inputs):
        return None
    result = call.outputs[0]
    if result.dtype != "f32" or not all(is_real(value) for value in inputs):
        return None
    operation = call.op.removeprefix("llmc.")
    if operation == "Gelu" and call.attribute("approximate", "none") == "tanh":
        operation = "GeluTanh"
    return Elementwise(operation, result.shape, tuple(value.shape for value in inputs))


def is_real(value: TensorType) -> bool:
    return not value.tiled and (value.dtype == "f32" or (value.constant and value.dtype in ("bf16", "f16")))


def implement(call: Call, element: Elementwise, target: Target) -> Implementation:
    key = f"elementwise_source({element!r})"
    shape = "x".join(map(str, element.shape))
    name = f"{element.operation.lower()}_{shape}_{short_hash(key)}"
    kernel = Kernel(name, key, partial(elementwise_source, name, element), n_threads=THREADS, dependent=True)
    n = prod(element.shape)
    operands = (*(Operand("input", index) for index in range(len(element.inputs))), Operand("output", 0))
    n_bytes = 4 * (n + sum(prod(shape) for shape in element.inputs))
    constants = [index for index, value in enumerate(call.inputs) if value and value.constant]
    layouts = {index: RowMajor("f32") for index in constants}
    return Implementation((Launch(kernel, operands, ceil(n / THREADS), n_bytes, n),), layouts=layouts)


def elementwise_source(name: str, element: Elementwise) -> str:
    operands = [f"x{index}" for index in range(len(element.inputs))]
    parameters = "".join(f"const float *{operand}, " for operand in operands)
    reads = [f"{x}[{index_of(element.shape, shape)}]" for x, shape in zip(operands, element.inputs, strict=True)]
    return (
        '#include "elementwise.cuh"\n\n'
        f'extern "C" __global__ void __launch_bounds__({THREADS}) {name}({parameters}float *y) {{\n'
        "    wait_for_previous();\n"
        "    let_next_start();\n"
        f"    const int i = blockIdx.x * {THREADS} + threadIdx.x;\n"
        f"    if (i < {prod(element.shape)}) y[i] = elementwise::{element.operation}({', '.join(reads)});\n"
        "}\n"
    )


def index_of(shape: tuple[int, ...], operand: tuple[int, ...]) -> str:
    """The element of an operand that belongs to element `i` of the result, in C."""
    if prod(operand) == prod(shape):
        return "i"
    terms, inner, stride = [], 1, 1
    for axis in range(1, len(operand) + 1):
        if operand[-axis] > 1:
            at = f"i / {inner}" if inner > 1 else "i"
            at = f"{at} % {shape[-axis]}" if axis < len(shape) else at
            terms.append(f"({at}) * {stride}" if stride > 1 else at)
        inner, stride = inner * shape[-axis], stride * operand[-axis]
    return " + ".join(reversed(terms)) or "0"


def match_numbers(call: Call, target: Target) -> OfNumbers | None:
    """Only for an input of the step itself, whose numbers the runtime checks: none is negative."""
    divisor = call.attribute("input.1", None)
    if call.op not in OF_NUMBERS or not isinstance(divisor, int) or divisor < 1 or call.outputs[0].dtype != "i64":
        return None
    x = call.inputs[0]
    return OfNumbers(OF_NUMBERS[call.op], x.shape[0], divisor) if x and x.dtype == "i32" and len(x.shape) == 1 else None


def implement_numbers(call: Call, params: OfNumbers, target: Target) -> Implementation:
    key = f"numbers_source({params!r})"
    name = f"{call.op.lower()}_{params.rows}_{short_hash(key)}"
    kernel = Kernel(name, key, partial(numbers_source, name, params), n_threads=THREADS, dependent=True)
    launch = Launch(kernel, (Operand("input"), Operand("output")), ceil(params.rows / THREADS), 12 * params.rows)
    return Implementation((launch,))


def numbers_source(name: str, params: OfNumbers) -> str:
    return (
        '#include "device.cuh"\n\n'
        f'extern "C" __global__ void __launch_bounds__({THREADS}) {name}(const int *x, int64_t *y) {{\n'
        "    wait_for_previous();\n"
        "    let_next_start();\n"
        f"    const int i = blockIdx.x * {THREADS} + threadIdx.x;\n"
        f"    if (i < {params.rows}) y[i] = x[i] {params.operator} {params.divisor};\n"
        "}\n"
    )


RULES = (Rule("elementwise", match, implement), Rule("elementwise_numbers", match_numbers, implement_numbers))
