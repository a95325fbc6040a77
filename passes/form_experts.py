"""Recognise a mixture of experts that is written as one product for all of them.

rewrite:
    v, index = TopK(logits, 1)
    s = Sigmoid(ScatterElements(-inf, index, v, axis=1))                  logits, s [batch·sequence, E]
    x' = Reshape(Mul(Tile(x, [E, 1]), Reshape(Transpose(s), [-1, 1])), [E, -1, K])
    gate, up = Split(MatMul(x', W))                                       W [E, K, 2N], V [E, N, K]
    ReduceSum(MatMul(Mul(up, Silu(gate)), V), [0])
    -->
    h = Mul(x, Sigmoid(ReduceMax(logits, [-1])))
    llmc.ExpertsSilu(h, index, Softmax(v), Transpose(W), Transpose(V))
refuses: several experts for a token; scores but the sigmoid of the chosen logit and 0; up before gate; another gate.
A model with other products for all experts at once is refused by name.

Llama 4 has it so: every token goes to every expert, multiplied by a score that is 0 for all experts but one, and what
an expert makes of 0 is 0.  As scores are multiplied in before the gate, they are not the operator's shares: those are
1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from llmc.compiler.graph import attribute, emit, ints_constant, is_last_axis, producer, prune, replace
from llmc.compiler.graph.shapes import dims, ints
from llmc.compiler.ops import experts_name
from llmc.passes.form_activation import gelu, silu
from llmc.passes.form_groups import filled_with, takes_largest
from llmc.passes.slices import size_of
from llmc.runtime.errors import LlmcError


def form_experts(model: ir.Model) -> int:
    """Assumes the exported graph, with shapes; leaves one node for each such mixture.  Returns their number.  Raises
    LlmcError for another mixture in this form."""
    n_rewrites = 0
    for node in list(model.graph):
        found = mixture(node) if node.op_type == "ReduceSum" else None
        if found is None:
            continue
        last = ints_constant(model.graph, [-1])
        score = emit(node, "Sigmoid", emit(node, "ReduceMax", [found.chosen.inputs[0], last], keepdims=1))[0]
        x = emit(node, "Mul", [found.x, score])[0]
        one = emit(node, "Softmax", [found.chosen.outputs[0]], axis=-1)[0]
        weights = [emit(node, "Transpose", [weight], perm=[0, 2, 1])[0] for weight in (found.gate_up, found.down)]
        operands = [x, found.chosen.outputs[1], one, *weights]
        replace(node.outputs[0], emit(node, f"llmc.{experts_name(found.activation)}", operands)[0])
        n_rewrites += 1
    prune(reversed(model.graph))
    refuse_others(model.graph)
    return n_rewrites


def refuse_others(graph: ir.Graph) -> None:
    for node in graph:
        x, weight = (*node.inputs, None)[:2]
        is_product = node.op_type == "MatMul" and len(dims(x)) == len(dims(weight)) == 3
        if weight is None or not is_product or not weight.is_initializer():
            continue
        if size_at(dims(x), 0) > 1 and not size_at(dims(x), 1):
            raise LlmcError(
                "its experts are one product for all of them, in a form that is not compiled: expected one expert a "
                "token, x times the sigmoid of its logit, silu(gate) * up",
                place=f"weight {weight.name}",
            )


class Mixture(NamedTuple):
    """x [T, K], the TopK of its router, W [E, K, 2N] and V [E, N, K]."""

    x: ir.Value
    chosen: ir.Node
    gate_up: ir.Value
    down: ir.Value
    activation: str


def mixture(total: ir.Node) -> Mixture | None:
    """The mixture whose results a ReduceSum over experts sums up; None if it sums up something else."""
    if ints(total.inputs[1]) != [0] or attribute(total, "keepdims", 1):
        return None
    after = producer(same_shape(total.inputs[0]), "MatMul")
    gated = producer(after.inputs[0], "Mul") if after is not None else None
    if after is None or gated is None:
        return None
    for up, active in (gated.inputs, gated.inputs[::-1]):
        gate, activation = activated(active)
        split = producer(gate, "Split")
        if split is None or list(split.outputs) != [gate, up] or not is_last_axis(split, attribute(split, "axis", 0)):
            continue
        before = producer(split.inputs[0], "MatMul")
        scaled = scored(before.inputs[0]) if before is not None else None
        if before is None or scaled is None or activation is None:
            return None
        gate_up, down = before.inputs[1], after.inputs[1]
        if gate_up is None or down is None or not has_weights(gate_up, down):
            return None
        x, chosen = scaled
        return Mixture(x, chosen, gate_up, down, activation)
    return None


def same_shape(value: ir.Value | None) -> ir.Value | None:
    """The value in front of a Reshape or an Expand that changes nothing; else the value itself."""
    node = producer(value, "Reshape", "Expand")
    same = node is not None and len(dims(value)) == len(dims(node.inputs[0])) and dims(value) == dims(node.inputs[0])
    return node.inputs[0] if node is not None and same else value


def has_weights(gate_up: ir.Value, down: ir.Value) -> bool:
    """Whether both are weights of experts, [E, K, 2N] and [E, N, K]."""
    one, other = dims(gate_up), dims(down)
    if len(one) != 3 or len(other) != 3 or gate_up.producer() is not None or down.producer() is not None:
        return False
    return one[:2] == (other[0], other[2]) and one[2] == 2 * size_at(other, 1)


def size_at(shape: tuple[object, ...], axis: int) -> int:
    size = shape[axis]
    return size if isinstance(size, int) else 0


def activated(value: ir.Value | None) -> tuple[ir.Value | None, str | None]:
    """The gate's operand, and the name that operators have for its activation; None if it is not activated."""
    node = producer(value, "Mul")
    if node is None:
        return None, None
    if (gate := silu(node)) is not None:
        return gate, "Silu"
    found = gelu(node)
    return (found[0], "GeluTanh" if found[1] == "tanh" else "Gelu") if found is not None else (None, None)


def scored(value: ir.Value | None) -> tuple[ir.Value, ir.Node] | None:
    """x [T, K] and the TopK of its router, if the value [E, T, K] is x times each expert's score."""
    apart = producer(value, "Reshape")
    product = producer(apart.inputs[0], "Mul") if apart is not None else None
    if value is None or product is None or len(dims(value)) != 3:
        return None
    experts, tokens, _ = dims(value)
    for repeated, column in (product.inputs, product.inputs[::-1]):
        tile, joined = producer(repeated, "Tile"), producer(column, "Reshape")
        turned = producer(joined.inputs[0], "Transpose") if joined is not None else None
        if tile is None or turned is None or ints(tile.inputs[1]) != [experts, 1]:
            continue
        x, chosen = same_shape(tile.inputs[0]), router(turned.inputs[0])
        fits = dims(turned.outputs[0]) == (experts, tokens) and dims(x)[:1] == (tokens,) and dims(column)[1:] == (1,)
        if x is not None and chosen is not None and fits:
            return x, chosen
    return None


def router(scores: ir.Value | None) -> ir.Node | None:
    """The TopK of one expert a token, if the scores [T, E] are the sigmoid of its logit, and 0 for all others."""
    sigmoid = producer(scores, "Sigmoid")
    scattered = producer(sigmoid.inputs[0], "ScatterElements") if sigmoid is not None else None
    if scattered is None or not is_last_axis(scattered, attribute(scattered, "axis", 0)):
        return None
    fill, index, values = scattered.inputs
    chosen = producer(values, "TopK")
    sums = attribute(scattered, "reduction", "none") not in ("none", b"none")
    if values is None or chosen is None or sums or filled_with(fill) != -np.inf:
        return None
    if list(chosen.outputs) != [values, index]:
        return None
    fits = takes_largest(chosen) and size_of(values) == 1 and dims(chosen.inputs[0]) == dims(scores)
    return chosen if fits else None
