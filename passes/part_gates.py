"""Give the gates of a layer with a state a product of their own, where they are a few rows of a large one.

rewrite:
    y, …, gates = Split(llmc.Linear(x, W), [a, …, c], axis=-1),  llmc.Stateful…Rule(…, gates, …)
    -->
    y, … = Split(llmc.Linear(x, W[:-c]), [a, …], axis=-1)
    gates = llmc.Linear(x, W[-c:])
    likewise of a product that is multiplied by a constant for each column in between
refuses: gates that are not the last part, or all parts; a product that somebody takes whole; one that adapters add to
(LlmcError).

Gates say how much of a state is kept, and how much of a token goes in.  For quantised weights: those of gates are not
quantised (quantize_weights.py), and they are one in a hundred of Mamba 2's product, the largest of its layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from llmc.compiler.graph import (
    add_constant,
    constant,
    emit,
    ints_constant,
    op_name,
    producer,
    replace,
    used_once,
    weight_of,
)
from llmc.compiler.graph.shapes import dims
from llmc.compiler.ops import DOMAIN, GATED_RULES, low_rank_name
from llmc.passes.order_columns import LINEAR
from llmc.runtime.errors import LlmcError

ADAPTED = f"{DOMAIN}.{low_rank_name()}"
RULES = tuple(f"{DOMAIN}.Stateful{name}" for name in GATED_RULES)
"""Operators whose second and third input are gates."""


def part_gates(model: ir.Model) -> int:
    """Assumes a step graph, before it is quantised.  Returns the number of products that became two."""
    gates: set[ir.Value] = set()
    for node in model.graph:
        if op_name(node) in RULES:
            gates |= values_before(node.inputs[1:3])
    return sum(part(model.graph, node, gates) for node in list(model.graph) if op_name(node) == "Split")


def values_before(values: Sequence[ir.Value | None]) -> set[ir.Value]:
    """All values of which these are made, back to the nearest linear layer or Split."""
    found: set[ir.Value] = set()
    queue = list(values)
    while queue:
        value = queue.pop()
        if value is None or value in found:
            continue
        found.add(value)
        node = value.producer()
        if node is not None and op_name(node) not in (*LINEAR, "Split"):
            queue += node.inputs
    return found


def part(graph: ir.Graph, split: ir.Node, gates: set[ir.Value]) -> bool:
    """Give the last parts of a split product each a product of its own, if these and no others are gates; returns
    whether it has."""
    linear, factors = scaled_product(split.inputs[0])
    n_kept = next((i for i, value in enumerate(split.outputs) if value in gates), 0)
    if linear is None or n_kept == 0 or not all(value in gates for value in split.outputs[n_kept:]):
        return False
    if op_name(linear) == ADAPTED:
        fact = "an adapter that stays beside quantised weights cannot change what says how a state goes on"
        place = f"weight {linear.inputs[3] and linear.inputs[3].name}".removesuffix(".lora_a")
        raise LlmcError(fact, place=place, hint="merge it into the weights: --adapter FOLDER, without a name")
    sizes = [size for value in split.outputs if isinstance(size := dims(value)[-1], int)]

    def product(first: int, last: int) -> ir.Value:
        columns = sum(sizes[:first]), sum(sizes[:last])
        x, *weights = linear.inputs
        made = emit(linear, op_name(linear), [x, *(rows(graph, value, *columns) for value in weights)])[0]
        return made if factors is None else emit(split, "Mul", [made, rows(graph, factors, *columns)])[0]

    parts = [product(0, n_kept)]
    if n_kept > 1:
        parts = emit(split, "Split", [*parts, ints_constant(graph, sizes[:n_kept])], n_results=n_kept, axis=-1)
    parts += [product(i, i + 1) for i in range(n_kept, len(sizes))]
    for old, new in zip(list(split.outputs), parts, strict=True):
        replace(old, new)
    return True


def rows(graph: ir.Graph, value: ir.Value | None, start: int, stop: int) -> ir.Value:
    """Rows of a weight, as a constant."""
    weight = weight_of(value)
    assert weight is not None, "a Linear has one"
    some = weight.slice(start, stop)
    return add_constant(graph, some, str(some.name))


def scaled_product(value: ir.Value | None) -> tuple[ir.Node | None, ir.Value | None]:
    """The linear layer, or what adapters add to one, that makes the value, and the constant [columns] by which its
    result is multiplied, if it is; None, None if another node reads it on the way."""
    factors = None
    if value is not None and used_once(value) and (scaled := producer(value, "Mul")) is not None:
        value, factors = scaled.inputs if constant(scaled.inputs[1]) is not None else scaled.inputs[::-1]
        if constant(factors) is None or dims(factors) != dims(value)[-1:]:
            return None, None
    linear = value.producer() if value is not None and used_once(value) else None
    return (linear, factors) if linear is not None and op_name(linear) in (*LINEAR, ADAPTED) else (None, None)
