"""passes/drop_cache.py"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llmc.compiler import graph
from llmc.passes.drop_cache import drop_cache
from llmc.runtime.errors import LlmcError

INT64 = ir.DataType.INT64


def step_by_step(build: Any) -> ir.Model:
    """Keys of two heads, the mask's, and where the new ones are, added up; with the keys as a second result."""
    ids = build.input("input_ids", "batch", "sequence", dtype=INT64)
    mask = build.input("attention_mask", "batch", "total", dtype=INT64)
    at = build.input("cache_position", "sequence", dtype=INT64)
    past = build.input("past_key_values.0.key", "batch", 2, "past", 4)
    new = build.op("Gather", build.weight("w", 11, 4), ids)
    new = build.op("Concat", *[build.op("Unsqueeze", new, build.constant([1]))] * 2, axis=1)
    keys = build.op("Concat", past, new, axis=2, shape=("batch", 2, "total", 4))
    seen = build.op("Unsqueeze", build.op("Cast", mask, to=1), build.constant([1, 3]))
    where = build.op("Unsqueeze", build.op("Cast", at, to=1), build.constant([0, 1, 3]))
    logits = build.op("Mul", build.op("Mul", keys, seen, shape=("batch", 2, "total", 4)), where, shape=keys.shape)
    model: ir.Model = build.model(logits, keys)
    logits.name, keys.name = "logits", "present.0.key"
    return model


def test_a_graph_with_a_cache_becomes_one_of_a_sequence(build: Any, golden: Callable[[object], None]) -> None:
    model = step_by_step(build)
    tokens, at = np.array([[3, 1, 4, 1, 5, 9]]), np.arange(6)
    before = graph.to_text(model)
    no_past = np.zeros((1, 2, 0, 4), np.float32)
    feeds = {"input_ids": tokens, "attention_mask": np.ones((1, 6), np.int64), "cache_position": at}
    wanted = graph.evaluate(model, feeds | {"past_key_values.0.key": no_past})["logits"]

    assert drop_cache(model) == 5
    golden(f"{before}\n\n// drop_cache\n\n{graph.to_text(model)}")
    found = graph.evaluate(model, {"input_ids": tokens, "position_ids": at[None]})
    assert list(found) == ["logits"]
    np.testing.assert_array_equal(found["logits"], wanted)
    assert drop_cache(model) == 0


def test_another_input_is_refused_by_name(build: Any) -> None:
    ids = build.input("input_ids", "batch", "sequence", dtype=INT64)
    encoded = build.input("encoder_hidden_states", "batch", "sequence", 8)
    model = build.model(build.op("Add", build.op("Gather", build.weight("w", 11, 8), ids), encoded))
    with pytest.raises(LlmcError, match="encoder_hidden_states"):
        drop_cache(model)
