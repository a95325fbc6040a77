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

    llmc.BidirectionalAttention(q, k, v)
    -->
    llmc.[Rotary]BidirectionalPagedAttention(…, positions, page_table, k_cache.i, v_cache.i), …
    of llmc.DistanceBidirectionalAttention(q, k, v, biases): llmc.DistanceBidirectionalPagedAttention(…, biases, …)

    llmc.CausalLatentAttention(q, …)
    -->
    llmc.LatentPagedAttention(q, …, positions, page_table, k_cache.i, v_cache.i), k_cache.i_out, v_cache.i_out

    llmc.CausalAttention(llmc.Rotary(q, cos, sin), k, v)                    k and v: those of another layer's attention
    -->
    llmc.RotaryAppendedAttention(q, cos, sin, positions, page_table, k_cache.i_out, v_cache.i_out)
refuses: to turn queries and keys within attention when they are turned differently: Rotary then stays in front of it;
keys and values of another layer under biases by distance, or of a text that is read whole.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from llmc.compiler.graph import constant, emit, op_name, producer, replace
from llmc.compiler.graph.shapes import attributes_of, dims, ints
from llmc.compiler.kernel import PAGE_TOKENS
from llmc.compiler.ops import DOMAIN, SEQUENCE_ATTENTION, WHOLE_ATTENTION, appended_attention_name, paged_attention_name
from llmc.compiler.ops.define import Dim

LATENT = f"{DOMAIN}.CausalLatentAttention"
M, P, N_PAGES = (ir.SymbolicDim(name) for name in ("M", "P", "n_pages"))


def insert_kv_cache(model: ir.Model) -> int:
    """Assumes attention over M tokens of one sequence and an input `positions`; leaves the inputs `page_table`
    i64[M,P], `k_cache.i` and `v_cache.i` f32[n_pages,KH,64,D], and results `…_out` like them, of each layer that has
    keys and values of its own. Returns the number of layers."""
    graph = model.graph
    layers = [node for node in graph if op_name(node) in (*SEQUENCE_ATTENTION, LATENT)]
    if not layers:
        return 0
    positions = next(value for value in graph.inputs if value.name == "positions")
    page_table = page_table_input(dims(positions)[0])
    graph.inputs.append(page_table)
    step = Step(graph, positions, page_table)
    for node in layers:
        if op_name(node) == LATENT:
            step.insert_latent(node)
        else:
            step.insert(node)
    return len(layers)


def page_table_input(n_rows: Dim = M) -> ir.Value:
    return ir.Value(name="page_table", shape=ir.Shape([n_rows, P]), type=ir.TensorType(ir.DataType.INT64))


class Step:
    """A graph that becomes a step: its caches so far, by the keys and values that they hold."""

    def __init__(self, graph: ir.Graph, positions: ir.Value, page_table: ir.Value) -> None:
        self.graph, self.places = graph, [positions, page_table]
        self.n_caches = 0
        self.kept: dict[tuple[Any, ...], tuple[int, list[ir.Value]]] = {}

    def insert(self, node: ir.Node) -> None:
        q, k, v, *of_heads = node.inputs
        alibi, both_ways = node.op_type == "AlibiCausalAttention", op_name(node) in WHOLE_ATTENTION
        settings = attributes_of(node)
        n_kv_heads = settings["kv_num_heads"]
        head_dim, value_dim = width(k) // n_kv_heads, width(v) // n_kv_heads
        settings["head_dim"] = head_dim
        held = (unshaped(k), unshaped(v), n_kv_heads)
        if held in self.kept and not alibi and not both_ways:
            self.read(node, settings, *self.kept[held])
            return
        caches = self.caches(n_kv_heads, head_dim, value_dim)
        settings["layer"] = self.n_caches - 1
        rotation = same_rotation(q, k) if not alibi and not (both_ways and of_heads) else None
        angles: list[ir.Value | None] = []
        if rotation is not None:
            q, k, angles, turning = rotation
            settings |= turning
        operands: list[ir.Value | None] = [packed(node, q, k, v), *angles, *of_heads, *self.places, *caches]
        sinks, distances = bool(of_heads) and not alibi and not both_ways, bool(of_heads) and both_ways
        name = paged_attention_name(False, bool(angles), sinks, alibi, both_ways=both_ways, distances=distances)
        self.kept[held] = (self.n_caches - 1, self.finish(node, caches, f"{DOMAIN}.{name}", operands, settings))

    def insert_latent(self, node: ir.Node) -> None:
        settings = attributes_of(node) | {"layer": self.n_caches}
        caches = self.caches(1, settings["rotary_dim"], settings["latent_dim"])
        self.finish(node, caches, "llmc.LatentPagedAttention", [*node.inputs, *self.places, *caches], settings)

    def read(self, node: ir.Node, settings: dict[str, Any], layer: int, caches: list[ir.Value]) -> None:
        """The same keys and values as of an attention in front: its cache has them."""
        q, _, _, *of_heads = node.inputs
        turned = producer(q, "llmc.Rotary")
        angles: list[ir.Value | None] = []
        if turned is not None:
            q, *angles = turned.inputs
            settings |= turning_of(turned)
        name = appended_attention_name(False, bool(angles), bool(of_heads))
        operands = [q, *angles, *of_heads, *self.places, *caches]
        result = emit(node, f"{DOMAIN}.{name}", operands, **settings | {"layer": layer})
        replace(node.outputs[0], result[0])

    def caches(self, n_kv_heads: int, head_dim: int, value_dim: int) -> list[ir.Value]:
        sizes = {"k": head_dim, "v": value_dim}
        made = [cache(self.graph, f"{kind}_cache.{self.n_caches}", n_kv_heads, size) for kind, size in sizes.items()]
        self.n_caches += 1
        return made

    def finish(
        self, node: ir.Node, caches: list[ir.Value], op: str, operands: list[ir.Value | None], settings: dict[str, Any]
    ) -> list[ir.Value]:
        """Put the operator in the node's place; returns the caches that it leaves."""
        results = emit(node, op, operands, n_results=3, **settings)
        finish(self.graph, node, caches, results)
        return results[1:]


def finish(graph: ir.Graph, node: ir.Node, caches: list[ir.Value], results: list[ir.Value]) -> None:
    """Put the first result in the node's place; the others are results of the graph."""
    replace(node.outputs[0], results[0])
    for before, after in zip(caches, results[1:], strict=True):
        after.name = f"{before.name}_out"
        graph.outputs.append(after)


def width(value: ir.Value | None) -> int:
    size = dims(value)[1]
    assert isinstance(size, int)
    return size


def unshaped(value: ir.Value | None) -> ir.Value | None:
    """The value in front of all Reshapes and the like."""
    while (reshape := producer(value, "Reshape")) is not None:
        value = reshape.inputs[0]
    return value


def as_before(value: ir.Value) -> ir.Value:
    """The value, or that in front of reshapes which together change nothing."""
    before = unshaped(value)
    return before if before is not None and dims(before) == dims(value) else value


def cache(graph: ir.Graph, name: str, kv_num_heads: int, head_dim: int) -> ir.Value:
    shape = ir.Shape([N_PAGES, kv_num_heads, PAGE_TOKENS, head_dim])
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
    graph.inputs.append(value)
    return value


Rotation = tuple[ir.Value, ir.Value, list["ir.Value | None"], dict[str, Any]]


def same_rotation(q: ir.Value | None, k: ir.Value | None) -> Rotation | None:
    """Queries and keys before rotary, its angles and attributes; None unless both are turned in the same way."""
    a, b = producer(q, "llmc.Rotary"), producer(k, "llmc.Rotary")
    if a is None or b is None or list(a.inputs[1:]) != list(b.inputs[1:]):
        return None
    how = [turning_of(node) for node in (a, b)]
    q, k = a.inputs[0], b.inputs[0]
    return (q, k, list(a.inputs[1:]), how[0]) if how[0] == how[1] and q is not None and k is not None else None


def turning_of(rotary: ir.Node) -> dict[str, Any]:
    return {name: rotary.attributes[name].as_int() for name in ("rotary_dim", "interleaved")}


def packed(node: ir.Node, q: ir.Value | None, k: ir.Value | None, v: ir.Value | None) -> ir.Value:
    """The value that q, k and v are cut from in this order, or else their concatenation."""
    parts = [as_before(part) for part in (q, k, v) if part is not None]
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
