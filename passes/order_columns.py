"""Let the product that makes queries, keys and values make them one after the other, for heads in order.

rewrite:
    x = Reshape(llmc.Linear(h, W), [M, heads, 3, D])
    llmc.CausalAttention(llmc.Rotary(x[:, :, 0], cos, sin), llmc.Rotary(x[:, :, 1], cos, sin), x[:, :, 2])
    -->
    q, k, v = Split(llmc.Linear(h, W[order]))
    llmc.CausalAttention(llmc.Rotary(q, cos, sin), llmc.Rotary(k, cos, sin), v)

    keys and values that are repeated for each query head of a group
    -->
    the same with fewer key heads
refuses: a product with another user; columns that are computed with before attention, but for Rotary.

Models lay the three out in many ways (a head's side by side, in groups with the heads that share keys, in blocks for
several devices).  Which column becomes which is not recognised but worked out, by running what is behind the product on
the numbers 0, 1, 2, ….  To reorder rows of a weight costs nothing; to reorder columns of activations costs a pass
through memory in each step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from llmc.compiler.graph import add_constant, emit, ints_constant, op_name, producer, replace, weight_of
from llmc.compiler.graph.run import extract, runner
from llmc.compiler.graph.shapes import attributes_of, dims
from llmc.compiler.ops import SEQUENCE_ATTENTION
from llmc.compiler.weights import Array, Weight

CHOOSES = ("Expand", "Gather", "Reshape", "Slice", "Split", "Transpose")
"""Operators whose results are elements of their first input."""
LINEAR = ("llmc.Linear", "llmc.LinearBias")


def order_columns(model: ir.Model) -> int:
    """Assumes Linear and LinearBias nodes over M tokens; leaves a Split between them and attention. Returns the number
    of products whose columns are in another order."""
    attentions = [node for node in model.graph if op_name(node) in SEQUENCE_ATTENTION]
    return sum(order(model.graph, node) for node in attentions)


def order(graph: ir.Graph, attention: ir.Node) -> bool:
    turns = [producer(value, "llmc.Rotary") for value in attention.inputs[:3]]
    ends = [turn.inputs[0] if turn else value for turn, value in zip(turns, attention.inputs[:3], strict=True)]
    linear = common_product(ends)
    if linear is None:
        return False
    users = [turn or attention for turn in turns]
    chosen = columns(linear.outputs[0], ends, users)
    if chosen is None:
        return False
    settings = attributes_of(attention)
    n_heads = settings["kv_num_heads"]
    n_kv = distinct_heads(chosen[1:], n_heads)
    kept = [chosen[0], *(each.reshape(n_kv, n_heads // n_kv, -1)[:, 0].reshape(-1) for each in chosen[1:])]
    whole, sizes = np.concatenate(kept), [each.size for each in kept]
    if not np.array_equal(whole, np.arange(width(linear.outputs[0]))):
        result = ordered(graph, linear, whole)
    elif all(producer(end, "Split", "Slice") for end in ends):
        return False  # insert_kv_cache sees that they lie as it wants them
    else:
        result = linear.outputs[0]
    parts = emit(attention, "Split", [result, ints_constant(graph, sizes)], n_results=3, axis=1)
    operands: list[ir.Value | None] = []
    for part, turn, heads in zip(parts, turns, (settings["num_heads"], n_kv, n_kv), strict=True):
        how = attributes_of(turn) | {"num_heads": heads} if turn else {}
        operands.append(emit(attention, "llmc.Rotary", [part, *turn.inputs[1:]], **how)[0] if turn else part)
    operands += attention.inputs[3:]
    settings |= {"kv_num_heads": n_kv}
    replace(attention.outputs[0], emit(attention, op_name(attention), operands, like=attention, **settings)[0])
    return True


def common_product(ends: Iterable[ir.Value | None]) -> ir.Node | None:
    """The one Linear of whose results all of these values are made."""
    found = set()
    for value in ends:
        node = producer(value)
        while node is not None and op_name(node) in CHOOSES:
            node = producer(node.inputs[0])
        found.add(node)
    linear = found.pop()
    return linear if not found and linear is not None and op_name(linear) in LINEAR else None


def columns(product: ir.Value, ends: Sequence[ir.Value | None], users: Sequence[ir.Node]) -> list[Array] | None:
    """Which columns of the product the ends [M, …] hold; None where something else reads a column too, or changes
    it."""
    between = reached(product)
    uses = [use.node for node in between for result in node.outputs for use in result.uses()]
    uses += [use.node for use in product.uses()]
    if any(node not in between and node not in users for node in uses):
        return None
    if any(result.is_graph_output() for node in between for result in node.outputs):
        return None
    return chosen_columns(product, ends)


def chosen_columns(product: ir.Value, ends: Sequence[ir.Value | None]) -> list[Array]:
    """The same, of ends that are known to be elements of the product."""
    places, found = np.arange(width(product), dtype=np.float32)[None], list[Array]()
    for value in ends:
        assert value is not None
        part = extract(value, [product])
        for each in (*part.graph.inputs, *(v for node in part.graph for v in node.outputs)):
            each.shape = None  # of one token
        found += runner(part)({str(product.name): places}).values()
    return [np.rint(each).astype(np.int64).reshape(-1) for each in found]


def reached(value: ir.Value) -> list[ir.Node]:
    """Nodes that choose among the value's elements, one after the other."""
    queue, found = [value], dict[ir.Node, None]()
    while queue:
        for use in queue.pop().uses():
            if op_name(use.node) in CHOOSES and use.idx == 0 and use.node not in found:
                found[use.node] = None
                queue += use.node.outputs
    return list(found)


def distinct_heads(keys_values: Sequence[Array], n_heads: int) -> int:
    """How many key heads are left when neighbours that are copies of each other count once."""
    for n in range(1, n_heads):
        if n_heads % n == 0:
            groups = [each.reshape(n, n_heads // n, -1) for each in keys_values]
            if all((group == group[:, :1]).all() for group in groups):
                return n
    return n_heads


def width(product: ir.Value) -> int:
    size = dims(product)[1]
    assert isinstance(size, int)
    return size


def ordered(graph: ir.Graph, linear: ir.Node, chosen: Array) -> ir.Value:
    """The product with these columns."""
    x, *weights = linear.inputs
    rows = [rows_of(weight_of(value), chosen) for value in weights]
    return emit(linear, op_name(linear), [x, *(add_constant(graph, each, str(each.name)) for each in rows)])[0]


def rows_of(weight: Weight | None, chosen: Array) -> Weight:
    assert weight is not None, "a Linear has one"
    shape, made_of = (len(chosen), *weight.dims[1:]), ("rows", chosen.tobytes(), weight)
    name = f"{weight.name}.ordered"
    return Weight.computed(name, shape, lambda: weight.unrounded()[chosen], weight.stored_dtype, made_of, weight.coded)
