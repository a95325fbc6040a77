"""Give every token a sequence of its own: attention reads and extends a paged KV cache.

rewrite:
    q, k, v = Split(qkv)
    llmc.CausalAttention(llmc.Rotary(q, cos, sin), llmc.Rotary(k, cos, sin), v)
    -->
    llmc.RotaryPagedAttention(qkv, cos, sin, positions, page_table, k_cache.i, v_cache.i), k_cache.i_out, v_cache.i_out

    llmc.CausalAttention(q, k, v)
    -->
    llmc.PagedAttention(Concat(q, k, v), positions, page_table, k_cache.i, v_cache.i), k_cache.i_out, v_cache.i_out

    the same of llmc.SinkCausalAttention(q, k, v, sinks): llmc.[Rotary]SinkPagedAttention(…, sinks, positions, …);
    of llmc.AlibiCausalAttention(q, k, v, slopes): llmc.AlibiPagedAttention(…, slopes, positions, …)

    llmc.CausalLatentAttention(q, …)
    -->
    llmc.LatentPagedAttention(q, …, positions, page_table, k_cache.i, v_cache.i), k_cache.i_out, v_cache.i_out
refuses: to turn queries and keys within attention when they are turned differently: Rotary then stays in front of it;
values whose heads have another size than the keys'.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from llmc.compiler.graph import constant, emit, op_name, producer, replace
from llmc.compiler.graph_shapes import attributes_of, dims, ints
from llmc.compiler.kernel import PAGE_TOKENS
from llmc.compiler.ops import CAUSAL_ATTENTION, DOMAIN, paged_attention_name
from llmc.runtime.errors import LlmcError

LATENT = f"{DOMAIN}.CausalLatentAttention"
M, P, N_PAGES = (ir.SymbolicDim(name) for name in ("M", "P", "n_pages"))


def insert_kv_cache(model: ir.Model) -> int:
    """Assumes CausalAttention over M tokens and an input `positions`; leaves the inputs `page_table` i64[M,P],
    `k_cache.i` and `v_cache.i` f32[n_pages,KH,64,D], and results `…_out` like them. Returns the number of layers."""
    graph = model.graph
    layers = [node for node in graph if op_name(node) in (*CAUSAL_ATTENTION, LATENT)]
    if not layers:
        return 0
    positions = next(value for value in graph.inputs if value.name == "positions")
    page_table = ir.Value(name="page_table", shape=ir.Shape([M, P]), type=ir.TensorType(ir.DataType.INT64))
    graph.inputs.append(page_table)
    for layer, node in enumerate(layers):
        put_in = insert_latent if op_name(node) == LATENT else insert
        put_in(graph, node, layer, positions, page_table)
    return len(layers)


def insert(graph: ir.Graph, node: ir.Node, layer: int, positions: ir.Value, page_table: ir.Value) -> None:
    q, k, v, *of_heads = node.inputs
    alibi = node.op_type == "AlibiCausalAttention"
    settings = attributes_of(node)
    width = dims(q)[1]
    assert isinstance(width, int)
    settings |= {"layer": layer, "head_dim": width // settings["num_heads"]}
    if dims(k) != dims(v):
        fact = f"attention whose keys and values are of different sizes, {dims(k)[1]} and {dims(v)[1]}, is not compiled"
        raise LlmcError(fact, place=f"node {node.name}")
    caches = [cache(graph, f"{kind}_cache.{layer}", settings["kv_num_heads"], settings["head_dim"]) for kind in "kv"]
    rotation = same_rotation(q, k) if not alibi else None
    angles: list[ir.Value | None] = []
    if rotation is not None:
        q, k, angles, turning = rotation
        settings |= turning
    operands: list[ir.Value | None] = [packed(node, q, k, v), *angles, *of_heads, positions, page_table, *caches]
    name = paged_attention_name(False, bool(angles), bool(of_heads) and not alibi, alibi)
    finish(graph, node, caches, emit(node, f"{DOMAIN}.{name}", operands, n_results=3, **settings))


def insert_latent(graph: ir.Graph, node: ir.Node, layer: int, positions: ir.Value, page_table: ir.Value) -> None:
    settings = attributes_of(node) | {"layer": layer}
    sizes = {"k": settings["rotary_dim"], "v": settings["latent_dim"]}
    caches = [cache(graph, f"{kind}_cache.{layer}", 1, size) for kind, size in sizes.items()]
    operands = [*node.inputs, positions, page_table, *caches]
    finish(graph, node, caches, emit(node, "llmc.LatentPagedAttention", operands, n_results=3, **settings))


def finish(graph: ir.Graph, node: ir.Node, caches: list[ir.Value], results: list[ir.Value]) -> None:
    """Put the first result in the node's place; the others are results of the graph."""
    replace(node.outputs[0], results[0])
    for before, after in zip(caches, results[1:], strict=True):
        after.name = f"{before.name}_out"
        graph.outputs.append(after)


def cache(graph: ir.Graph, name: str, kv_num_heads: int, head_dim: int) -> ir.Value:
    shape = ir.Shape([N_PAGES, kv_num_heads, PAGE_TOKENS, head_dim])
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
    graph.inputs.append(value)
    return value


Rotation = tuple[ir.Value, ir.Value, list["ir.Value | None"], dict[str, Any]]


def same_rotation(q: ir.Value | None, k: ir.Value | None) -> Rotation | None:
    """Queries and keys before they are turned, by what angles, and how; None unless both are turned alike."""
    a, b = producer(q, "llmc.Rotary"), producer(k, "llmc.Rotary")
    if a is None or b is None or list(a.inputs[1:]) != list(b.inputs[1:]):
        return None
    how = [{name: node.attributes[name].as_int() for name in ("rotary_dim", "interleaved")} for node in (a, b)]
    q, k = a.inputs[0], b.inputs[0]
    return (q, k, list(a.inputs[1:]), how[0]) if how[0] == how[1] and q is not None and k is not None else None


def packed(node: ir.Node, q: ir.Value | None, k: ir.Value | None, v: ir.Value | None) -> ir.Value:
    """The value that q, k and v are cut from in this order, or else their concatenation."""
    parts = [part for part in (q, k, v) if part is not None]
    split = producer(q, "Split")
    if split is not None and split.inputs[0] is not None and list(split.outputs) == parts:
        return split.inputs[0]
    whole = sliced(parts)
    return whole if whole is not None else emit(node, "Concat", parts, axis=1)[0]


def sliced(parts: list[ir.Value]) -> ir.Value | None:
    """The value [M, …] of which the parts are slices that cover it, one after the other."""
    nodes = [producer(part, "Slice") for part in parts]
    whole = nodes[0].inputs[0] if nodes[0] is not None else None
    if whole is None or len(dims(whole)) != 2:
        return None
    end = 0
    for node, part in zip(nodes, parts, strict=True):
        if node is None or node.inputs[0] is not whole or any(constant(value) is None for value in node.inputs[1:]):
            return None
        starts, _, axes, *steps = (ints(value) for value in node.inputs[1:])
        size = dims(part)[1]
        if starts != [end] or axes not in ([1], [-1]) or steps not in ([], [[1]]) or not isinstance(size, int):
            return None
        end += size
    return whole if end == dims(whole)[1] else None
