"""What a graph of dynamic shapes comes to: its values' shapes, and the contents of those that follow from sizes alone.

A graph is probed at two pairs of sizes, (batch, sequence).  Dimensions that agree are numbers, and those that are the
batch, the sequence or their product at both are called that.  So no rule is needed for the ways in which exporters do
arithmetic on shapes: it is simply done.  The positions of tokens are taken to be 0, 1, 2, …
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import zip_longest
from math import prod
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from llmc.compiler.graph_shapes import BROADCAST, bound, dims, infer, result_dtype, rule_of
from llmc.compiler.graph_text import op_name
from llmc.compiler.ops import OPSET
from llmc.compiler.weights import Array
from llmc.runtime.errors import LlmcError

PROBES = ({"batch": 2, "sequence": 11}, {"batch": 3, "sequence": 13})
"""Primes: a product of two is no other's, and no size of a head or a layer is in both."""

SHAPE_OPERANDS: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(("Reshape", "Expand", "Squeeze", "Unsqueeze", "Split"), (1,)),
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare"), (1,)),
    "Slice": (1, 2, 3, 4),
}
"""Which operands of an operator say shapes, axes or places, rather than hold activations."""

MOST_ELEMENTS = 1 << 22
"""Of what a probe holds: sizes, positions and masks of a few tokens, but for weights."""

RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
"""Operators whose results follow from nothing."""

FAST: Mapping[str, Callable[..., Any]] = {
    "Add": np.add,
    "Concat": lambda *parts, axis: np.concatenate(parts, axis),
    "Equal": np.equal,
    "Gather": lambda x, at, axis=0: np.take(x, at, axis),
    "Identity": lambda x: x,
    "Mul": np.multiply,
    "Squeeze": lambda x, axes=None: np.squeeze(x, None if axes is None else tuple(axes)),
    "Sub": np.subtract,
    "Unsqueeze": lambda x, axes: np.expand_dims(x, tuple(axes)),
    "Where": np.where,
}
"""The commonest operators on shapes; ONNX's reference does the others, a hundred times slower."""


class Probe:
    """The graph at one pair of sizes.

    shapes: of every value, in numbers.  contents(value): of a value in `sized`, which follows from sizes alone.
    """

    def __init__(self, graph: ir.Graph, sizes: Mapping[str, int]) -> None:
        self.sizes = dict(sizes)
        self.shapes: dict[ir.Value, tuple[int, ...]] = {}
        self.known: dict[ir.Value, Array] = {}
        self.sized = sized_values(graph)
        for value in graph.inputs:
            self.shapes[value] = bound(dims(value), self.sizes)
            if value.name == "position_ids":
                self.known[value] = np.broadcast_to(np.arange(sizes["sequence"]), self.shapes[value])
        for value in graph.initializers.values():
            assert value.const_value is not None
            self.shapes[value] = tuple(value.const_value.shape.numpy())
        for node in graph:
            self.add(node)

    def add(self, node: ir.Node) -> None:
        """Shapes of a node's results, its operands having theirs."""
        is_known = rule_of(node) or all(value in self.sized for value in node.outputs)
        if node.domain or node.op_type in RANDOM or not is_known:
            raise LlmcError(
                f"the operator {op_name(node)} is not compiled",
                place=f"node {node.name}",
                hint="export the plain decoder: no control flow, no operators of one runtime",
            )
        if rule_of(node) is None or node.op_type == "Shape":
            for value in node.outputs:
                self.shapes[value] = self.contents(value).shape
            return
        operands = [self.operand(node, i) for i in range(len(node.inputs))]
        attributes = node.attributes.values()
        twin = ir.Node("", node.op_type, operands, attributes, num_outputs=len(node.outputs), name=node.name)
        try:
            infer(twin)
            found = [tuple(int(str(size)) for size in value.shape or ()) for value in twin.outputs[: shaped(node)]]
        except (ValueError, IndexError, TypeError, AttributeError, AssertionError, KeyError) as error:
            raise LlmcError(f"the shapes of a {node.op_type} do not fit", place=f"node {node.name}") from error
        self.shapes.update(zip(node.outputs, found, strict=False))

    def operand(self, node: ir.Node, index: int) -> ir.Value | None:
        """A value of the operand's shape; of its contents too where they say a shape."""
        value = node.inputs[index]
        if value is None:
            return None
        twin = ir.Value(name=value.name, shape=ir.Shape(self.shapes[value]), type=value.type)
        if index in SHAPE_OPERANDS.get(node.op_type, ()):
            if value not in self.sized:
                raise LlmcError(f"a {node.op_type}'s sizes depend on the tokens", place=f"node {node.name}")
            twin.const_value = ir.tensor(np.ascontiguousarray(self.contents(value)))
        return twin

    def contents(self, value: ir.Value) -> Array:
        """What a value of `sized` holds."""
        if value not in self.known:
            node = value.producer()
            if node is None:
                assert value.const_value is not None
                self.known[value] = value.const_value.numpy()
            else:
                self.known.update(zip(node.outputs, self.run(node), strict=False))
        return self.known[value]

    def run(self, node: ir.Node) -> list[Array]:
        if node.op_type == "Shape":
            assert node.inputs[0] is not None
            ends = (node.attributes[n].as_int() if n in node.attributes else None for n in ("start", "end"))
            return [np.array(self.shapes[node.inputs[0]][slice(*ends)], np.int64)]
        operands = [None if value is None else self.contents(value) for value in node.inputs]
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        if n_elements(node.op_type, operands, attributes) > MOST_ELEMENTS:
            raise LlmcError(f"a {node.op_type} makes too many numbers of a few tokens", place=f"node {node.name}")
        try:
            if node.op_type in FAST and all(value is not None for value in operands):
                return [np.asarray(FAST[node.op_type](*operands, **attributes))]
            return reference(node, operands)
        except Exception as error:  # the reference raises anything at all
            raise LlmcError(f"a {node.op_type} of shapes cannot be computed", place=f"node {node.name}") from error


def n_elements(op: str, operands: list[Array | None], attributes: Mapping[str, Any]) -> int:
    """How many numbers come of it, where few operands can make many."""
    x, *rest = [np.zeros(0) if value is None else value for value in operands] or [np.zeros(0)]
    if op == "ConstantOfShape":
        return prod(int(size) for size in x.reshape(-1))
    if op == "Range" and len(rest) == 2:
        return int(
            abs(float(rest[0].reshape(-1)[0]) - float(x.reshape(-1)[0])) / max(abs(float(rest[1].reshape(-1)[0])), 1e-9)
        )
    if op in ("Expand", "Tile") and rest:
        return prod(max(int(size), 1) for size in rest[0].reshape(-1)) * (x.size if op == "Tile" else 1)
    if op == "Concat":
        return sum(part.size for part in (x, *rest))
    if op == "Gather" and x.ndim and rest:
        return rest[0].size * x.size // max(1, x.shape[int(attributes.get("axis", 0)) % x.ndim])
    if op == "MatMul" and x.ndim and rest:
        return x.size * rest[0].size // max(1, x.shape[-1]) ** 2
    if op in BROADCAST:
        sizes = zip_longest(*(part.shape[::-1] for part in (x, *rest)), fillvalue=1)
        found = prod(max(of_axis) for of_axis in sizes)
        return 0 if found <= max(part.size for part in (x, *rest)) else found
    return 0


def shaped(node: ir.Node) -> int:
    """How many of a node's results have a shape that matters; Attention's later ones are its cache."""
    return 1 if node.op_type in ("Attention", "LayerNormalization") else len(node.outputs)


def reference(node: ir.Node, operands: list[Array | None]) -> list[Array]:
    """The node's results by ONNX's own reference implementation."""
    from onnx.reference import ReferenceEvaluator

    names = ["" if value is None else f"x{i}" for i, value in enumerate(operands)]
    results = [f"y{i}" for i in range(len(node.outputs))]
    attributes = [ir.to_proto(attribute) for attribute in node.attributes.values()]
    proto = onnx.helper.make_node(node.op_type, names, results)
    proto.attribute.extend(attributes)
    feeds = {name: value for name, value in zip(names, operands, strict=True) if name}
    opsets = {"": OPSET}
    return [np.asarray(array) for array in ReferenceEvaluator(proto, opsets=opsets).run(None, feeds)]


def sized_values(graph: ir.Graph) -> set[ir.Value]:
    """Those that do not depend on which tokens there are."""
    sized = {value for value in graph.inputs if value.name == "position_ids"} | set(graph.initializers.values())
    for node in graph:
        if node.op_type == "Shape" or all(value is None or value in sized for value in node.inputs):
            sized.update(node.outputs)
    return sized


def dimension(sizes: tuple[int, int]) -> int | ir.SymbolicDim:
    """One dimension from what it was at the two probes."""
    if sizes[0] == sizes[1]:
        return sizes[0]
    names = {tuple(probe[name] for probe in PROBES): name for name in ("batch", "sequence")}
    names[tuple(probe["batch"] * probe["sequence"] for probe in PROBES)] = "batch*sequence"
    return ir.SymbolicDim(names.get(sizes, f"size_{sizes[0]}_{sizes[1]}"))


def settle_shapes(graph: ir.Graph) -> tuple[Probe, Probe]:
    """Give every value its shape, of numbers and the symbols batch and sequence, and its type.  -> the probes."""
    probes = Probe(graph, PROBES[0]), Probe(graph, PROBES[1])
    for node in graph:
        for value in node.outputs:
            if value not in probes[0].shapes:
                continue
            sizes = zip(*(probe.shapes[value] for probe in probes), strict=True)
            value.shape = ir.Shape([dimension((a, b)) for a, b in sizes])
            if value in probes[0].sized and (rule_of(node) is None or value in probes[0].known):
                value.dtype = ir.DataType.from_numpy(probes[0].contents(value).dtype)
            else:
                dtype = result_dtype(node)
                if dtype is not None:
                    value.dtype = dtype
    return probes
