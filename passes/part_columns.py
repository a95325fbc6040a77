"""Split a product whose columns are several things in turns, head by head, into one product for each of these.

rewrite:
    x = Reshape(llmc.Linear(h, W), [M, H, 2·D])
    q, gate = Split(x, axis=2)
    -->
    q = Reshape(llmc.Linear(h, W[rows of q]), [M, H, D])
    gate = Reshape(llmc.Linear(h, W[rows of gate]), [M, H, D])
refuses: parts whose columns lie one after the other already, so that a Split does; columns that nobody takes, or two.

To reorder rows of a weight costs nothing; to reorder columns of activations costs a pass through memory in each step.
Which column goes where is worked out, as in `order_columns`.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx_ir as ir

from llmc.compiler.graph import emit, ints_constant, op_name, replace
from llmc.compiler.graph.shapes import dims
from llmc.compiler.weights import Array
from llmc.passes.order_columns import CHOOSES, LINEAR, chosen_columns, ordered, width


def part_columns(model: ir.Model) -> int:
    """Assumes Linear and LinearBias nodes over M tokens. Returns the number of products that became several."""
    return sum(part(model.graph, node) for node in list(model.graph) if op_name(node) in LINEAR)


def part(graph: ir.Graph, linear: ir.Node) -> bool:
    product = linear.outputs[0]
    within = choosing(product)
    ends = [v for node in within for v in node.outputs if v.is_graph_output() or any(goes_on(v, within))]
    if len(ends) < 2 or any(goes_on(product, within)) or product.is_graph_output():
        return False
    chosen = chosen_columns(product, ends)
    taken = np.sort(np.concatenate(chosen))
    if not np.array_equal(taken, np.arange(width(product))) or all(is_in_order(each) for each in chosen):
        return False
    for end, each in zip(ends, chosen, strict=True):
        made = ordered(graph, linear, each)
        sizes = [size for size in dims(end)[1:] if isinstance(size, int)]
        whole = dims(end) == dims(made)
        replace(end, made if whole else emit(linear, "Reshape", [made, ints_constant(graph, [-1, *sizes])])[0])
    return True


def choosing(product: ir.Value) -> list[ir.Node]:
    """Nodes whose results are elements of the product and of nothing else, in their order."""
    found = dict[ir.Node, None]()
    values = {product}
    graph = product.producer().graph  # type: ignore[union-attr]
    assert graph is not None
    for node in graph:
        operands = node.inputs if node.op_type == "Concat" else node.inputs[:1]
        if op_name(node) in (*CHOOSES, "Concat") and all(value in values for value in operands):
            found[node] = None
            values.update(node.outputs)
    return list(found)


def goes_on(value: ir.Value, within: list[ir.Node]) -> list[ir.Node]:
    """The nodes that take the value and do more than choose elements of it."""
    return [use.node for use in value.uses() if use.node not in within]


def is_in_order(columns: Array) -> bool:
    return all(after == before + 1 for before, after in pairwise(columns))
