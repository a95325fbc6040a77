"""A step graph that runs node by node says what the model says."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmc import passes
from llmc.compiler.frontend import load_source
from llmc.compiler.graph_stream import Stream
from llmc.compiler.reference import reference_logits

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
