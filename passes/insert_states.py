"""Give every token a sequence of its own: layers with a state find it in their sequence's slot, and leave it there.

rewrite:
    q, k, v = Split(qkv)
    llmc.GatedDeltaRule(Reshape(q), Reshape(k), Reshape(v), g, beta)
    -->
    Reshape(llmc.StatefulGatedDeltaRule(qkv, g, beta, positions, slots, state.i)), state.i_out

    llmc.CausalConv(x, weight)
    -->
    llmc.StatefulCausalConv(x, weight, positions, slots, state.i), state.i_out

    the same of llmc.SelectiveRule and llmc.ChannelDeltaRule, of llmc.CausalConvBias and of llmc.SelectiveScan
refuses: nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from llmc.compiler.graph import emit, ints_constant, op_name, producer
from llmc.compiler.graph.shapes import attributes_of, dims
from llmc.compiler.ops import CAUSAL_CONV, DOMAIN, GATED_RULES, PLACE, SELECTIVE_SCAN, WITH_STATES
from llmc.compiler.ops.define import Dim
from llmc.passes.insert_kv_cache import finish, packed, page_table_input

NAMES = tuple(f"{DOMAIN}.{name}" for name in WITH_STATES)
M, N_SLOTS = ir.SymbolicDim("M"), ir.SymbolicDim("n_slots")


def insert_states(model: ir.Model) -> int:
    """Assumes layers with a state over M tokens of one sequence, and an input `positions`; leaves the inputs
    `page_table` i64[M,P] (unused, where nobody attends), `slots` i64[M] and `state.i` f32[n_slots, …], and results
    `…_out` like them. Returns the number of states."""
    graph = model.graph
    nodes = [node for node in graph if op_name(node) in NAMES]
    if not nodes:
        return 0
    positions = next(value for value in graph.inputs if value.name == "positions")
    slots = ir.Value(name="slots", shape=ir.Shape([M]), type=ir.TensorType(ir.DataType.INT64))
    if all(value.name != "page_table" for value in graph.inputs):  # nobody attends, but a step has one
        graph.inputs.append(page_table_input())
    graph.inputs.append(slots)
    for place, node in enumerate(nodes):
        put_in = insert_rule if node.op_type in GATED_RULES else insert_by_channel
        put_in(graph, node, place, positions, slots)
    return len(nodes)


def insert_by_channel(graph: ir.Graph, node: ir.Node, place: int, positions: ir.Value, slots: ir.Value) -> None:
    """Rewrite a convolution or a scan, in which each channel has a state of its own."""
    state = state_input(graph, place, state_sizes(node))
    settings = attributes_of(node) | {PLACE: place}
    name = f"{DOMAIN}.Stateful{node.op_type}"
    finish(graph, node, [state], emit(node, name, [*node.inputs, positions, slots, state], n_results=2, **settings))


def state_sizes(node: ir.Node) -> Sequence[Dim]:
    if node.op_type == SELECTIVE_SCAN:
        return dims(node.inputs[5])
    assert node.op_type in CAUSAL_CONV
    channels, n_taps = dims(node.inputs[1])
    assert isinstance(n_taps, int)
    return [n_taps - 1, channels]


def insert_rule(graph: ir.Graph, node: ir.Node, place: int, positions: ir.Value, slots: ir.Value) -> None:
    q, k, v, g, beta = node.inputs
    (_, k_heads, key_dim), (_, v_heads, value_dim) = dims(q), dims(v)
    sizes = {"num_k_heads": k_heads, "num_v_heads": v_heads, "key_dim": key_dim, "value_dim": value_dim}
    qkv = packed(node, *(as_row(graph, node, value) for value in (q, k, v)))
    state = state_input(graph, place, [v_heads, key_dim, value_dim])
    gates = g if len(dims(g)) == 2 else as_row(graph, node, g)  # of each head, or of each of its key's elements
    operands = [qkv, gates, beta, positions, slots, state]
    settings = attributes_of(node) | sizes | {PLACE: place}
    y, *states = emit(node, f"{DOMAIN}.Stateful{node.op_type}", operands, n_results=2, **settings)
    by_head = [size for size in dims(v)[1:] if isinstance(size, int)]
    heads = emit(node, "Reshape", [y, ints_constant(graph, [-1, *by_head])])[0]
    finish(graph, node, [state], [heads, *states])


def as_row(graph: ir.Graph, node: ir.Node, value: ir.Value | None) -> ir.Value:
    """[M, heads, D] as [M, heads · D]: what it was reshaped from, or reshaped."""
    assert value is not None
    _, heads, size = dims(value)
    assert isinstance(heads, int)
    assert isinstance(size, int)
    reshaped = producer(value, "Reshape")
    if reshaped is not None and (source := reshaped.inputs[0]) is not None and dims(source)[1:] == (heads * size,):
        return source
    return emit(node, "Reshape", [value, ints_constant(graph, [-1, heads * size])])[0]


def state_input(graph: ir.Graph, place: int, sizes: Sequence[Dim]) -> ir.Value:
    shape = ir.Shape([N_SLOTS, *sizes])
    value = ir.Value(name=f"state.{place}", shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
    graph.inputs.append(value)
    return value
