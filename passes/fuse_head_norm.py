"""Let attention normalise the heads of its queries and keys, so that what a product wrote is read once.

rewrite:
    q, k, v = Split(qkv)
    q = Reshape(RMSNormalization(Reshape(q, [-1, H, D]), wq), [-1, H·D])
    k = Reshape(RMSNormalization(Reshape(k, [-1, KH, D]), wk), [-1, KH·D])
    llmc.{Rotary}PagedAttention(Concat(q, k, v), …)
    -->
    llmc.RMSNorm{Rotary}PagedAttention(qkv, wq, wk, …)

    the same with v = Reshape(RMSNormalization(Reshape(v, [-1, KH, DV]), 1, …, 1), [-1, KH·DV]):
    llmc.RMSNormValues{Rotary}PagedAttention(qkv, wq, wk, …)

    the same of llmc.{Rotary}BidirectionalPagedAttention

    llmc.{Rotary}AppendedAttention(Reshape(RMSNormalization(Reshape(q, [-1, H, D]), wq), [-1, H·D]), …)
    -->
    llmc.RMSNorm{Rotary}AppendedAttention(q, wq, …)
refuses: a norm over other than a head's D elements (OLMo 2 normalises all H·D together), with weights of each head's
own, or with another user; queries normalised without keys, or the other way round, or with another epsilon.
"""

from __future__ import annotations

from itertools import product

import onnx_ir as ir

from llmc.compiler.graph import attribute, constant, emit, is_last_axis, op_name, producer, replace, used_once
from llmc.compiler.graph.shapes import attributes_of, dims
from llmc.compiler.ops import appended_attention_name, paged_attention_name
from llmc.compiler.weights import Weight
from llmc.passes.insert_kv_cache import packed

FUSED = {
    f"llmc.{paged_attention_name(False, *rest)}": f"llmc.{paged_attention_name(True, *rest)}"
    for rest in product((False, True), repeat=2)  # whether it turns queries and keys, whether it has sinks
} | {
    f"llmc.{paged_attention_name(False, rotary, both_ways=True)}": (
        f"llmc.{paged_attention_name(True, rotary, both_ways=True)}"
    )
    for rotary in (False, True)
}
WITH_VALUES = {
    f"llmc.{paged_attention_name(True, rotary)}": f"llmc.{paged_attention_name(True, rotary, values=True)}"
    for rotary in (False, True)
}
OF_QUERIES = {
    f"llmc.{appended_attention_name(False, *rest)}": f"llmc.{appended_attention_name(True, *rest)}"
    for rest in product((False, True), repeat=2)
}


def fuse_head_norm(model: ir.Model) -> int:
    """Assumes paged attention; leaves none in front of which queries and keys are normalised head by head in the same
    way.  Returns the number of layers."""
    n_rewrites = 0
    for node in list(model.graph):
        if (op_name(node) in FUSED and fuse(node)) or (op_name(node) in OF_QUERIES and fuse_queries(node)):
            n_rewrites += 1
    return n_rewrites


def fuse(node: ir.Node) -> bool:
    whole = producer(node.inputs[0], "Concat")
    if whole is None or len(whole.inputs) != 3 or not used_once(whole.outputs[0]):
        return False
    settings = attributes_of(node)
    q, k, v = whole.inputs
    of_q = head_norm(q, settings["num_heads"], settings["head_dim"])
    of_k = head_norm(k, settings["kv_num_heads"], settings["head_dim"])
    if of_q is None or of_k is None or (epsilon := epsilon_of(of_q[0])) != epsilon_of(of_k[0]):
        return False
    name = FUSED[op_name(node)]
    of_v = bare_norm(v, settings["kv_num_heads"], epsilon)
    if of_v is not None and name in WITH_VALUES:
        name, v = WITH_VALUES[name], of_v
    qkv = packed(whole, of_q[1], of_k[1], v)
    operands = [qkv, of_q[0].inputs[1], of_k[0].inputs[1], *node.inputs[1:]]
    put_in(node, name, operands, epsilon)
    return True


def fuse_queries(node: ir.Node) -> bool:
    settings = attributes_of(node)
    found = head_norm(node.inputs[0], settings["num_heads"], settings["head_dim"])
    if found is None:
        return False
    norm, q = found
    put_in(node, OF_QUERIES[op_name(node)], [q, norm.inputs[1], *node.inputs[1:]], epsilon_of(norm))
    return True


def put_in(node: ir.Node, op: str, operands: list[ir.Value | None], epsilon: float) -> None:
    """Put an attention that normalises in the node's place."""
    settings = attributes_of(node)
    results = emit(node, op, operands, n_results=len(node.outputs), like=node, **settings, epsilon=epsilon)
    for before, after in zip(node.outputs, results, strict=True):
        after.name = before.name
        replace(before, after)


def epsilon_of(norm: ir.Node) -> float:
    return float(attribute(norm, "epsilon", 1e-5))


def head_norm(value: ir.Value | None, n_heads: int, head_dim: int) -> tuple[ir.Node, ir.Value] | None:
    """The RMSNormalization of each head that made `value` [M, n_heads · D], and what it normalised, of that shape."""
    norm_of = flattened(value)
    norm = producer(norm_of, "RMSNormalization")
    if norm is None or norm_of is None or not used_once(norm_of) or len(norm.inputs) != 2:
        return None
    x, weight = norm.inputs
    if x is None or weight is None or constant(weight) is None or dims(weight) != (head_dim,):
        return None
    is_headed = dims(x)[1:] == (n_heads, head_dim) or (n_heads == 1 and dims(x)[1:] == (head_dim,))
    if not is_headed or not is_last_axis(norm, attribute(norm, "axis", -1)):
        return None
    reshape = producer(x, "Reshape")
    source = reshape.inputs[0] if reshape is not None else x
    return (norm, source) if source is not None and dims(source)[1:] == (n_heads * head_dim,) else None


def bare_norm(value: ir.Value | None, n_heads: int, epsilon: float) -> ir.Value | None:
    """What `value` [M, n_heads · DV] was before its heads were normalised with weights of 1; None if they were not."""
    size = dims(value)[1]
    assert isinstance(size, int)
    found = head_norm(value, n_heads, size // n_heads)
    weight = constant(found[0].inputs[1]) if found is not None else None
    if found is None or weight is None or epsilon_of(found[0]) != epsilon:
        return None
    is_one = not isinstance(weight, Weight) and bool((weight.numpy() == 1).all())  # no weight is read here
    return found[1] if is_one else None


def flattened(value: ir.Value | None) -> ir.Value | None:
    """The value in front of a Reshape that has no other user; else the value itself."""
    reshape = producer(value, "Reshape")
    return reshape.inputs[0] if reshape is not None and value is not None and used_once(value) else value
