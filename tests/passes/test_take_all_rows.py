"""passes/take_all_rows.py"""

from typing import Any

import numpy as np
import onnx_ir as ir

from llmc.compiler import graph
from llmc.passes.take_all_rows import take_all_rows


def head(build: Any, rows: bool = True) -> Any:
    """Logits of a product, a norm and what caps them, of the rows asked for."""
    h = build.op("Relu", build.input("h", "M", 8))
    if rows:
        h = build.op("Gather", h, build.input("rows", "R", dtype=ir.DataType.INT64), axis=0)
    y = build.op("llmc.RMSNormLinear", h, build.weight("g", 8), build.weight("W", 11, 8), epsilon=1e-5)
    return build.op("Tanh", y)


def test_every_row_has_logits(build: Any, golden: Any) -> None:
    model = build.model(head(build))
    feeds = {"h": np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)}
    before, wanted = graph.to_text(model), graph.evaluate(model, feeds | {"rows": np.arange(6)})["logits"]
    assert take_all_rows(model) == 2
    after = graph.to_text(model)
    golden(f"{before}\n\n// take_all_rows\n\n{after}")
    np.testing.assert_array_equal(graph.evaluate(model, feeds)["logits"], wanted)
    assert take_all_rows(model) == 0
    assert graph.to_text(model) == after


def test_a_result_that_is_gathered_itself_is_what_it_was_gathered_from(build: Any) -> None:
    h, rows = build.op("Relu", build.input("h", "M", 8)), build.input("rows", "R", dtype=ir.DataType.INT64)
    model = build.model(build.op("Gather", h, rows, axis=0))
    assert take_all_rows(model) == 0  # values that had R rows and have M now: it has M already
    assert graph.to_text(model).splitlines()[0] == "graph(%h: f32[M,8])"
    assert model.graph.outputs[0].name == "logits"


def test_a_graph_without_rows_is_left(build: Any, refused: Any) -> None:
    refused(build.model(head(build, rows=False)), take_all_rows)
