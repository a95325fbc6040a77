"""A step graph that runs node by node says what the model says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llmc import passes
from llmc.compiler import graph
from llmc.compiler.certificate.reference import reference_logits
from llmc.compiler.frontend import load_source
from llmc.compiler.graph.shapes import infer
from llmc.compiler.graph.stream import Stream
from llmc.compiler.ops import DOMAIN, OPERATORS, OPSET, VERSION

SEQUENCES = [np.random.default_rng(n).integers(0, 131, n) for n in (90, 7)]


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gemma2", "mistral", "qwen3"])
def test_logits_are_the_model_s(family: str, tiny_model: Callable[[str], Path]) -> None:
    source = load_source(str(tiny_model(family)))
    graph = passes.run(source.graph, n_context=source.n_context).graph
    stream, nodes = Stream(graph, SEQUENCES), list(graph)
    stream.last_use[graph.outputs[0]] = nodes[0]  # of no node behind it: kept
    for node in nodes:
        stream.run(node)
    wanted = reference_logits(source, [tokens.tolist() for tokens in SEQUENCES])
    for found, exact in zip(stream.values[graph.outputs[0]], wanted, strict=True):
        assert np.abs(found - exact).max() <= 1e-5 * np.ptp(exact)


def test_what_no_later_node_reads_is_forgotten(tiny_model: Callable[[str], Path]) -> None:
    source = load_source(str(tiny_model("llama")))
    graph = passes.run(source.graph, n_context=source.n_context).graph
    stream = Stream(graph, SEQUENCES)
    for node in graph:
        stream.run(node)
        assert len(stream.values) <= 3 + 4  # tokens, positions, rows; residual, normed or product, angles
    assert set(stream.values) <= set(graph.inputs)


SINKS = {"kv_num_heads": 2, "head_dim": 8, "rotary_dim": 8, "interleaved": 0}
LATENTS = {"head_dim": 14, "latent_dim": 16, "rotary_dim": 8, "interleaved": 1, "epsilon": 1e-6}
CACHED: dict[str, tuple[dict[str, Any], list[tuple[int, ...]]]] = {
    "RotarySinkPagedAttention": (SINKS, [(7, 64), (7, 4), (7, 4), (4,), *[(1, 2, 64, 8)] * 2]),
    "RotaryBidirectionalPagedAttention": (SINKS, [(7, 64), (7, 4), (7, 4), *[(1, 2, 64, 8)] * 2]),
    "RMSNormBidirectionalPagedAttention": (
        {"kv_num_heads": 2, "head_dim": 8, "epsilon": 1e-6},
        [(7, 64), (8,), (8,), *[(1, 2, 64, 8)] * 2],
    ),
    "LatentPagedAttention": (
        LATENTS,
        [(7, 56), (7, 64), (7, 24), (16,), (7, 4), (7, 4), (1, 1, 64, 8), (1, 1, 64, 16)],
    ),
}


@pytest.mark.parametrize("name", CACHED)
def test_attention_is_what_it_is_with_a_cache(name: str) -> None:
    m, operator = 7, OPERATORS[name]
    sizes, dims = CACHED[name]
    settings = {"num_heads": 4, "layer": 0, "scale": 0.4, "softcap": 0.0, "window": 3} | sizes
    shapes = dict(zip(operator.inputs, [*dims[:-2], (m,), (m, 1), *dims[-2:]], strict=True))
    feeds: dict[str, Any] = {
        name: np.random.default_rng(0).normal(size=shape).astype(np.float32) for name, shape in shapes.items()
    }
    feeds |= {"positions": np.arange(m), "page_table": np.zeros((m, 1), np.int64)}
    types = {name: ir.TensorType(ir.DataType.from_numpy(array.dtype)) for name, array in feeds.items()}
    inputs = [ir.Value(name=name, shape=ir.Shape(shapes[name]), type=types[name]) for name in operator.inputs]
    node = ir.node(operator.name, inputs, settings, domain=DOMAIN, num_outputs=3)
    infer(node)
    for i, value in enumerate(node.outputs):
        value.name = f"result.{i}"
    whole = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": OPSET, DOMAIN: VERSION}, name="attention")
    stream = Stream(whole, [np.arange(m)])
    stream.values = {value: [feeds[str(value.name)]] for value in inputs}
    stream.last_use[node.outputs[0]] = node
    stream.run(node)
    wanted = graph.evaluate(ir.Model(whole, ir_version=10), feeds)["result.0"]
    np.testing.assert_allclose(stream.values[node.outputs[0]][0], wanted, rtol=0, atol=2e-6)
