"""Recognise attention by its structure, and let its mask go.

rewrite:
    MatMul(Softmax(Add(Mul(MatMul(q, Transpose(k)), s), mask)), v)      k, v perhaps repeated for groups of heads
    -->
    Attention(q, k, v, is_causal=1, scale=s)

    Attention(q, k, v, mask)
    -->
    Attention(q, k, v, is_causal=1)

    MatMul(Softmax(Add(Add(MatMul(q, Transpose(k)), bias), mask)), v)      bias [heads, 1, sequence], slope · key
    -->
    llmc.AlibiAttention(q, k, v, slopes)

    of an encoder, whose mask shows all keys:
    MatMul(Softmax(Add(MatMul(q, Transpose(k)), Transpose(Gather(table, buckets)))), v)      buckets by key - query
    -->
    llmc.DistanceAttention(q, k, v, biases)                                                 biases [heads, 2 C]
refuses: a mask that is not causal, with or without a sliding window; a bias that is not linear in the key's position,
or is merged with a mask; one that is looked up otherwise than by distance, in a decoder, or within an encoder's window;
scores that are changed otherwise than by a scale, a softcap, such a bias and a mask.

Scales of queries and keys count, wherever they stand. The node says in its metadata the index of its layer and the
window, as the exporter's do (compiler/frontend/export).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import onnx_ir as ir

from llmc.compiler.frontend.embedding import BOTH_WAYS
from llmc.compiler.graph import add_constant, attribute, emit, ints_constant, number, producer, prune, replace
from llmc.compiler.graph.causal_mask import (
    ALIBI,
    LONGEST,
    MASKED,
    adds_alibi,
    enough_tokens,
    evaluated,
    read_mask,
    window_of,
)
from llmc.compiler.graph.probe import sized_values
from llmc.compiler.graph.shapes import dims
from llmc.compiler.ops.define import Dims
from llmc.compiler.weights import Array, Weight
from llmc.passes.attention_bias import Bias, is_row, read_slopes, refuse_merged
from llmc.passes.distance_bias import looked_up, read_distances
from llmc.runtime.errors import LlmcError

EXPECTED = "expected softmax(scale * q @ k^T + causal mask) @ v"


def form_attention(model: ir.Model, *, n_context: int) -> int:
    """Assumes shapes, written as resolve_shapes does; no cache. Leaves each attention as one node, causal but in an
    encoder, its q, k and v [batch, heads, sequence, D]. Returns the number of attentions formed."""
    graph = model.graph
    forming = Forming(graph, n_context, both_ways=BOTH_WAYS in model.metadata_props)
    n_rewrites = 0
    for node in list(graph):
        if node.graph is None:
            continue
        if node.op_type == "Attention":
            n_rewrites += forming.standard(node)
        elif node.op_type == "Softmax" and is_scores(node.inputs[0]):
            forming.spelled_out(node)
            n_rewrites += 1
    prune(reversed(graph))
    return n_rewrites


def is_scores(value: ir.Value | None) -> bool:
    return [str(size) for size in dims(value)[-2:]] == ["sequence", "sequence"]


@dataclass
class Scores:
    """What scores are made of: scale * q @ k^T [softcapped], plus bias and mask.  product: the node of q @ k^T."""

    product: ir.Node
    scale: float = 1.0
    softcap: float = 0.0
    masks: list[object] = field(default_factory=list)
    biases: list[Bias] = field(default_factory=list)
    looked_up: list[ir.Value] = field(default_factory=list)


class Forming:
    """The attentions of one graph.  both_ways: whether it is an encoder's."""

    def __init__(self, graph: ir.Graph, n_context: int, *, both_ways: bool = False) -> None:
        self.graph, self.n_context, self.both_ways = graph, n_context, both_ways
        self.sized = sized_values(graph)
        self.windows: dict[tuple[object, ...], int] = {}  # by how a mask is applied
        self.slopes: dict[tuple[object, ...], Array | None] = {}  # by what is added
        self.distances: dict[ir.Value, Weight] = {}  # by what is added
        self.n_layers = 0

    def emit(
        self,
        before: ir.Node,
        operands: list[ir.Value | None],
        window: int,
        scale: float,
        softcap: float,
        slopes: Array | None = None,
        distances: Weight | None = None,
    ) -> ir.Value:
        """operands: q, k, v."""
        settings: dict[str, Any] = {"scale": scale, "softcap": softcap}
        if distances is not None:
            biases = add_constant(self.graph, distances, str(distances.name))
            result = emit(before, "llmc.DistanceAttention", [*operands, biases], **settings)[0]
        elif slopes is None:
            result = emit(before, "Attention", operands, is_causal=int(not self.both_ways), **settings)[0]
        else:
            of_heads = add_constant(self.graph, slopes, "slopes")
            result = emit(before, "llmc.AlibiAttention", [*operands, of_heads], window=window, **settings)[0]
        node = result.producer()
        assert node is not None
        node.metadata_props.update({"llmc.layer": str(self.n_layers), "llmc.window": str(window)})
        self.n_layers += 1
        return result

    # -- an Attention node ---------------------------------------------------------------------------------------

    def standard(self, node: ir.Node) -> bool:
        """An Attention node stays, without its mask and what repeats keys and values; packed heads are split."""
        place = f"node {node.name}"
        q, k, v, *more = node.inputs
        mask, cache = (more or [None])[0], more[1:]
        if "llmc.layer" in node.metadata_props:
            self.n_layers += 1
            return False
        if any(value is not None and 0 not in dims(value) for value in cache) or q is None or k is None or v is None:
            raise LlmcError("the Attention has a cache of its own", place=place)
        if len(dims(q)) == 3:
            heads = [attribute(node, name) for name in ("q_num_heads", "kv_num_heads", "kv_num_heads")]
            q, k, v = (split_heads(node, value, n) for value, n in zip((q, k, v), heads, strict=True))
        causal = bool(attribute(node, "is_causal", 0))
        window = 0 if mask is None else self.window(("given", mask, causal), mask, None, place, causal=causal)
        if mask is None and not causal:
            raise LlmcError("the Attention is not causal and has no mask", place=place)
        scale = attribute(node, "scale") or float(dims(q)[-1]) ** -0.5  # type: ignore[arg-type]
        softcap = float(attribute(node, "softcap", 0.0))
        operands: list[ir.Value | None] = [q, unrepeated(k), unrepeated(v)]
        result = self.emit(node, operands, window, scale=float(scale), softcap=softcap)
        replace(node.outputs[0], result if len(dims(node.inputs[0])) == 4 else join_heads(node, result))
        return True

    def window(
        self, key: tuple[object, ...], result: ir.Value, scores: ir.Value | None, place: str, **more: Any
    ) -> int:
        if key not in self.windows and self.both_ways:
            biases = more.get("biases", ())
            cut = (*([scores] if scores is not None else []), *biases)
            enough_tokens(result, cut, self.n_context, place)
            counts = evaluated(result, scores, biases, min(self.n_context, LONGEST), place)
            self.windows[key] = window_of(counts, place)
        elif key not in self.windows:
            self.windows[key] = read_mask(result, scores, self.n_context, place, **more)
        return self.windows[key]

    def distances_of(self, scores: Scores, n_heads: int, window: int, place: str) -> Weight | None:
        """What is added to scores by distance."""
        if not scores.looked_up:
            return None
        value, *others = scores.looked_up
        if others or scores.biases or scores.softcap or window or not self.both_ways:
            fact = "a bias that is looked up stands beside another one, a softcap or a window, or in a decoder"
            raise LlmcError(f"the attention is not compiled: {fact}", place=place)
        if value not in self.distances:
            self.distances[value] = read_distances(value, n_heads, self.n_context, place)
        return self.distances[value]

    def slopes_of(self, scores: Scores, n_heads: int, place: str) -> Array | None:
        key = tuple(scores.biases)
        if key and key not in self.slopes:
            self.slopes[key] = read_slopes(self.graph, key, n_heads, self.n_context, place)
        return self.slopes.get(key)

    # -- softmax between two products ----------------------------------------------------------------------------

    def spelled_out(self, softmax: ir.Node) -> None:
        place = f"node {softmax.name}"
        scores, after = self.around(softmax, place)
        product, transposed = scores.product.outputs[0], scores.product.inputs[1]
        assert softmax.inputs[0] is not None
        if ("applied", *scores.masks) not in self.windows:
            refuse_merged(self.graph, scores.masks, place)
        biases = [*(bias for bias, _ in scores.biases), *scores.looked_up]
        window = self.window(("applied", *scores.masks), softmax.inputs[0], product, place, biases=biases)
        q, of_q = unscaled(scores.product.inputs[0])
        k, of_k = unscaled(transposed)
        k = turned(after, k)
        k, of_k2 = unscaled(k)
        q, k, v = (with_heads(value) for value in (q, k, after.inputs[1]))
        results = [after.outputs[0]] if len(dims(after.outputs[0])) == 4 else split_again(after.outputs[0])
        if v is None or q is None or k is None or not results:
            raise LlmcError("the attention's operands have no axis of heads", place=place, hint=EXPECTED)
        scale = scores.scale * of_q * of_k * of_k2
        n_heads = dims(q)[1]
        assert isinstance(n_heads, int)
        of_heads = self.slopes_of(scores, n_heads, place), self.distances_of(scores, n_heads, window, place)
        result = self.emit(after, [q, unrepeated(k), unrepeated(v)], window, scale, scores.softcap, *of_heads)
        for each in results:
            replace(each, result)

    def around(self, softmax: ir.Node, place: str) -> tuple[Scores, ir.Node]:
        """The scores in front of a softmax, and the product with the values behind it.  Raises LlmcError: not there."""
        scores, after = self.scores(softmax.inputs[0]), self.product_of(softmax.outputs[0])
        is_over_keys = attribute(softmax, "axis", -1) in (-1, len(dims(softmax.inputs[0])) - 1)
        if scores is not None and after is not None and is_over_keys:
            return scores, after
        if adds_alibi(softmax.inputs[0], self.sized):
            raise LlmcError(ALIBI, place=place)
        missing = "scores" if scores is None else "a product with the values"
        fact = f"the attention around a Softmax is not recognised: {EXPECTED}, and found no {missing} of this kind"
        raise LlmcError(fact, place=place, hint="export with attn_implementation='sdpa' or 'eager'")

    def scores(self, value: ir.Value | None) -> Scores | None:
        """Follow the scores from the softmax back to q @ k^T, and collect what is done to them on the way."""
        scale, softcap, masks, biases, tables = 1.0, 0.0, list[object](), list[Bias](), list[ir.Value]()
        while (node := producer(value)) is not None:
            a, b = (*node.inputs, None)[:2]
            if node.op_type == "MatMul":
                return Scores(node, scale, softcap, masks, biases, tables)
            if node.op_type == "Add" and (a in self.sized) != (b in self.sized):
                added, value = (a, b) if a in self.sized else (b, a)
                if added is not None and is_row(added) and not softcap:
                    biases.append((added, scale))
                elif added is not None and scale == 1.0 and looked_up(added) is not None:
                    tables.append(added)
                else:
                    masks += ["Add", added]
            elif node.op_type == "Where" and a in self.sized and (b in self.sized) != (node.inputs[2] in self.sized):
                which = 2 if b in self.sized else 1
                masks += ["Where", which, *(operand for operand in node.inputs if operand in self.sized)]
                value = node.inputs[which]
            elif softcap == 0.0 and scale == 1.0 and (capped := softcapped(node)) is not None:
                value, softcap, scale = capped
            elif (factor := factor_of(node)) is not None:
                value, scale = factor[0], scale * factor[1]
            elif node.op_type == "Max" and (least := number(b)) is not None and least <= MASKED:
                value, masks = a, [*masks, "Max", b]
            elif node.op_type in ("Cast", "Identity") or (node.op_type == "Reshape" and is_scores(a)):
                value = a
            else:
                break
        return None

    def product_of(self, probabilities: ir.Value) -> ir.Node | None:
        """The product with the values, behind a guard against rows of NaN if there is one: a causal mask makes none."""
        value = probabilities
        while True:
            users = [use for use in value.uses() if use.node.op_type != "IsNaN"]
            if len(users) != 1:
                return None
            node, index = users[0].node, users[0].idx
            if node.op_type == "MatMul" and index == 0:
                return node
            guard = node.op_type == "Where" and index == 2 and producer(node.inputs[0], "IsNaN") is not None
            merges = node.op_type == "Reshape" and is_scores(node.outputs[0])
            if not guard and not merges and node.op_type not in ("Cast", "Identity", "Dropout"):
                return None
            value = node.outputs[0]


def factor_of(node: ir.Node) -> tuple[ir.Value, float] | None:
    """x and c, if the node is x * c or x / c."""
    a, b = (*node.inputs, None)[:2]
    if a is None or b is None or node.op_type not in ("Mul", "Div"):
        return None
    c = number(b)
    if c is not None:
        return a, c if node.op_type == "Mul" else 1 / c
    c = number(a)
    return (b, c) if c is not None and node.op_type == "Mul" else None


def softcapped(node: ir.Node) -> tuple[ir.Value, float, float] | None:
    """x, c and s, if the node is c * tanh(s * x / c)."""
    outer = factor_of(node)
    tanh = producer(outer[0], "Tanh") if outer is not None else None
    divided = producer(tanh.inputs[0]) if tanh is not None else None
    inner = factor_of(divided) if divided is not None else None
    if outer is None or inner is None:
        return None
    scale = outer[1] * inner[1]
    return inner[0], outer[1], 1.0 if abs(scale - 1) < 1e-5 else scale


def unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """The value before it was multiplied by a number, and the number."""
    scale = 1.0
    while (node := producer(value, "Mul", "Div")) is not None and (factor := factor_of(node)) is not None:
        value, scale = factor[0], scale * factor[1]
    return value, scale


def turned(before: ir.Node, transposed: ir.Value | None) -> ir.Value | None:
    """k [batch, heads, sequence, D] from k^T, through the Transpose that made it."""
    if transposed is None:
        return None
    node = producer(transposed, "Transpose")
    perm = list(attribute(node, "perm") or ()) if node is not None else []
    if len(dims(transposed)) != 4:
        return node.inputs[0] if node is not None and perm == [0, 2, 1] else None
    if node is not None and perm == [0, 1, 3, 2]:
        return node.inputs[0]
    if node is not None and len(perm) == 4:
        return emit(before, "Transpose", [node.inputs[0]], perm=[perm[i] for i in (0, 1, 3, 2)])[0]
    outer = producer(transposed, "Reshape")  # k^T as [batch * heads, D, sequence] in between
    inner = producer(outer.inputs[0], "Transpose") if outer is not None else None
    flat = producer(inner.inputs[0], "Reshape") if inner is not None else None
    if flat is not None and inner is not None and list(attribute(inner, "perm")) == [0, 2, 1]:
        k, wanted = flat.inputs[0], [dims(transposed)[i] for i in (0, 1, 3, 2)]
        if list(dims(k)) == wanted:
            return k
    return emit(before, "Transpose", [transposed], perm=[0, 1, 3, 2])[0]


def with_heads(value: ir.Value | None) -> ir.Value | None:
    """The value as [batch, heads, sequence, D], where it may be [batch * heads, sequence, D]; None if it is neither."""
    if len(dims(value)) == 4:
        return value
    merged = producer(value, "Reshape")
    apart = merged.inputs[0] if merged is not None else None
    return apart if apart is not None and splits_first(dims(apart), dims(value)) else None


def split_again(value: ir.Value) -> list[ir.Value]:
    """The value [batch, heads, sequence, D] that a value [batch * heads, sequence, D] is reshaped into, if all of its
    users reshape it so."""
    found = [use.node.outputs[0] for use in value.uses() if use.node.op_type == "Reshape"]
    fits = len(found) == len(value.uses()) and all(splits_first(dims(each), dims(value)) for each in found)
    return found if fits else []


def splits_first(apart: Dims, merged: Dims) -> bool:
    """Whether the first shape is the second one with its first axis split in two."""
    if len(apart) != 4 or len(merged) != 3 or apart[2:] != merged[1:]:
        return False
    return str(merged[0]) == (str(apart[0]) if apart[1] == 1 else f"{apart[0]}*{apart[1]}")


def unrepeated(value: ir.Value) -> ir.Value:
    """Keys or values before they were repeated for each query head of a group."""
    outer = producer(value, "Reshape")
    expand = producer(outer.inputs[0], "Expand") if outer is not None else None
    inner = producer(expand.inputs[0], "Unsqueeze", "Reshape") if expand is not None else None
    if expand is None or inner is None or inner.inputs[0] is None:
        return value
    narrow, wide, x = dims(expand.inputs[0]), dims(expand.outputs[0]), inner.inputs[0]
    if len(wide) != 5 or narrow[2] != 1 or (*narrow[:2], *narrow[3:]) != (*wide[:2], *wide[3:]):
        return value
    heads = prod(size for size in wide[1:3] if isinstance(size, int))
    fits = dims(value) == (wide[0], heads, *wide[3:]) and dims(x) == (*wide[:2], *wide[3:])
    return x if fits else value


def split_heads(before: ir.Node, value: ir.Value, n_heads: int) -> ir.Value:
    """[batch, sequence, heads * D] as [batch, heads, sequence, D]."""
    graph = before.graph
    assert isinstance(graph, ir.Graph)
    width = dims(value)[-1]
    assert isinstance(width, int)
    apart = emit(before, "Reshape", [value, ints_constant(graph, [0, 0, n_heads, width // n_heads])])[0]
    return emit(before, "Transpose", [apart], perm=[0, 2, 1, 3])[0]


def join_heads(before: ir.Node, value: ir.Value) -> ir.Value:
    """The other way round."""
    graph = before.graph
    assert isinstance(graph, ir.Graph)
    heads, size = dims(value)[1], dims(value)[3]
    assert isinstance(heads, int)
    assert isinstance(size, int)
    apart = emit(before, "Transpose", [value], perm=[0, 2, 1, 3])[0]
    return emit(before, "Reshape", [apart, ints_constant(graph, [0, 0, heads * size])])[0]
