"""How an operator is defined: a Python function traced once into an ONNX function, and a registry of the results."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import onnx_ir as ir

DOMAIN = "llmc"
VERSION = 1
OPSET = 23

Dim: TypeAlias = "int | ir.SymbolicDim"
Dims: TypeAlias = tuple[Dim, ...]
Attributes: TypeAlias = dict[str, Any]
ResultShapes: TypeAlias = Callable[[Sequence[Dims], Attributes], Sequence[Dims]]


@dataclass(frozen=True)
class Operator:
    """An operator: its inputs and attributes by name, its definition, and the shapes of its results (all float32).

    body(op, *inputs, **attributes): what the definition was traced from, for operators that are made of it.
    """

    name: str
    inputs: tuple[str, ...]
    attributes: tuple[str, ...]
    function: ir.Function
    result_shapes: ResultShapes
    body: Callable[..., Any]


OPERATORS: dict[str, Operator] = {}
"""Every operator by name."""


def function_of(name: str) -> ir.Function:
    """The ONNX function that defines operator `name`: a fresh copy, since a function belongs to one model."""
    function = OPERATORS[name].function
    copy = function.graph.clone()
    return ir.Function(DOMAIN, name, graph=copy, attributes=function.attributes.values())


ATTRIBUTE_TYPES = {"int": ir.AttributeType.INT, "float": ir.AttributeType.FLOAT, "list[int]": ir.AttributeType.INTS}


@dataclass(frozen=True)
class AttributeRef:
    """An attribute of the operator being defined, wherever its body mentions it."""

    name: str
    type: ir.AttributeType


class Trace:
    """Records a body: `op.Add(x, y)` is a node, `op.ints(2, heads)`, `op.scalar(1.0)` a constant, recorded once."""

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix  # of the names of values: those of a loop's body differ from those around it
        self.nodes: list[ir.Node] = []
        self.constants: dict[tuple[Any, ...], Any] = {}

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        def node(*inputs: ir.Value, n_results: int = 1, **attributes: Any) -> Any:
            stem = f"{self.prefix}v{len(self.nodes)}"
            values = [ir.Value(name=f"{stem}.{i}" if i else stem) for i in range(n_results)]
            converted = [as_attribute(name, value) for name, value in attributes.items()]
            self.nodes.append(ir.Node("", op_type, inputs, converted, outputs=values))
            return values if n_results > 1 else values[0]

        return node

    def scalar(self, number: int | float | AttributeRef) -> Any:
        """A scalar of type int64 or float32, as the number's own type is."""
        kind = number.type if isinstance(number, AttributeRef) else ATTRIBUTE_TYPES[type(number).__name__]
        key = (kind, number)
        if key not in self.constants:
            self.constants[key] = self.Constant(**{f"value_{kind.name.lower()}": number})
        return self.constants[key]

    def ints(self, *numbers: int | AttributeRef | ir.Value) -> Any:
        """A vector of int64: axes, a shape, sizes. Its parts are numbers, attributes, or scalars worked out before."""
        key = ("ints", *numbers)
        if key not in self.constants:
            if all(isinstance(number, int) for number in numbers):
                self.constants[key] = self.Constant(value_ints=list(numbers))
            else:
                scalars = (n if isinstance(n, ir.Value) else self.scalar(n) for n in numbers)
                parts = [self.Reshape(scalar, self.ints(1)) for scalar in scalars]
                self.constants[key] = self.Concat(*parts, axis=0)
        return self.constants[key]

    def scan(self, step: Callable[..., Sequence[Any]], states: Sequence[ir.Value], rows: Sequence[ir.Value]) -> Any:
        """ONNX's Scan: step(op, *states, *rows), with a row of each of `rows` in turn, gives the next states and then a
        row of each result.  -> the last states, and the results.  It may use what was made before, but for attributes.
        """
        body = Trace(f"{self.prefix}s{len(self.nodes)}")
        arguments = [ir.Value(name=f"{body.prefix}a{i}") for i in range(len(states) + len(rows))]
        results = step(body, *arguments)
        graph = ir.Graph(arguments, results, nodes=body.nodes, name="step")
        return self.Scan(*states, *rows, n_results=len(results), body=graph, num_scan_inputs=len(rows))


def as_attribute(name: str, value: Any) -> ir.Attr:
    if isinstance(value, AttributeRef):
        return ir.RefAttr(name, value.name, value.type)
    return ir.convenience.convert_attribute(name, value)


def define(
    name: str,
    inputs: Sequence[str],
    attributes: dict[str, ir.AttributeType],
    body: Callable[..., Any],
    result_shapes: ResultShapes,
    doc: str,
) -> None:
    """Trace `body` into a function and register the operator."""
    op = Trace()
    arguments = [ir.Value(name=value) for value in inputs]
    results = body(op, *arguments, **{key: AttributeRef(key, kind) for key, kind in attributes.items()})
    outputs = list(results) if isinstance(results, tuple | list) else [results]
    graph = ir.Graph(arguments, outputs, nodes=op.nodes, opset_imports={"": OPSET}, name=name, doc_string=doc)
    declared = [ir.Attr(key, kind, None) for key, kind in attributes.items()]
    function = ir.Function(DOMAIN, name, graph=graph, attributes=declared)
    OPERATORS[name] = Operator(name, tuple(inputs), tuple(attributes), function, result_shapes, body)


def operator(result_shapes: ResultShapes) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define the operator that the decorated function's name, signature, docstring and body say."""

    def register(body: Callable[..., Any]) -> Callable[..., Any]:
        parameters = list(inspect.signature(body).parameters.values())[1:]
        inputs = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
        attributes = {p.name: ATTRIBUTE_TYPES[p.annotation] for p in parameters if p.kind is p.KEYWORD_ONLY}
        define(body.__name__, inputs, attributes, body, result_shapes, inspect.getdoc(body) or "")
        return body

    return register


def like_first(shapes: Sequence[Dims], _: Attributes) -> Sequence[Dims]:
    return [shapes[0]]
