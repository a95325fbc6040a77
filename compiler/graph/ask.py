"""Questions to ask of a graph, its nodes and its values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir

from llmc.compiler.graph.shapes import bound, dims
from llmc.compiler.graph.text import op_name
from llmc.compiler.ops import DOMAIN, LOW_RANKS
from llmc.compiler.weights import Weight


def count_ops(model: ir.Model) -> Counter[str]:
    """How many nodes of each operator: "Gather", "llmc.Linear", …"""
    return Counter(op_name(node) for node in model.graph)


def bind(model: ir.Model, sizes: Mapping[str, int]) -> dict[ir.Value, tuple[int, ...]]:
    """Every value's shape in numbers, given one for each symbol: {"M": 4, "R": 1, "P": 8, "n_pages": 16}."""
    return {value: bound(dims(value), dict(sizes)) for value in values(model.graph)}


def values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Inputs, initializers, then the results of each node in order."""
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def producer(value: ir.Value | None, *ops: str) -> ir.Node | None:
    """The node that makes this value, if it is one of these ("Add", "llmc.Linear"); any, when none is named."""
    node = value.producer() if value is not None else None
    return node if node is not None and (not ops or op_name(node) in ops) else None


def used_once(value: ir.Value) -> bool:
    """Exactly one node input takes this value, and it is no result of the graph."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer, unread."""
    return value.const_value if value is not None and value.is_initializer() else None


def weight_of(value: ir.Value | None) -> Weight | None:
    """The weight an initializer holds, unread; a plain float tensor is wrapped."""
    tensor = constant(value)
    if tensor is None or tensor.dtype != ir.DataType.FLOAT:
        return None
    if isinstance(tensor, Weight):
        return tensor
    return Weight(str(value.name if value else None), tensor.shape.numpy(), tensor.numpy)


def number(value: ir.Value | None) -> float | None:
    """The number that a constant of one element holds."""
    tensor = constant(value)
    return float(tensor.numpy().reshape(-1)[0]) if tensor is not None and tensor.size == 1 else None


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The plain value of an attribute."""
    return node.attributes[name].value if name in node.attributes else default


def is_last_axis(node: ir.Node, axis: int) -> bool:
    """Whether `axis` counts the last dimension of the node's first input."""
    return axis in (-1, len(dims(node.inputs[0])) - 1)


def is_experts(node: ir.Node) -> bool:
    """Whether a node is a mixture of experts, of any kind."""
    return node.domain == DOMAIN and node.op_type.startswith("Experts")


def is_linear(node: ir.Node) -> bool:
    return op_name(node).startswith(("llmc.Linear", "llmc.GatedLinear"))


def products_before(result: ir.Value, *, behind_norms: bool = False) -> set[ir.Node]:
    """The last linear layers on each path to a value.  behind_norms: leave out paths on which a norm comes later."""
    found: set[ir.Node] = set()
    queue = [result]
    while queue:
        node = queue.pop().producer()
        if node is not None and is_linear(node):
            found.add(node)
        elif node is not None and not (behind_norms and "Norm" in node.op_type):
            takes = node.inputs[:1] if node.op_type in LOW_RANKS else node.inputs  # the product, not what it is of
            queue += [value for value in takes if value is not None]
    return found


def products_of_logits(graph: ir.Graph) -> set[ir.Node]:
    """The linear layers that make the logits.  A model that ends with a norm, as for embeddings, has none: a norm's
    operand is a sum to which all of its layers add."""
    return products_before(graph.outputs[0], behind_norms=True)
