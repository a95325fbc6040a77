"""passes/look_ahead.py"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llmc.compiler import graph
from llmc.passes.look_ahead import look_ahead
from llmc.runtime.errors import LlmcError
from tests.passes.conftest import feeds_for
from tests.passes.test_append_in_product import attention, model_of


def layer(build: Any, **settings: Any) -> Any:
    model = model_of(build, attention(build, build.input("qkv", "M", 128)))
    node = next(node for node in model.graph if node.op_type == "RotaryPagedAttention")
    for name, value in settings.items():
        node.attributes.add(ir.AttrInt64(name, value))
    return model


def test_rows_of_a_text_see_what_they_saw(build: Any, check: Any) -> None:
    check(layer(build), look_ahead, 1)


@pytest.mark.parametrize("window", [0, 5, 2])
def test_rows_of_a_picture_see_all_of_it(build: Any, window: int) -> None:
    """Behind them all of it, however short a window is; in front of them what is in the window."""
    model = layer(build, window=window)
    feeds = feeds_for(model)
    sees = feeds["positions"].copy()
    sees[1:5] = 4
    before = graph.evaluate(model, feeds)
    look_ahead(model)
    found = graph.evaluate(model, feeds | {"sees": sees})
    same = [bool(np.array_equal(a, b)) for a, b in zip(before["logits"], found["logits"], strict=True)]
    assert same == [True, False, False, False, True, True]


def test_chunks_are_refused(build: Any) -> None:
    with pytest.raises(LlmcError, match="a picture's rows may be in several chunks of 9 tokens"):
        look_ahead(layer(build, window=-9))


def test_attention_of_other_kinds_is_refused(build: Any) -> None:
    model = layer(build)
    next(node for node in model.graph if node.op_type == "RotaryPagedAttention").op_type = "RotarySinkPagedAttention"
    with pytest.raises(LlmcError, match="RotarySinkPagedAttention lets no row see what is behind it"):
        look_ahead(model)
