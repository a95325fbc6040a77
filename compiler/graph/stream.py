"""Run a step graph over whole sequences, node by node, with no more than one weight in memory at a time.

Each sequence is a step of its own: all of its tokens at once, without a cache.  Attention is run as what
passes/insert_kv_cache.py made it from: CausalAttention, BidirectionalAttention or CausalLatentAttention.  Layers that
share the cache of another one get its keys and values instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from llmc.compiler.graph.check import AHEAD, APPENDED, ATTENTION
from llmc.compiler.graph.run import with_functions
from llmc.compiler.graph.shapes import attributes_of, dims
from llmc.compiler.graph.text import op_name
from llmc.compiler.ops import (
    AHEAD_PAGED_ATTENTION,
    APPENDED_ATTENTION,
    DISTANCE_PAGED_ATTENTION,
    DOMAIN,
    LATENT_ATTENTION,
    N_TURNS,
    OPSET,
    PAGED_ATTENTION,
    VERSION,
    WHOLE_PAGED_ATTENTION,
)
from llmc.compiler.weights import Array, Weight


class Stream:
    """The values of a step graph at some sequences of token ids, as far as its nodes have run."""

    def __init__(self, graph: ir.Graph, sequences: Sequence[Array]) -> None:
        self.n_sequences = len(sequences)
        self.last_use = {value: node for node in graph for value in node.inputs if value is not None}
        positions = [np.arange(len(tokens)) for tokens in sequences]
        given = {"tokens": [tokens.astype(np.int64) for tokens in sequences], "positions": positions, "rows": positions}
        given["adapters"] = [np.full(len(tokens), -1) for tokens in sequences]
        given["sees"] = positions  # these texts have no pictures
        given["turns"] = [np.repeat(places[:, None], N_TURNS, axis=1) for places in positions]
        given["is_given"] = [np.zeros(len(tokens), np.int64) for tokens in sequences]
        for value in (value for value in graph.inputs if value.name == "given"):
            given["given"] = [np.zeros((len(tokens), dims(value)[1]), np.float32) for tokens in sequences]
        self.values = {value: given[str(value.name)] for value in graph.inputs if value.name in given}

    def run(self, node: ir.Node, constants: Mapping[ir.Value, Array] | None = None) -> None:
        """Compute a node, then forget what no later one uses.  constants: known values of weights, read otherwise."""
        import onnxruntime as ort

        part, operands = alone(node)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        data: bytes = ir.to_proto(with_functions(part)).SerializeToString()  # type: ignore[no-untyped-call]
        session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        known = dict(constants or {})
        known |= {v: v.const_value.numpy() for v in operands if v.const_value is not None and v not in known}
        results = []
        for n in range(self.n_sequences):
            inputs = [known[value] if value in known else self.values[value][n] for value in operands]
            results.append(session.run(None, {f"operand.{i}": array for i, array in enumerate(inputs)}))
        for value, of_sequences in zip(node.outputs, zip(*results, strict=True), strict=False):
            if value in self.last_use:
                self.values[value] = list(of_sequences)
        for value in operands:
            if self.last_use[value] is node:
                self.values.pop(value, None)


def alone(node: ir.Node) -> tuple[ir.Model, list[ir.Value]]:
    """A model of this node's results, of one sequence; and the values of the graph that are its inputs, in order.

    Weights are inputs too; other constants stay what they are.
    """
    used = operands_of(node)
    kept = [value for value in used if value.const_value is not None and not isinstance(value.const_value, Weight)]
    operands = [value for value in used if value not in kept]
    twins = {value: ir.Value(name=f"operand.{i}", type=value.type) for i, value in enumerate(operands)}
    twins |= {value: ir.Value(name=value.name, type=value.type, const_value=value.const_value) for value in kept}
    initializers = [twins[value] for value in kept]
    if op_name(node) in (*ATTENTION, *APPENDED):
        nodes, results = attention(node, [twins[value] for value in operands if value in node.inputs], initializers)
    else:
        inputs = [value and twins[value] for value in node.inputs]
        nodes = [ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), num_outputs=len(node.outputs))]
        results = list(nodes[-1].outputs)
    for i, (result, value) in enumerate(zip(results, node.outputs, strict=False)):
        result.name, result.type = f"result.{i}", value.type
    graph = ir.Graph(
        [twins[value] for value in operands],
        results,
        nodes=nodes,
        initializers=initializers,
        opset_imports={"": OPSET, DOMAIN: VERSION},
        name="node",
    )
    return ir.Model(graph, ir_version=10), operands


def operands_of(node: ir.Node) -> list[ir.Value]:
    """What a node reads, each once; of attention no positions and page table, and caches only if another layer's."""
    used = node.inputs[:-4] if op_name(node) in (*ATTENTION, *APPENDED) else node.inputs
    if op_name(node) in APPENDED:
        used = [*used, *node.inputs[-2:]]
    return list(dict.fromkeys(value for value in used if value is not None))


def attention(
    node: ir.Node, operands: list[ir.Value], initializers: list[ir.Value]
) -> tuple[list[ir.Node], list[ir.Value]]:
    """Nodes that attend one whole sequence: (qkv[, query_norm, key_norm][, cos, sin][, sinks, slopes or biases]) -> the
    first result of paged attention, and the keys and values; or (queries[, query_norm][, cos, sin][, sinks], keys,
    values), or what latents take -> that alone."""
    if node.op_type == LATENT_ATTENTION:
        nodes = [ir.node("CausalLatentAttention", operands, attributes_of(node), domain=DOMAIN)]
        return nodes, list(nodes[-1].outputs)
    whole = Whole(attributes_of(node), initializers)
    first, *rest = operands
    if node.op_type in APPENDED_ATTENTION:
        _, turned, has_sinks = APPENDED_ATTENTION[node.op_type]
        *rest, k, v = rest
        sinks = [rest.pop()] if has_sinks else []
        n_norms = int("epsilon" in whole.settings)
        q = whole.prepared(first, "num_heads", rest[:n_norms], rest[n_norms:] if turned else [])
        return whole.nodes, [whole.attend("Sink" * has_sinks, q, k, v, *sinks)]
    both_ways = node.op_type in WHOLE_PAGED_ATTENTION
    nothing = (False, False, False)
    name = node.op_type
    if op_name(node) in AHEAD:  # a row of a text sees no further than itself
        name = next(plain for plain, looks in AHEAD_PAGED_ATTENTION.items() if looks == name)
        rest.pop()
    parts = (*WHOLE_PAGED_ATTENTION[name], *nothing) if both_ways else PAGED_ATTENTION[name]
    _, turned, has_sinks, has_slopes, normed_values = parts
    has_biases = node.op_type == DISTANCE_PAGED_ATTENTION
    of_heads = [rest.pop()] if has_sinks or has_slopes or has_biases else []
    n_norms = 2 if "epsilon" in whole.settings else 0
    angles = rest[n_norms:] if turned else []
    q, k, v = whole.split(first, value_dim=dims(node.inputs[-1])[3])
    q = whole.prepared(q, "num_heads", rest[: n_norms // 2], angles)
    k = whole.prepared(k, "kv_num_heads", rest[n_norms // 2 : n_norms], angles)
    if normed_values:
        v = whole.prepared(
            v, "kv_num_heads", [whole.constant("ones", np.ones(dims(node.inputs[-1])[3], np.float32))], []
        )
    kind = f"{'Sink' * has_sinks}{'Alibi' * has_slopes}{'Distance' * has_biases}"
    return whole.nodes, [
        whole.attend(kind, q, k, v, *of_heads, direction="Bidirectional" if both_ways else "Causal"),
        k,
        v,
    ]


class Whole:
    """Nodes of attention over a whole sequence, in order.  settings: the attributes of what it is within a step."""

    def __init__(self, settings: dict[str, Any], initializers: list[ir.Value]) -> None:
        self.settings, self.initializers = settings, initializers
        self.nodes: list[ir.Node] = []

    def constant(self, name: str, array: Array) -> ir.Value:
        name = f"{name}.{len(self.initializers)}"
        self.initializers.append(ir.Value(name=name, const_value=ir.tensor(array)))
        return self.initializers[-1]

    def then(self, op: str, *inputs: ir.Value, domain: str = "", **attributes: Any) -> ir.Value:
        self.nodes.append(ir.node(op, inputs, attributes, domain=domain))
        return self.nodes[-1].outputs[0]

    def split(self, qkv: ir.Value, value_dim: Any) -> list[ir.Value]:
        n_heads, n_kv_heads, head_dim = (self.settings[name] for name in ("num_heads", "kv_num_heads", "head_dim"))
        sizes = self.constant("sizes", np.array([n_heads * head_dim, n_kv_heads * head_dim, n_kv_heads * value_dim]))
        self.nodes.append(ir.node("Split", [qkv, sizes], {"axis": 1}, num_outputs=3))
        return list(self.nodes[-1].outputs)

    def prepared(self, x: ir.Value, heads: str, norms: list[ir.Value], angles: list[ir.Value]) -> ir.Value:
        """Heads that are normalised where there is a norm, and turned where there are angles.  heads: the attribute
        that says their number."""
        for weight in norms:
            in_heads = self.then("Reshape", x, self.constant("heads", np.array([0, self.settings[heads], -1])))
            how = {"axis": -1, "epsilon": self.settings["epsilon"]}
            normed = self.then("RMSNormalization", in_heads, weight, **how)
            x = self.then("Reshape", normed, self.constant("flat", np.array([0, -1])))
        if angles:
            how = {name: self.settings[name] for name in ("rotary_dim", "interleaved")}
            x = self.then("Rotary", x, *angles, domain=DOMAIN, num_heads=self.settings[heads], **how)
        return x

    def attend(self, kind: str, *operands: ir.Value, direction: str = "Causal") -> ir.Value:
        names = ("num_heads", "kv_num_heads", "scale", "softcap", "window", "layer")
        settings = {name: self.settings[name] for name in names}
        return self.then(f"{kind}{direction}Attention", *operands, domain=DOMAIN, **settings)
