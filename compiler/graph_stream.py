"""Run a step graph over whole sequences, node by node: of the weights, no more than one is in memory at a time.

Each sequence is a step of its own, of all its tokens and without a cache.  Attention then is CausalAttention of the
packed queries, keys and values, or CausalLatentAttention: what passes/insert_kv_cache.py made it from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from llmc.compiler.graph_check import ATTENTION
from llmc.compiler.graph_run import with_functions
from llmc.compiler.graph_shapes import attributes_of
from llmc.compiler.graph_text import op_name
from llmc.compiler.ops import DOMAIN, LATENT_ATTENTION, OPSET, PAGED_ATTENTION, VERSION
from llmc.compiler.weights import Array, Weight


class Stream:
    """The values of a step graph at some sequences of token ids, as far as its nodes have run."""

    def __init__(self, graph: ir.Graph, sequences: Sequence[Array]) -> None:
        self.n_sequences = len(sequences)
        self.last_use = {value: node for node in graph for value in node.inputs if value is not None}
        positions = [np.arange(len(tokens)) for tokens in sequences]
        given = {"tokens": [tokens.astype(np.int64) for tokens in sequences], "positions": positions, "rows": positions}
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
    if op_name(node) in ATTENTION:
        nodes = attention(node, [twins[value] for value in node.inputs[:-4] if value is not None], initializers)
    else:
        inputs = [value and twins[value] for value in node.inputs]
        nodes = [ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), num_outputs=len(node.outputs))]
    results = nodes[-1].outputs
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
    """What a node reads, each once; of attention no positions, page table and caches."""
    used = node.inputs[:-4] if op_name(node) in ATTENTION else node.inputs
    return list(dict.fromkeys(value for value in used if value is not None))


def attention(node: ir.Node, operands: list[ir.Value], initializers: list[ir.Value]) -> list[ir.Node]:
    """Nodes that attend one whole sequence: (qkv[, query_norm, key_norm][, cos, sin][, sinks or slopes]) -> the first
    result of paged attention; or those of latents."""
    settings = attributes_of(node)
    if node.op_type == LATENT_ATTENTION:
        return [ir.node("CausalLatentAttention", operands, settings, domain=DOMAIN)]
    n_heads, n_kv_heads, width = (settings[name] for name in ("num_heads", "kv_num_heads", "head_dim"))
    sizes = ir.Value(name="sizes", const_value=ir.tensor(np.array([n_heads, n_kv_heads, n_kv_heads]) * width))
    shape = ir.Value(name="shape", const_value=ir.tensor(np.array([0, -1, width])))
    flat = ir.Value(name="flat", const_value=ir.tensor(np.array([0, -1])))
    qkv, *rest = operands
    _, turned, has_sinks, has_slopes = PAGED_ATTENTION[node.op_type]
    of_heads = [rest.pop()] if has_sinks or has_slopes else []
    nodes = [ir.node("Split", [qkv, sizes], {"axis": 1}, num_outputs=3)]
    initializers.append(sizes)

    def then(op: str, x: ir.Value, *others: ir.Value, domain: str = "", **attributes: Any) -> ir.Value:
        nodes.append(ir.node(op, [x, *others], attributes, domain=domain))
        return nodes[-1].outputs[0]

    q, k, v = nodes[0].outputs
    if "epsilon" in settings:
        norms, rest = rest[:2], rest[2:]
        initializers += [shape, flat]
        how = {"axis": -1, "epsilon": settings["epsilon"]}
        normed = [
            then("RMSNormalization", then("Reshape", x, shape), w, **how) for x, w in zip((q, k), norms, strict=True)
        ]
        q, k = (then("Reshape", x, flat) for x in normed)
    if turned:
        how = {name: settings[name] for name in ("rotary_dim", "interleaved")}
        q = then("Rotary", q, *rest, domain=DOMAIN, num_heads=n_heads, **how)
        k = then("Rotary", k, *rest, domain=DOMAIN, num_heads=n_kv_heads, **how)
    names = ("num_heads", "kv_num_heads", "scale", "softcap", "window", "layer")
    causal = f"{'Sink' * has_sinks}{'Alibi' * has_slopes}CausalAttention"
    then(causal, q, k, v, *of_heads, domain=DOMAIN, **{name: settings[name] for name in names})
    return nodes
