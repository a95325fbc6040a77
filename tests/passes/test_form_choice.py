"""passes/form_choice.py"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llmc.passes.form_choice import form_choice

T, E = "M", 6


@pytest.fixture
def scores(build: Any) -> Any:
    return build.op("MatMul", build.input("x", T, 4), build.weight("router", 4, E))


def best(build: Any, scores: Any, keepdims: int = 1, last: int = 0) -> Any:
    shape = [T, 1] if keepdims else [T]
    index = build.op("ArgMax", scores, axis=-1, keepdims=keepdims, select_last_index=last, shape=shape)
    index.dtype = ir.DataType.INT64
    return index


def hidden(build: Any, scores: Any, index: Any, reduction: str = "none") -> Any:
    shape = build.op("Shape", index, shape=[2])
    shape.dtype = ir.DataType.INT64
    fill = build.op(
        "ConstantOfShape", shape, value=ir.tensor(np.array([-np.inf], np.float32)), shape=[T, index.shape[1]]
    )
    fill.dtype = ir.DataType.FLOAT
    return build.op("ScatterElements", scores, index, fill, axis=-1, reduction=reduction, shape=[T, E])


def test_the_second_best_is_chosen_among_the_others(build: Any, scores: Any, check: Any) -> None:
    first = best(build, scores)
    second = best(build, hidden(build, scores, first))
    check(build.model(build.op("Concat", first, second, axis=-1)), form_choice, 3)


def test_other_choices_are_refused(build: Any, scores: Any, refused: Any) -> None:
    two = build.op("TopK", scores, build.constant([2]), axis=-1, n_results=2)[1]
    flat, last = best(build, scores, keepdims=0), best(build, scores, last=1)
    several, added = hidden(build, scores, two), hidden(build, scores, best(build, scores, last=1), "add")
    refused(build.model(flat, last, several, added), form_choice)
