"""Let the product that makes queries, keys and values turn them, and append keys and values to the cache itself.

rewrite:
    qkv = llmc.Linear…(x, W, …)
    out, k_out, v_out = llmc.RotaryPagedAttention(qkv, cos, sin, positions, page_table, k_cache, v_cache)
    -->
    queries, k_out, v_out = llmc.Linear…RotaryAppend(x, W, …, cos, sin, positions, page_table, k_cache, v_cache)
    out = llmc.AppendedAttention(queries, positions, page_table, k_out, v_out)

    qkv = llmc.Linear…(x, W, …)
    out, k_out, v_out = llmc.PagedAttention(qkv, positions, page_table, k_cache, v_cache)
    -->
    queries, k_out, v_out = llmc.Linear…Append(x, W, …, positions, page_table, k_cache, v_cache)
    out = llmc.AppendedAttention(queries, positions, page_table, k_out, v_out)
refuses: qkv with another user, or made by anything but a product without activation and residual (norms of queries and
keys stand between them); a cache in another dtype than what is multiplied, as one in int8; heads that a tile of 128
outputs does not hold whole; values of another size than keys; pairs that are interleaved, or whose elements are no
multiple of 8 apart.  A norm that is deferred in steps of few tokens alone is deferred no longer.

For prompts on GPUs, whose attention reads all keys from the cache: what is not written in float32 and read again is
(H + 2 KH)·D·8 bytes a token.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from llmc.compiler.bind import weight_dtype
from llmc.compiler.graph import attribute, emit, producer, prune, used_once
from llmc.compiler.graph.shapes import dims
from llmc.compiler.ops import OPERATORS, append_name, paged_attention_name

ATTENTION = {paged_attention_name(False, rotary): rotary for rotary in (False, True)}
"""Operators, and whether they turn queries and keys."""
TILE_OUTPUTS, CHUNK = 128, 8
"""Outputs of a product that finish together, and elements that are stored at once."""


def append_in_product(model: ir.Model, *, kv_dtype: str) -> int:
    """Assumes a step graph after fuse_norm_linear, quantised if it is to be; leaves no attention of that kind whose
    product could append.  kv_dtype: of the cache.  Returns the number of layers."""
    n_rewrites = 0
    for node in list(model.graph):
        front = producer(node.inputs[0]) if node.domain == "llmc" and node.op_type in ATTENTION else None
        if front is None or not fits(front, node, kv_dtype):
            continue
        rotary = ATTENTION[node.op_type]
        product = plain_name(front)
        name, inputs = append_name(product, rotary), front.inputs[: len(OPERATORS[product].inputs)]
        settings = settings_of(name, front, node)
        queries, *caches = emit(node, f"llmc.{name}", [*inputs, *node.inputs[1:]], n_results=3, like=front, **settings)
        positions, page_table = node.inputs[-4:-2]
        settings = settings_of("AppendedAttention", node)
        (out,) = emit(node, "llmc.AppendedAttention", [queries, positions, page_table, *caches], like=node, **settings)
        take_places(front, node, queries, [out, *caches])
        n_rewrites += 1
    return n_rewrites


def settings_of(name: str, *nodes: ir.Node) -> dict[str, Any]:
    """What an operator's attributes are, of the first of the nodes that has each."""
    return {key: next(attribute(n, key) for n in nodes if key in n.attributes) for key in OPERATORS[name].attributes}


def take_places(front: ir.Node, node: ir.Node, queries: ir.Value, results: list[ir.Value]) -> None:
    """Two new nodes for two old ones, under their names: what says where a plan's time goes knows them by these."""
    names = front.name, node.name
    olds = list(node.outputs)
    for old, new in zip(olds, results, strict=True):
        if old.is_graph_output():
            new.name, old.name = old.name, None
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    prune([node])
    for value, name in zip((queries, results[0]), names, strict=True):
        made = value.producer()
        assert made is not None
        made.name = name


def plain_name(product: ir.Node) -> str:
    """What normalises its operand itself where it might take a norm that is deferred: of as many tokens as here none is
    but behind what defer_norm_in_prompts makes."""
    operator = OPERATORS.get(product.op_type)
    if operator and "moments" in operator.inputs:
        front = producer(product.inputs[operator.inputs.index("moments")])
        if front is not None and front.op_type.endswith("TileMoments"):
            return product.op_type
    return product.op_type.removeprefix("Deferred")


def fits(front: ir.Node, node: ir.Node, kv_dtype: str) -> bool:
    rotary = ATTENTION[node.op_type]
    is_known = front.domain == "llmc" and append_name(plain_name(front), rotary) in OPERATORS
    if not is_known or not used_once(front.outputs[0]) or weight_dtype(front) != kv_dtype:
        return False
    head_dim = attribute(node, "head_dim")
    if any(dims(cache)[-1] != head_dim for cache in node.inputs[-2:]):
        return False
    pair = attribute(node, "rotary_dim") // 2 if rotary else 0
    in_chunks = pair % CHUNK == 0 and not attribute(node, "interleaved", 0)
    return TILE_OUTPUTS % head_dim == 0 and head_dim % (2 * CHUNK) == 0 and in_chunks
