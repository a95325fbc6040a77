"""passes/gather_rows.py"""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llmc.compiler import graph
from llmc.passes.gather_rows import gather_rows


def hidden(build: Any) -> Any:
    h = build.input("h", "M", 8)
    build.input("page_table", "M", "P", dtype=ir.DataType.INT64)
    return h


def gathered(model: Any, golden: Any) -> Any:
    """Run the pass; logits must be the rows asked for."""
    feeds = {"h": np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)}
    feeds |= {"rows": np.array([4, 1]), "page_table": np.zeros((6, 2), np.int64)}
    before, wanted = graph.to_text(model), graph.evaluate(model, feeds)["logits"]
    n_rewrites = gather_rows(model)
    after = graph.to_text(model)
    golden(f"{before}\n\n// gather_rows\n\n{after}")
    np.testing.assert_allclose(graph.evaluate(model, feeds)["logits"], wanted[[4, 1]], rtol=0, atol=1e-6)
    assert gather_rows(model) == 0
    assert graph.to_text(model) == after
    return n_rewrites


def test_rows_are_gathered_before_a_norm_that_stands_alone(build: Any, golden: Any) -> None:
    y = build.op(
        "RMSNormalization", build.op("Relu", build.op("Relu", hidden(build))), build.weight("norm", 8), axis=-1
    )
    assert gathered(build.model(build.op("llmc.Linear", y, build.weight("lm_head", 11, 8))), golden) == 4


def test_rows_are_gathered_after_a_norm_that_makes_the_sum(build: Any, golden: Any) -> None:
    h = hidden(build)
    _, y = build.op("llmc.AddRMSNorm", h, build.op("Relu", h), build.weight("norm", 8), n_results=2, epsilon=1e-6)
    assert gathered(build.model(build.op("llmc.Linear", y, build.weight("lm_head", 11, 8))), golden) == 1


def test_what_follows_the_head_sees_the_rows_too(build: Any, golden: Any) -> None:
    y = build.op("llmc.Linear", hidden(build), build.weight("lm_head", 11, 8))
    capped = build.op("Mul", build.op("Tanh", build.op("Div", y, build.constant(30.0))), build.constant(30.0))
    assert gathered(build.model(capped), golden) == 4


def test_a_value_with_another_user_is_not_passed(build: Any, golden: Any) -> None:
    y = build.op("Relu", hidden(build))
    z = build.op("Add", y, build.op("llmc.Linear", y, build.weight("w", 8, 8)))
    assert gathered(build.model(build.op("llmc.Linear", z, build.weight("lm_head", 11, 8))), golden) == 1


def test_softmax_over_tokens_is_not_passed(build: Any, golden: Any) -> None:
    y = build.op("Softmax", hidden(build), axis=0)
    assert gathered(build.model(build.op("llmc.Linear", y, build.weight("lm_head", 11, 8))), golden) == 1


def test_embeddings_are_filled_up_for_the_rows_alone(build: Any, golden: Any) -> None:
    y = build.op("RMSNormalization", hidden(build), build.weight("norm", 8), axis=-1)
    assert gathered(build.model(build.op("Pad", y, build.constant([0, 3]), None, build.constant([-1]))), golden) == 2


@pytest.mark.parametrize("op", ["llmc.PoolMean", "llmc.PoolFirst"])
@pytest.mark.parametrize("with_product", [False, True])
def test_a_text_is_pooled_for_the_rows_alone(build: Any, golden: Any, op: str, with_product: bool) -> None:
    h = hidden(build)
    build.token_inputs()
    pooled = build.op(op, h)
    model = build.model(build.op("llmc.Linear", pooled, build.weight("W", 3, 8)) if with_product else pooled)
    feeds: dict[str, Any] = {"h": np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)}
    feeds |= {
        "positions": np.arange(6),
        "rows": np.array([4, 1]),
        "page_table": np.zeros((6, 2), np.int64),
        "tokens": np.zeros(6, np.int64),
    }
    wanted = graph.evaluate(model, feeds)["logits"]
    assert gather_rows(model) == with_product
    golden(graph.to_text(model))
    np.testing.assert_allclose(graph.evaluate(model, feeds)["logits"], wanted[[4, 1]], rtol=0, atol=1e-6)
    assert gather_rows(model) == 0


def test_rows_of_a_result_that_has_another_maker_are_gathered_behind_it(build: Any, golden: Any) -> None:
    h = hidden(build)
    _, y = build.op("llmc.AddRMSNorm", h, build.op("Relu", h), build.weight("norm", 8), n_results=2, epsilon=1e-6)
    assert gathered(build.model(y), golden) == 0
