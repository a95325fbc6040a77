"""passes/look_ahead.py"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llmc.compiler import graph
from llmc.passes.look_ahead import look_ahead
from llmc.runtime.errors import LlmcError
from tests.passes.conftest import feeds_for
from tests.passes.test_append_in_product import attention, model_of

ROWS = 4
"""Of a picture."""


def layer(build: Any, **settings: Any) -> Any:
    model = model_of(build, attention(build, build.input("qkv", "M", 128)))
    node = next(node for node in model.graph if node.op_type == "RotaryPagedAttention")
    for name, value in settings.items():
        node.attributes.add(ir.AttrInt64(name, value))
    return model


@pytest.fixture
def rewrite() -> Any:
    found = partial(look_ahead, n_rows=ROWS)
    found.__name__ = "look_ahead"  # type: ignore[attr-defined]
    return found


def test_rows_of_a_text_see_what_they_saw(build: Any, check: Any, rewrite: Any) -> None:
    check(layer(build), rewrite, 1)


def test_rows_of_a_picture_see_all_of_it(build: Any, rewrite: Any) -> None:
    model = layer(build)
    feeds = feeds_for(model)
    sees = feeds["positions"].copy()
    sees[1:5] = 4
    before = graph.evaluate(model, feeds)
    rewrite(model)
    found = graph.evaluate(model, feeds | {"sees": sees})
    same = [bool(np.array_equal(a, b)) for a, b in zip(before["logits"], found["logits"], strict=True)]
    assert same == [True, False, False, False, True, True]


@pytest.mark.parametrize(("window", "fact"), [(3, "a window of 3"), (-3, "chunks of 3"), (-9, "chunks of 9")])
def test_a_picture_without_room_is_refused(build: Any, rewrite: Any, window: int, fact: str) -> None:
    with pytest.raises(LlmcError, match=f"a picture of 4 rows has no room in {fact} tokens"):
        rewrite(layer(build, window=window))
    assert rewrite(layer(type(build)(), window=ROWS)) == 1


def test_attention_of_other_kinds_is_refused(build: Any, rewrite: Any) -> None:
    model = layer(build)
    next(node for node in model.graph if node.op_type == "RotaryPagedAttention").op_type = "RotarySinkPagedAttention"
    with pytest.raises(LlmcError, match="RotarySinkPagedAttention lets no row see what is behind it"):
        rewrite(model)
