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
multiple of 8 apart.  Where the product's norm is deferred in steps of few tokens only, the new product normalises x
itself: the steps in which products append have many.

For prompts on GPUs, whose attention reads all keys from the cache anyway.  It saves writing queries, keys and values in
float32 and reading them again: (H + 2 KH)·D·8 bytes a token.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from llmc.compiler.bind import weight_dtype
from llmc.compiler.graph import attribute, emit, producer, prune, used_once
from llmc.compiler.graph.shapes import dims
from llmc.compiler.ops import OPERATORS, append_name, paged_attention_name

ATTENTION = {paged_attention_name(False, rotary): rotary for rotary in (False, True)}
"""The operators that are rewritten, and whether each turns queries and keys."""
TILE_OUTPUTS, CHUNK = 128, 8
"""How many outputs of a product are finished together, and how many elements are stored at once."""


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
    """The attributes of operator `name`, each taken from the first of the nodes that has it."""
    return {key: next(attribute(n, key) for n in nodes if key in n.attributes) for key in OPERATORS[name].attributes}


def take_places(front: ir.Node, node: ir.Node, queries: ir.Value, results: list[ir.Value]) -> None:
    """Put two new nodes in the place of two old ones, and give them the old names: profiles of a plan go by names."""
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
    """The product's operator, with a norm of its own in place of a deferred one.  In steps of many tokens, for which
    this pass is, no norm is deferred but by defer_norm_in_prompts; behind what that makes the operator stays."""
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
