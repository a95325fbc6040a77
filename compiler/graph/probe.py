"""Find the shapes of a graph with dynamic sizes, and the contents of values that follow from sizes alone, by trying.

A graph is probed at two pairs of sizes, (batch, sequence).  A dimension that is equal at both is a number; one that is
the same multiple of the batch, the sequence or their product at both is called that.  So no rule is needed for the ways
in which exporters do arithmetic on shapes: it is simply done.  The positions of tokens are taken to be 0, 1, 2, …

What holds for these lengths need not hold for others: Min(sequence, 4096), sequence > 4096, sequence % 4096.  So it is
checked at one token, at the longest sequence that is asked for, and around each number that a length is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from math import ceil, prod
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from llmc.compiler.graph.shapes import BROADCAST, bound, dims, infer, result_dtype, rule_of
from llmc.compiler.graph.text import op_name
from llmc.compiler.ops import DOMAIN, OPSET
from llmc.compiler.weights import Array
from llmc.runtime.errors import LlmcError

PROBES = ({"batch": 2, "sequence": 11}, {"batch": 3, "sequence": 13})
"""Primes, so that no product of two of them is equal to another, and no size of a head or a layer fits both."""
MOST_PROBES = 24
"""Each takes half a second for a graph of 5000 nodes."""
FEW = 16
"""A value of more elements than this is not taken for sizes."""
BENDS = ("Clip", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mod", "Slice")
"""Operators whose results need not grow evenly with a length."""

SHAPE_OPERANDS: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(("Reshape", "Expand", "Squeeze", "Unsqueeze", "Split"), (1,)),
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare"), (1,)),
    "Slice": (1, 2, 3, 4),
}
"""Which operands of an operator say shapes, axes or places, rather than hold activations."""

MOST_ELEMENTS = 1 << 22
"""The most elements of a value that a probe computes: sizes, positions and masks of a few tokens are smaller."""

RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
"""Operators whose results do not follow from their inputs."""

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
    is_long: whether what has many elements for many tokens is not made just for its shape.
    """

    def __init__(self, graph: ir.Graph, sizes: Mapping[str, int], *, is_long: bool = False) -> None:
        self.sizes, self.is_long = dict(sizes), is_long
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
        has_rule = node.domain == DOMAIN or rule_of(node) is not None
        is_known = has_rule or all(value in self.sized for value in node.outputs)
        if node.domain not in ("", DOMAIN) or node.op_type in RANDOM or not is_known:
            raise LlmcError(
                f"the operator {op_name(node)} is not compiled",
                place=f"node {node.name}",
                hint="export the plain decoder: no control flow, no operators of one runtime",
            )
        if not has_rule or node.op_type == "Shape":
            known = self.made(node) if self.is_long else None
            for value in node.outputs:
                self.shapes[value] = known if known is not None else self.contents(value).shape
            return
        operands = [self.operand(node, i) for i in range(len(node.inputs))]
        attributes = node.attributes.values()
        twin = ir.Node(node.domain, node.op_type, operands, attributes, num_outputs=len(node.outputs), name=node.name)
        try:
            infer(twin)
            found = [tuple(int(str(size)) for size in value.shape or ()) for value in twin.outputs[: shaped(node)]]
        except (ValueError, IndexError, TypeError, AttributeError, AssertionError, KeyError) as error:
            raise LlmcError(f"the shapes of a {node.op_type} do not fit", place=f"node {node.name}") from error
        self.shapes.update(zip(node.outputs, found, strict=False))

    def made(self, node: ir.Node) -> tuple[int, ...] | None:
        """The shape of what the node makes of sizes; None where it has to be made to know."""
        shapes = [self.shapes[value] for value in node.inputs if value is not None]
        first = 0 if node.op_type == "ConstantOfShape" else 1
        if node.op_type in ("CumSum", "ScatterND"):
            return shapes[0]
        if node.op_type == "GatherND":
            n_batch = node.attributes["batch_dims"].as_int() if "batch_dims" in node.attributes else 0
            return (*shapes[1][:-1], *shapes[0][n_batch + shapes[1][-1] :])
        if node.op_type in ("ConstantOfShape", "Tile") and (value := node.inputs[first]) is not None:
            numbers = [int(number) for number in self.contents(value)]
            return tuple(a * b for a, b in zip(numbers, shapes[0] if first else [1] * len(numbers), strict=True))
        if node.op_type == "Range":
            start, end, step = (float(self.contents(value).reshape(-1)[0]) for value in node.inputs if value)
            return (max(0, ceil((end - start) / step)),)
        return None

    def operand(self, node: ir.Node, index: int) -> ir.Value | None:
        """A value of the operand's shape; of its contents too where they say a shape."""
        value = node.inputs[index]
        if value is None:
            return None
        twin = ir.Value(name=value.name, shape=ir.Shape(self.shapes[value]), type=value.type)
        if index in SHAPE_OPERANDS.get(node.op_type, ()):
            if value not in self.sized:
                raise LlmcError(f"a {node.op_type}'s sizes depend on the tokens", place=f"node {node.name}")
            twin.const_value = ir.tensor(self.contents(value).copy(order="C"))
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
    """How many numbers a node makes, for operators that can make many of few."""
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
    """The values that do not depend on which tokens there are."""
    sized = {value for value in graph.inputs if value.name == "position_ids"} | set(graph.initializers.values())
    for node in graph:
        if node.op_type == "Shape" or all(value is None or value in sized for value in node.inputs):
            sized.update(node.outputs)
    return sized


def dimension(found: Sequence[int], probes: Sequence[Probe]) -> int | ir.SymbolicDim:
    """A dimension, as a number or a symbol, from what it was at both probes."""
    if len(set(found)) == 1:
        return found[0]
    for name, units in (
        ("batch", [probe.sizes["batch"] for probe in probes]),
        ("sequence", [probe.sizes["sequence"] for probe in probes]),
        ("batch*sequence", [prod(probe.sizes.values()) for probe in probes]),
    ):
        if found[0] and all(size * units[0] == found[0] * unit for size, unit in zip(found, units, strict=True)):
            times = found[0] / units[0]
            return ir.SymbolicDim(name if times == 1 else f"{name}*{times:g}")
    return ir.SymbolicDim("_".join(map(str, ("size", *found))))


def telling_lengths(graph: ir.Graph, probes: Sequence[Probe], n_context: int) -> list[int]:
    """Lengths to check: one token, the most, and those at which a size may stop growing evenly, around the numbers that
    lengths are compared with, divided by and cut at.  If these are too many, the shortest and the longest."""
    found, longest = {1, n_context}, max(probe.sizes["sequence"] for probe in probes)
    for node in graph:
        if node.op_type not in BENDS:
            continue
        cut = node.op_type == "Slice" and len({probe.shapes[node.inputs[0]] for probe in probes if node.inputs[0]}) > 1
        operands = [value for value in node.inputs[cut:] if value is not None and value in probes[0].sized]
        small = [value for value in operands if all(prod(probe.shapes[value]) <= FEW for probe in probes)]
        contents = [[probe.contents(value).reshape(-1).tolist() for probe in probes] for value in small]
        if not cut and all(a == b for a, b in contents):
            continue
        numbers = [number for a, b in contents if a == b for number in a if abs(number) <= n_context]
        ends = [int(abs(number)) for number in numbers if number == int(number)]
        found.update(end + step for end in ends for step in ((0, 1) if end > longest else (-1, 0, 1)))
    short = {probe.sizes["sequence"] for probe in probes}
    lengths = sorted(length for length in found - short if 1 <= length <= n_context)
    return lengths if len(lengths) <= MOST_PROBES else [lengths[0], *lengths[1 - MOST_PROBES :]]


def refuse_bend(node: ir.Node, found: Sequence[int], probes: Sequence[Probe]) -> None:
    """Refuse a dimension that is a number, or grows with the length, for few tokens but not for many."""
    few, said = dimension(found[:2], probes[:2]), dimension(found, probes)
    if str(few).startswith("size") or str(few) == str(said):
        return
    wrong = next(i for i in range(3, len(found) + 1) if str(dimension(found[:i], probes[:i])) != str(few)) - 1
    n_tokens = probes[wrong].sizes["sequence"]
    raise LlmcError(
        f"a {node.op_type} gives a size of {found[wrong]} for {n_tokens} tokens, which is {few} for 11 and for 13",
        place=f"node {node.name}",
        hint=shorter(n_tokens),
    )


def shorter(n_tokens: int) -> str:
    if n_tokens < PROBES[0]["sequence"]:
        return "the graph has to do for sequences of any length, from one token on"
    return f"ask for a --max-seq of less than {n_tokens}"


def settle_shapes(graph: ir.Graph, n_context: int | None = None) -> tuple[Probe, ...]:
    """Give every value its shape, of numbers and the symbols batch and sequence, and its type.  -> the probes.

    n_context: the longest sequence, up to which shapes have to be so; None where they are known to be.
    Raises LlmcError if what is made of tokens has another shape then.
    """
    probes: tuple[Probe, ...] = (Probe(graph, PROBES[0]), Probe(graph, PROBES[1]))
    for n_tokens in [] if n_context is None else telling_lengths(graph, probes, n_context):
        try:
            probes += (Probe(graph, {"batch": 2, "sequence": n_tokens}, is_long=True),)
        except (LlmcError, ArithmeticError, ValueError, IndexError) as error:
            said = error if isinstance(error, LlmcError) else LlmcError("shapes do not fit")
            fact, hint = f"for sequences of {n_tokens} tokens {said.fact}", shorter(n_tokens)
            raise LlmcError(fact, place=said.place, hint=hint) from error
    for node in graph:
        for index, value in enumerate(node.outputs):
            if value not in probes[0].shapes:
                continue
            sizes = list(zip(*(probe.shapes[value] for probe in probes), strict=True))
            value.shape = ir.Shape([dimension(found, probes) for found in sizes])
            for found in sizes if value not in probes[0].sized else ():
                refuse_bend(node, found, probes)
            if value in probes[0].sized and (rule_of(node) is None or value in probes[0].known):
                value.dtype = ir.DataType.from_numpy(probes[0].contents(value).dtype)
            else:
                dtype = result_dtype(node, index)
                if dtype is not None:
                    value.dtype = dtype
    return probes
